"""RMS norms, computed in float32 whatever the activations are."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.models.fused import scale_and_gate


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / rms(x) * weight in float32, in x's dtype."""
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def l2_normalize(x: mx.array, scale: float = 1.0) -> mx.array:
    """scale * x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32.

    As an RMS norm, which divides by the root of the mean instead of the sum.
    """
    dims = x.shape[-1]
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6 / dims) * (scale * dims**-0.5)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis.

    Where published checkpoints hold weight - 1, here is the sum, in float32: bfloat16 has no room for it.
    """

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """rms_norm(x) * weight, then times silu(gate) in float32."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return scale_and_gate(rms_norm(x, None, self.eps), self.weight, gate)
