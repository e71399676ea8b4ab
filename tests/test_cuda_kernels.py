"""The CUDA kernels, on the GPU that is there. Skipped where MLX has no CUDA.

Every result is compared with float64 arithmetic that shares no code with the kernels; outputs start as NaN.
With pytest-xdist (-n 12) the compilations, which take most of the time, run side by side.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashmoe.kernels import cuda, gpu
from mlx_flashmoe.layout import BITS, GROUP_SIZES
from mlx_flashmoe.selftest.expert_cases import TOLERANCE, Experts, layout_of
from mlx_flashmoe.selftest.floats import DTYPES, decode, encode, error, to_float64, to_mlx

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX finds no CUDA device")


def check_ffn(layout, dtype, formulation=None, tokens=1, top_k=3, count=5, seed=0) -> None:
    rng = np.random.default_rng(seed)
    experts = Experts(layout, count, seed)
    x = encode(rng.standard_normal((tokens, layout.hidden_size)), dtype)
    which = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)])
    weights = rng.uniform(0.05, 1, which.shape).astype(np.float32)
    arguments = (
        to_mlx(x),
        mx.array(experts.blobs.view(np.uint32)),
        mx.array(which.astype(np.int32)),
        mx.array(weights),
        layout,
    )
    y = cuda.expert_ffn(*arguments, formulation=formulation, init_value=float("nan"))
    assert error(to_float64(y), experts.ffn(decode(x), which, weights)) < TOLERANCE[dtype]
    again = [cuda.expert_ffn(*arguments, formulation=formulation) for _ in range(20)]
    assert all(mx.array_equal(y, other).item() for other in again), "the same call gave other bits"


def check_rows(layout, dtype, runs, formulation=None, seed=0) -> None:
    rng = np.random.default_rng(seed)
    experts = Experts(layout, len(runs), seed)
    which = np.repeat(rng.permutation(len(runs)), runs)
    x = encode(rng.standard_normal((len(which), layout.hidden_size)), dtype)
    slab, slots = mx.array(experts.blobs.view(np.uint32)), mx.array(which.astype(np.int32))
    y = cuda.expert_rows(to_mlx(x), slab, slots, layout, formulation, init_value=float("nan"))
    expected = np.stack([experts.one(e, row) for e, row in zip(which, decode(x))])
    assert error(to_float64(y), expected) < TOLERANCE[dtype]
    start = 0
    for count in runs:  # a run by itself: the same bits
        stop = start + count
        alone = cuda.expert_rows(to_mlx(x)[start:stop], slab, slots[start:stop], layout, formulation)
        assert mx.array_equal(y[start:stop], alone).item()
        start = stop


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_configuration(bits: int, group_size: int, dtype: str) -> None:
    scales = list(DTYPES)[(bits + group_size // 32) % 3]
    layout = layout_of(group_size * 11, group_size * 3, bits, group_size, scales)
    for formulation in gpu.FORMULATIONS:
        check_ffn(layout, dtype, formulation, tokens=2)
    check_rows(layout, dtype, (1, 9, 5, 17))


@pytest.mark.parametrize("group_sizes", [32, 64, 128, (128, 128, 64)])
def test_matrix(group_sizes) -> None:
    layout = layout_of(9 * 128, 5 * 128, 4, group_sizes)
    for tokens, top_k in ((1, 1), (1, 4), (5, 4)):
        check_ffn(layout, "bfloat16", gpu.MATRIX, tokens, top_k)
    check_rows(layout, "bfloat16", (1, 9, 5, 17), gpu.MATRIX)


def test_matrix_true_shape() -> None:
    layout = layout_of(4096, 1024, 4, 64)
    check_ffn(layout, "bfloat16", gpu.MATRIX, 4, 10, count=12)
    check_rows(layout, "bfloat16", (5, 1, 40, 8), gpu.MATRIX)


@pytest.mark.parametrize("tokens,top_k", [(1, 1), (1, 10), (4, 4), (16, 10)])
def test_true_shape(tokens: int, top_k: int) -> None:
    check_ffn(layout_of(4096, 1024, 4, 64), "bfloat16", tokens=tokens, top_k=top_k, count=12)


def test_rows_true_shape() -> None:
    check_rows(layout_of(4096, 1024, 4, 64), "bfloat16", (5, 1, 40, 8))


def test_wide_inputs() -> None:
    """More inputs than shared memory holds at once."""
    check_ffn(layout_of(9248, 1120, 4, 32), "float32", top_k=11, count=12)


def test_mixed_and_unquantized() -> None:
    dtypes = {"gate": "float16", "up": "float32", "down": "bfloat16"}
    for layout in (
        layout_of(256, 384, (4, 3, 6), (64, 32, 128), dtypes),
        layout_of(256, 384, (8, 16, 2), (32, 32, 64), dtypes),
        layout_of(96, 160, 16, 0, "bfloat16"),
        layout_of(96, 160, 16, 0, "float16"),
        layout_of(96, 160, 16, 0, "float32"),
    ):
        check_ffn(layout, "float32", tokens=2)
        check_rows(layout, "float32", (3, 5))
    # Inputs no multiple of 32 are left to the reference, whose float32 products are TF32 on this device.
    check_ffn(layout_of(100, 60, 16, 0), "bfloat16", tokens=2)


def test_slots_beyond_4_gib() -> None:
    layout = layout_of(4096, 1024, 4, 64)
    far = 5 * 2**30 // layout.blob_size
    experts = Experts(layout, 2, 0)
    slab = mx.zeros((far + 2, layout.blob_size // 4), mx.uint32)
    slab[far - 3] = mx.array(experts.blobs[0].view(np.uint32))
    slab[far] = mx.array(experts.blobs[1].view(np.uint32))
    x = np.random.default_rng(0).standard_normal((1, 4096)).astype(np.float32)
    slots, weights = np.array([[far - 3, far]], np.int32), np.array([[0.25, 0.75]], np.float32)
    y = cuda.expert_ffn(mx.array(x), slab, mx.array(slots), mx.array(weights), layout)
    expected = experts.ffn(x.astype(np.float64), np.array([[0, 1]]), weights)
    assert error(to_float64(y), expected) < TOLERANCE["float32"]
    rows = cuda.expert_rows(mx.array(x), slab, mx.array(slots[0, 1:]), layout)
    assert error(to_float64(rows), experts.one(1, x.astype(np.float64))) < TOLERANCE["float32"]
