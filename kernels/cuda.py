"""The kernels on NVIDIA GPUs, compiled by ``nvrtc.py``. Contracts: :mod:`mlx_flashmoe.kernels`."""

from __future__ import annotations

from functools import partial

from mlx_flashmoe.kernels import gpu, nvrtc

LANGUAGE = gpu.Language(
    prelude="prelude.cuh",
    positions="""
const uint3 group = blockIdx;
const unsigned simdgroup = threadIdx.x / 32, lane = threadIdx.x % 32;
""",
    make_kernel=nvrtc.Kernel,
    # 40 KiB of shared memory hold the inputs of ten experts of the 397B at once.
    tiling=gpu.Tiling(
        gate_simdgroups=4,
        gate_rows=2,
        gate_spans=4,
        down_simdgroups=8,
        down_rows=2,
        down_spans=10,
        rows_simdgroups=8,
        tile=8,
        pair=2,
    ),
    prefer_matrix=True,
)

expert_ffn = partial(gpu.expert_ffn, LANGUAGE)
expert_rows = partial(gpu.expert_rows, LANGUAGE)
