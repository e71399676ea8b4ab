"""RMS norms, computed in float32 whatever the activations are."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels.add_norm import add_norm, rms_norm
from mlx_flashmoe.kernels.gated_norm import gated_norm


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

    def after_adding(self, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        """x + y, and the norm of that."""
        return add_norm(x, y, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """y / rms(y) * weight over the last axis of float32 y, times silu(gate) in float32; in gate's dtype."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, y: mx.array, gate: mx.array) -> mx.array:
        return gated_norm(y, gate, self.weight, self.eps)
