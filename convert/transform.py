"""The arithmetic of a conversion: bytes of one matrix (or some of its rows) in, bytes of the result out.

Everything works on whole rows: groups never cross a row, so that a matrix converted in pieces is bit for bit
the matrix converted at once.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.convert.binding import Matrix
from mlx_flashmoe.convert.safetensors import Tensor
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import Quantization

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# (numpy type that carries the bits, MLX type): numpy has no bfloat16.
_TYPES = {
    "BF16": (np.uint16, mx.bfloat16),
    "F16": (np.uint16, mx.float16),
    "F32": (np.uint32, mx.float32),
    "U32": (np.uint32, mx.uint32),
    "I32": (np.uint32, mx.uint32),
}
FP8_NAN = 0x7F  # of either sign; e4m3 has no infinities
# On a CPU every thread has a stream of its own and they run side by side; a GPU is one resource.
_gpu = threading.Lock()


def one_plus(weight: Tensor) -> Bytes:
    """1 + weight, added in float32: a norm as Hugging Face's layouts publish it, as the model uses it."""
    raw = weight.read()
    if weight.dtype == "F32":
        values = raw.view(np.float32)
    elif weight.dtype == "F16":
        values = raw.view(np.float16).astype(np.float32)
    else:
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return (values + np.float32(1)).view(np.uint8)


def convert(matrix: Matrix, quantization: Quantization, device: mx.Device) -> tuple[Bytes, ...]:
    """The parts of a matrix that does not stay as published: quantized anew, bfloat16 from FP8, or float32; and of one
    that stays, but for its biases, which are not published."""
    with _gpu if device.type == mx.DeviceType.gpu else contextlib.nullcontext():
        if not quantization.quantized:
            if matrix.fp8:
                parts = [_fp8_values(matrix, device).astype(mx.bfloat16, stream=device)]
            else:
                parts = [_affine_values(matrix, device, mx.float32)]
        elif quantization == matrix.quantization and matrix.symmetric:
            parts = _affine(matrix, device)
        else:
            parts = quantize(matrix, quantization, device)
        mx.eval(parts)
        made = tuple(map(_bytes, parts))
    return made if matrix.bias is None else (*made, matrix.bias.read())


def quantize(matrix: Matrix, quantization: Quantization, device: mx.Device) -> list[mx.array]:
    """Weight, scales and biases, lazily; from a matrix's values if it was quantized, or FP8, before."""
    if matrix.fp8:
        values = _fp8_values(matrix, device)
    elif matrix.quantization.quantized:
        # Without published biases the values are exact in float32, as of FP8.
        dtype = mx.float32 if matrix.symmetric else _TYPES[matrix.dtype][1]
        values = _affine_values(matrix, device, dtype)
    else:
        values = _array(matrix.weight)
    weight, scales, biases = mx.quantize(values, quantization.group_size, quantization.bits, stream=device)
    # From float32 values of FP8 come float32 scales; what is kept has the type that other checkpoints' have.
    dtype = _TYPES[matrix.dtype][1]
    return [weight, scales.astype(dtype, stream=device), biases.astype(dtype, stream=device)]


def _affine(matrix: Matrix, device: mx.Device) -> list[mx.array]:
    """Weight, scales and biases of a quantized matrix; biases that are not published lose nothing to rounding."""
    assert matrix.scales is not None
    scales = _array(matrix.scales)
    if matrix.biases is not None:
        biases = _array(matrix.biases)
    else:
        biases = mx.multiply(scales, -(2 ** (matrix.quantization.bits - 1)), stream=device)
    return [_array(matrix.weight), scales, biases]


def _affine_values(matrix: Matrix, device: mx.Device, dtype: mx.Dtype) -> mx.array:
    """The values of a quantized matrix, computed in ``dtype``."""
    q = matrix.quantization
    weight, *rest = _affine(matrix, device)
    scales, biases = (a.astype(dtype, stream=device) for a in rest)
    return mx.dequantize(weight, scales, biases, q.group_size, q.bits, stream=device)


def _fp8_values(matrix: Matrix, device: mx.Device) -> mx.array:
    """weight * scale of its block, in float32: exact where scales are bfloat16, as they are published.

    Raises:
        SourceError: some of it is not a number.
    """
    assert matrix.fp8_scale is not None
    rows, columns = matrix.weight.shape
    weight = matrix.weight.read()
    if (weight & 0x7F == FP8_NAN).any():
        raise SourceError(
            f"{matrix.weight} has an element that is not a number; download the checkpoint again"
        )
    with mx.stream(device):
        codes = mx.array(weight.reshape(rows, columns))
        scales = _array(matrix.fp8_scale).astype(mx.float32)
        # A block's scale for each of its rows, then for each of its columns; the last block may be narrower.
        high, wide = matrix.block
        scales = mx.repeat(scales, high, axis=0)[matrix.skipped : matrix.skipped + rows]
        return mx.from_fp8(codes, mx.float32) * mx.repeat(scales, wide, axis=1)[:, :columns]


def _array(tensor: Tensor) -> mx.array:
    carrier, dtype = _TYPES[tensor.dtype]
    return mx.array(tensor.read().view(carrier).reshape(tensor.shape)).view(dtype)


def _bytes(array: mx.array) -> Bytes:
    carrier = mx.uint16 if array.dtype.size == 2 else mx.uint32
    return np.array(array.view(carrier)).reshape(-1).view(np.uint8)
