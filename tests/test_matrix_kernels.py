"""kernels/expert_mma.h, the CUDA kernels on matrix instructions, executed by the emulation of tests/metal_emulator.

Only their text is checked here: addresses, lanes, sums, races. The instructions are emulated from their
description; CUDA itself is tested by test_cuda_kernels.py, on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import COMPILER, HERE, Job, Sparse, compile_kernels, record, run

from mlx_flashmoe.kernels import gpu, metal
from mlx_flashmoe.selftest.expert_cases import Experts, layout_of
from mlx_flashmoe.selftest.floats import decode, encode, error

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) to emulate with")

LAYOUTS = [
    layout_of(4 * 64, 3 * 64, 4, 64),
    layout_of(5 * 32, 3 * 32, 4, 32, "float32"),
    layout_of(3 * 128, 128, 4, 128, "float16"),
    layout_of(9 * 128, 5 * 64, 4, (128, 128, 64)),
    layout_of(40 * 32, 8 * 32, 4, 32),
]


@pytest.fixture
def language(tmp_path):
    """Metal as far as the generator of MLX goes, with CUDA's matrix functions."""
    prelude = tmp_path / "prelude"
    parts = [Path(gpu.__file__).parent / "prelude.metal", HERE / "matrix_prelude.metal"]
    prelude.write_text("".join(p.read_text() for p in parts))
    return replace(metal.LANGUAGE, prelude=str(prelude), prefer_matrix=True)


def slab_of(experts: Experts, places: np.ndarray) -> Sparse:
    size = experts.layout.blob_size
    return Sparse((int(places.max()) + 1) * size, {int(s) * size: b for s, b in zip(places, experts.blobs)})


def test_ffn(language, tmp_path) -> None:
    jobs, answers = [], []
    for seed, layout in enumerate(LAYOUTS):
        for tokens, top_k in ((1, 1), (3, 4)):
            rng = np.random.default_rng(seed)
            experts = Experts(layout, 5, seed)
            x = encode(rng.standard_normal((tokens, layout.hidden_size)), "bfloat16")
            which = np.stack([rng.permutation(5)[:top_k] for _ in range(tokens)])
            weights = rng.uniform(0.05, 1, which.shape).astype(np.float32)
            places = np.array([7, 0, 3, 2**33 // layout.blob_size, 4], np.int32)

            def call(language, x, slab, slots, weights, layout=layout):
                return gpu.expert_ffn(language, x, slab, slots, weights, layout, gpu.MATRIX)

            launches = record(
                language,
                call,
                mx.zeros(x.shape, mx.bfloat16),
                mx.zeros((1, layout.blob_size // 4), mx.uint32),
                mx.zeros(which.shape, mx.int32),
                mx.zeros(which.shape),
            )
            assert "ffn_gate_up" in launches[0].text
            slab = slab_of(experts, places)
            jobs.append(Job(launches, {"x": x, "slab": slab, "slots": places[which], "weights": weights}))
            answers.append(experts.ffn(decode(x), which, weights))
    libraries = compile_kernels((launch for job in jobs for launch in job.launches), tmp_path)
    for result, expected in zip(run(libraries, jobs), answers):
        assert error(decode(result["y"]), expected) < 5e-3  # half of it is y's own rounding
        assert np.isfinite(decode(result["h"])).all()


def test_rows(language, tmp_path) -> None:
    """Right, and a row's bits the same when its run is alone."""
    jobs, answers = [], []
    runs = (3, 8, 1, 21)
    for seed, layout in enumerate(LAYOUTS):
        rng = np.random.default_rng(seed)
        experts = Experts(layout, len(runs), seed)
        places = np.array([2, 5, 0, 9], np.int32)
        which = np.repeat(np.arange(len(runs)), runs)
        x = encode(rng.standard_normal((len(which), layout.hidden_size)), "bfloat16")
        answers.append(np.stack([experts.one(e, row) for e, row in zip(which, decode(x))]))
        for part in (slice(None), slice(11, 12), slice(12, None)):
            slots = places[which[part]]

            def call(language, x, slab, slots=slots, layout=layout):
                return gpu.expert_rows(language, x, slab, mx.array(slots), layout)

            slab = mx.zeros((1, layout.blob_size // 4), mx.uint32)
            launches = record(language, call, mx.zeros(x[part].shape, mx.bfloat16), slab)
            tiles = gpu.cut_into_tiles(slots, gpu.COLUMNS)
            jobs.append(Job(launches, {"x": x[part], "slab": slab_of(experts, places), "tiles": tiles}))
    libraries = compile_kernels((launch for job in jobs for launch in job.launches), tmp_path)
    results = [r["y"] for r in run(libraries, jobs)]
    for i, expected in enumerate(answers):
        whole, one, last = results[3 * i : 3 * i + 3]
        assert error(decode(whole), expected) < 5e-3
        assert np.array_equal(whole[11:12], one) and np.array_equal(whole[12:], last)
