"""The kernels on Apple GPUs, through ``mx.fast.metal_kernel``. Contracts: :mod:`mlx_flashmoe.kernels`.

Nothing is assumed about a chip but 32-wide SIMD groups and 32 KiB of threadgroup memory, of which half is
used, so that two threadgroups fit a core.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from mlx_flashmoe.kernels import gpu

LANGUAGE = gpu.Language(
    prelude="prelude.metal",
    positions="""
const uint3 group = threadgroup_position_in_grid;
const unsigned simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
""",
    make_kernel=mx.fast.metal_kernel,
    tiling=gpu.Tiling(
        gate_simdgroups=8,
        gate_rows=2,
        gate_spans=4,
        down_simdgroups=8,
        down_rows=2,
        down_spans=4,
        rows_simdgroups=8,
        tile=4,
        pair=2,
    ),
)

expert_ffn = partial(gpu.expert_ffn, LANGUAGE)
expert_rows = partial(gpu.expert_rows, LANGUAGE)
