"""Matrices in formats of MLX that cannot be kept, as matrices that can be: with exactly the same values.

Affine codes of 5 bits are codes of 6 bits too, those of one bit are of two.

An mxfp4 value is 0, 0.5, 1, 1.5, 2, 3, 4 or 6 of either sign, times a power of two for each 32 of a row (OCP
Microscaling Formats specification, 1.0). In halves that is a whole number from -12 to 12: 25 steps, which affine
quantization at 6 bits has. The values of mxfp8 and nvfp4 have at most 6 significant bits, which bfloat16 holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.convert.binding import Matrix
from mlx_flashmoe.convert.safetensors import DTYPE_BITS, SafetensorsFile, Tensor
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import BITS, Quantization

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
AFFINE = Quantization(6, 32)  # what mxfp4 becomes
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, values to a scale
LARGEST_SCALE = (
    250  # of mxfp4, as published: with larger ones, values are near what bfloat16 has no number for
)

# A code's steps above the least, by its bits: sign, two of exponent, one of fraction.
_MAGNITUDES = np.array([0, 1, 2, 3, 4, 6, 8, 12])
_STEPS = np.concatenate([12 + _MAGNITUDES, 12 - _MAGNITUDES]).astype(np.uint32)
# Four codes, as they are packed -> four numbers of 6 bits, as they are packed.
_FOUR = sum(_STEPS[(np.arange(1 << 16) >> 4 * i) & 15] << 6 * i for i in range(4)).astype(np.uint32)


def widened(matrix: Matrix) -> Matrix:
    """An affine matrix at the least bits of ``BITS`` that hold its codes."""
    have = matrix.quantization.bits
    bits = next((b for b in BITS if b >= have), have)
    if not matrix.quantization.quantized or bits == have:
        return matrix
    *out, words = matrix.weight.shape
    shape = (*out, words * bits // have)
    weight = matrix.weight
    return replace(
        matrix,
        weight=_made(weight, "U32", shape, lambda a, b: _wider(_rows(weight, a, b), have, bits)),
        quantization=Quantization(bits, matrix.quantization.group_size),
    )


def kept(mode: str, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Matrix:
    """The matrix that a matrix (or a stack of them) in a mode of ``MODES`` is kept as.

    Args:
        weight: uint32 [..., out, in * bits / 32].
        scales: uint8 [..., out, in / group].

    Raises:
        SourceError: reading it finds a scale that bfloat16 has no number for.
    """
    *out, groups = scales.shape
    if mode == "mxfp4":
        inner = groups * AFFINE.group_size
        return Matrix(
            _made(weight, "U32", (*out, inner * AFFINE.bits // 32), lambda a, b: _codes(_rows(weight, a, b))),
            _made(scales, "BF16", scales.shape, lambda a, b: _steps(scales, a, b, 0.5)),
            _made(scales, "BF16", scales.shape, lambda a, b: _steps(scales, a, b, -6.0)),
            AFFINE,
            bias=bias,
        )
    bits, group = MODES[mode]
    # A job waits for the shard of what it reads; scales in another one are read now: they are small.
    apart = type(scales.file) is SafetensorsFile and scales.file is not weight.file
    early = scales.read() if apart else None

    def values(a: int, b: int) -> Bytes:
        packed = _rows(weight, a, b).view(np.uint32)
        factors = _rows(scales, a, b) if early is None else early.reshape(-1, groups)[a:b]
        with mx.stream(mx.cpu):
            made = mx.dequantize(
                mx.array(packed.reshape(b - a, -1)),
                mx.array(factors.reshape(b - a, -1)),
                group_size=group,
                bits=bits,
                mode=mode,
                dtype=mx.bfloat16,
            )
            return np.array(made.view(mx.uint16)).view(np.uint8)

    return Matrix(_made(weight, "BF16", (*out, groups * group), values), bias=bias)


def _rows(tensor: Tensor, a: int, b: int) -> Bytes:
    """Bytes of rows [a, b) of all matrices of a stack, one after the other."""
    *out, last = tensor.shape
    flat = Tensor(tensor.file, tensor.name, tensor.dtype, (math.prod(out), last), tensor.offset)
    return flat.rows(a, b).read()


def _wider(packed: Bytes, have: int, bits: int) -> Bytes:
    """Codes of ``have`` bits, of ``bits``: eight of them take as many bytes as one takes bits."""
    eight = np.zeros((packed.size // have, 8), np.uint8)
    eight[:, :have] = packed.reshape(-1, have)
    codes = eight.view("<u8")[:, 0]
    wide = np.zeros_like(codes)
    for i in range(8):
        wide |= (codes >> np.uint64(have * i) & np.uint64((1 << have) - 1)) << np.uint64(bits * i)
    return np.ascontiguousarray(wide[:, None].view(np.uint8)[:, :bits]).reshape(-1)


def _codes(packed: Bytes) -> Bytes:
    return np.ascontiguousarray(_FOUR[packed.view(np.uint16)].view(np.uint8).reshape(-1, 4)[:, :3]).reshape(
        -1
    )


def _steps(scales: Tensor, a: int, b: int, factor: float) -> Bytes:
    """factor * 2**(scale - 127) in bfloat16, by its bits: a power of two, or six."""
    exponents = _rows(scales, a, b)
    if exponents.max(initial=0) > LARGEST_SCALE:
        raise SourceError(
            f"{scales} has a scale of 2**{int(exponents.max()) - 127}; download the checkpoint again"
        )
    values = np.float32(factor) * np.exp2(exponents.astype(np.float32) - 127)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _made(source: Tensor, dtype: str, shape: Sequence[int], rows: Callable[[int, int], Bytes]) -> Tensor:
    return Tensor(
        _Rows(source, shape[-1] * DTYPE_BITS[dtype] // 8, rows), source.name, dtype, tuple(shape), 0
    )


class _Rows(SafetensorsFile):
    """An array whose rows are made of a tensor's, in the place of a file that holds nothing else."""

    def __init__(self, source: Tensor, row: int, rows: Callable[[int, int], Bytes]):
        self.path = source.file.path
        self._row, self._rows = row, rows

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        size = sum(buffer.nbytes for buffer in buffers)
        first, last = offset // self._row, -(-(offset + size) // self._row)
        data = self._rows(first, last).reshape(-1)[offset - first * self._row :]
        for buffer in buffers:
            buffer.cast("B")[:] = data[: buffer.nbytes].data
            data = data[buffer.nbytes :]

    def close(self) -> None:
        pass

    def forget(self) -> None:
        pass
