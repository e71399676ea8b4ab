"""Matrices in formats that cannot be kept are kept in others, with exactly their values."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashmoe.convert import exact
from mlx_flashmoe.convert.binding import Matrix
from mlx_flashmoe.convert.safetensors import SafetensorsFile, Tensor
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import Quantization

SHAPE = (3, 6, 64)
RNG = np.random.default_rng(0)


def values(matrix: Matrix) -> np.ndarray:
    """In float32, by MLX's own arithmetic."""

    def array(tensor: Tensor) -> mx.array:
        kind, carrier = (mx.uint32, np.uint32) if tensor.dtype == "U32" else (mx.bfloat16, np.uint16)
        return mx.array(tensor.read().view(carrier).reshape(tensor.shape)).view(kind)

    if not matrix.quantization.quantized:
        return np.asarray(array(matrix.weight).astype(mx.float32))
    scales, biases = (array(t).astype(mx.float32) for t in (matrix.scales, matrix.biases))
    q = matrix.quantization
    return np.asarray(mx.dequantize(array(matrix.weight), scales, biases, q.group_size, q.bits))


def random(mode: str) -> dict[str, mx.array]:
    """Every code that there is, and scales from small to large."""
    bits, group = exact.MODES[mode]
    codes = RNG.integers(0, 1 << 32, (*SHAPE[:2], SHAPE[2] * bits // 32), dtype=np.uint32)
    if mode == "mxfp8":
        codes[(codes.view(np.uint8).reshape(*codes.shape, 4) & 0x7F == 0x7F).any(-1)] = 0x12345678
    most = {"mxfp4": exact.LARGEST_SCALE, "mxfp8": 240, "nvfp4": 0x7E}[mode]
    scales = RNG.integers(
        20 if mode == "mxfp8" else 0, most + 1, (*SHAPE[:2], SHAPE[2] // group), dtype=np.uint8
    )
    return {"weight": mx.array(codes), "scales": mx.array(scales)}


def saved(folder: Path, files: dict[str, dict[str, mx.array]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, arrays in files.items():
        mx.save_safetensors(str(folder / name), arrays)
        found |= SafetensorsFile(folder / name).tensors
    return found


@pytest.mark.parametrize("mode", exact.MODES)
@pytest.mark.parametrize("apart", [False, True], ids=["in one file", "in two"])
def test_values_are_exactly_the_same(tmp_path: Path, mode: str, apart: bool) -> None:
    arrays = random(mode)
    files = {f"{n}.safetensors": {n: a} for n, a in arrays.items()} if apart else {"one.safetensors": arrays}
    tensors = saved(tmp_path, files)
    want = np.asarray(mx.dequantize(arrays["weight"], arrays["scales"], mode=mode, dtype=mx.float32))

    matrix = exact.kept(mode, tensors["weight"], tensors["scales"], None)
    assert matrix.in_dims == SHAPE[2]
    np.testing.assert_array_equal(values(matrix), want)
    for e in range(SHAPE[0]):
        np.testing.assert_array_equal(values(matrix.at(e)), want[e])
        np.testing.assert_array_equal(values(matrix.at(e).rows(1, 4)), want[e, 1:4])
        one = exact.kept(mode, tensors["weight"].at(e), tensors["scales"].at(e), None)
        np.testing.assert_array_equal(values(one), want[e])
    np.testing.assert_array_equal(values(matrix.rows(1, 3)), want[1:3])


@pytest.mark.parametrize(("bits", "wider"), [(1, 2), (4, 4), (5, 6)])
@pytest.mark.parametrize("group", [32, 64])
def test_affine_values_at_other_bits_are_exactly_the_same(
    tmp_path: Path, bits: int, wider: int, group: int
) -> None:
    quantized = mx.quantize(mx.array(RNG.standard_normal(SHAPE).astype(np.float32)), group, bits)
    arrays = dict(
        zip(("weight", "scales", "biases"), (quantized[0], *(a.astype(mx.bfloat16) for a in quantized[1:])))
    )
    tensors = saved(tmp_path, {"one.safetensors": arrays})
    matrix = exact.widened(Matrix(**tensors, quantization=Quantization(bits, group)))
    assert matrix.quantization == Quantization(wider, group) and matrix.in_dims == SHAPE[2]
    scales, biases = (arrays[n].astype(mx.float32) for n in ("scales", "biases"))
    want = np.asarray(mx.dequantize(arrays["weight"], scales, biases, group, bits))
    np.testing.assert_array_equal(values(matrix), want)
    np.testing.assert_array_equal(values(matrix.at(2).rows(2, 5)), want[2, 2:5])


def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    arrays = random("mxfp4")
    arrays["scales"][1, 2, 0] = 255
    tensors = saved(tmp_path, {"one.safetensors": arrays})
    matrix = exact.kept("mxfp4", tensors["weight"], tensors["scales"], None)
    values(matrix.at(0))
    with pytest.raises(SourceError, match="'scales' has a scale"):
        values(matrix.at(1))
