"""The product of the dense layers: quantized weights that every token uses."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import on_cpu, reference
from mlx_flashmoe.layout import BITS

MANY_ROWS = (
    8  # from here on MLX's CUDA product is compiled at first use, which takes half a minute for each format
)
TF32 = os.environ.get("MLX_ENABLE_TF32") != "0"  # MLX's plain products of float32 have 11 bits then
DEQUANTIZED_BYTES = 1 << 26  # at once: a whole head would be gigabytes


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """x @ dequantized(weight).T, as ``mx.quantized_matmul``; on the CPU with the expert kernel's inner loop.

    Args:
        x: [..., in] activations.
        weight: uint32 [out, in * bits / 32], MLX's affine format.
        scales, biases: [out, in / group_size].
    """
    device = mx.default_device()
    if device.type == mx.DeviceType.cpu and bits in BITS and on_cpu.module() is not reference:
        y: mx.array = on_cpu.module().quantized_matmul(x, weight, scales, biases, group_size, bits)
        return y
    if device == mx.gpu and mx.cuda.is_available():
        many = x.size >= MANY_ROWS * x.shape[-1] and (x.dtype != mx.float32 or not TF32)
        # MLX 0.32.4 gives wrong sums, or NaN, for inputs of a single group on Hopper; only tiny models have them.
        if many or x.shape[-1] <= group_size:
            return dequantized_matmul(x, weight, scales, biases, group_size, bits)
    return mx.quantized_matmul(
        x, weight, scales=scales, biases=biases, transpose=True, group_size=group_size, bits=bits
    )


def dequantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """The same by a plain product with the dequantized weight, some rows of it at once."""
    step = max(1, DEQUANTIZED_BYTES // (x.shape[-1] * x.dtype.size))
    pieces = []
    for start in range(0, weight.shape[0], step):
        w, s, b = (part[start : start + step] for part in (weight, scales, biases))
        piece = mx.dequantize(w, s, b, group_size=group_size, bits=bits).astype(x.dtype)
        pieces.append(x @ piece.T)
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)


def head_products(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    transpose: bool,
) -> mx.array:
    """Each head's x times a matrix of its own: x @ dequantized(weight).T if ``transpose``, else without ``.T``.

    Args:
        x: [B, heads, T, in] activations.
        weight: uint32 [heads, rows, columns * bits / 32], MLX's affine format.
        scales, biases: [heads, rows, columns / group_size].
    """
    device = mx.default_device()
    # Of several rows MLX's CPU product unpacks every weight anew for each, and CUDA's wants no parts of matrices.
    one = x.shape[-2] == 1 if device.type == mx.DeviceType.cpu else mx.metal.is_available()
    if one:
        return mx.quantized_matmul(
            x, weight, scales=scales, biases=biases, transpose=transpose, group_size=group_size, bits=bits
        )
    w = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits).astype(x.dtype)
    return matmul(x, w.swapaxes(-1, -2) if transpose else w)


def matmul(x: mx.array, y: mx.array) -> mx.array:
    """x @ y. Of float32 on the CPU by numpy, at once: MLX's own product there is tens of times slower on Linux."""
    if mx.default_device().type == mx.DeviceType.cpu and x.dtype == y.dtype == mx.float32:
        return mx.array(np.asarray(x) @ np.asarray(y))
    return x @ y
