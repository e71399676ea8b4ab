"""RMS norms, computed in float32 whatever the activations are."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import add_norm, gated_norm, gpu


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis.

    Where published checkpoints hold weight - 1, here is the sum, in float32: bfloat16 has no room for it.
    """

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return add_norm.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        """x + y, and the norm of that."""
        return add_norm.add_norm(x, y, self.weight, self.eps)

    def check_kernels(self, language: gpu.Language, dtype: mx.Dtype) -> None:
        """Compares the kernels that serve this layer on a GPU, before they are needed."""
        add_norm.right(language, dtype, self.weight.size, self.weight.dtype)


class GatedRMSNorm(nn.Module):
    """y / rms(y) * weight over the last axis of float32 y, times silu(gate) in float32; in gate's dtype."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, y: mx.array, gate: mx.array) -> mx.array:
        return gated_norm.gated_norm(y, gate, self.weight, self.eps)

    def check_kernels(self, language: gpu.Language, dtype: mx.Dtype) -> None:
        """As of RMSNorm."""
        gated_norm.right(language, dtype, self.weight.size, self.weight.dtype)
