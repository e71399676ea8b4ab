"""The expert feed-forward over a slab of blobs: one function, and the backend of the current device.

A *slab* is a uint32 array [slots, blob_size / 4]: slot s holds one expert's blob as ``layout`` describes it.
Kernels read experts where they lie in it; nothing is unpacked, copied or gathered.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import mlx.core as mx

from mlx_flashmoe.kernels import gpu, reference
from mlx_flashmoe.layout import BITS, BlobLayout

__all__ = ["expert_ffn", "expert_rows", "quantized_matmul"]


@cache
def _cpu() -> ModuleType:
    """The SIMD kernels, or the reference where numba is absent or does not go with the installed numpy."""
    try:
        return import_module("mlx_flashmoe.kernels.cpu")
    except ImportError:
        return reference


def _backend() -> ModuleType:
    """The module whose functions run on the current device."""
    return gpu.backend() or _cpu()


def expert_ffn(
    x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout
) -> mx.array:
    """The routed experts of a few tokens: y = sum over k of weights * down(silu(gate(x)) * up(x)).

    Args:
        x: [T, D] activations, float32, bfloat16 or float16. T from 1 to 16.
        slab: uint32 [slots, blob_size / 4].
        slots: int32 [T, K], where each token's experts lie. Every entry must be a valid slot.
        weights: float32 [T, K] routing weights.
        layout: of the blobs in the slab.

    Returns:
        [T, D] in x's dtype. Accumulated in float32.
    """
    return _backend().expert_ffn(x, slab, slots, weights, layout)


def expert_rows(x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout) -> mx.array:
    """One expert a row, unweighted, for many rows grouped by expert: each expert's weights are read once.

    The result of a row depends on that row's x, its expert and the number of rows of its run, and on nothing
    else in the call: calls may be split between runs of equal slots without changing a bit.

    Args:
        x: [P, D] activations, rows of one expert adjacent.
        slab: uint32 [slots, blob_size / 4].
        slots: int32 [P], equal entries adjacent.
        layout: of the blobs in the slab.

    Returns:
        [P, D]: down(silu(gate(x)) * up(x)) of each row's expert; on a GPU in x's dtype, on the CPU in float32, so
        that a weighted sum of them in order has the bits of expert_ffn.
    """
    return _backend().expert_rows(x, slab, slots, layout)


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """x @ dequantized(weight).T, as ``mx.quantized_matmul``; on the CPU with the expert kernel's inner loop.

    Args:
        x: [..., in] activations.
        weight: uint32 [out, in * bits / 32], MLX's affine format.
        scales, biases: [out, in / group_size].
    """
    if mx.default_device().type == mx.DeviceType.cpu and bits in BITS and _cpu() is not reference:
        return _cpu().quantized_matmul(x, weight, scales, biases, group_size, bits)
    if mx.default_device() == mx.gpu and mx.cuda.is_available() and x.shape[-1] <= group_size:
        # MLX 0.32.4 gives wrong sums, or NaN, for inputs of a single group on Hopper; only tiny models have them.
        return x @ mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits).T
    return mx.quantized_matmul(
        x, weight, scales=scales, biases=biases, transpose=True, group_size=group_size, bits=bits
    )
