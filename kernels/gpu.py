"""The experts' GPU kernels, whatever the GPU: their text, their launches, their scratch.

``expert_common.h``, ``expert_ffn.h`` and ``expert_rows.h`` hold the algorithm, ``prelude.metal`` and
``prelude.cuh`` the words of each language. This
module writes the constants of one blob layout in front of them, and launches what MLX compiles. Two launches
either way: gate, up and SwiGLU into a float32 scratch; then down, for expert_ffn with the weighted sum over
the experts. Every sum has a fixed order and there are no atomics: same inputs, same bits.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import reference
from mlx_flashmoe.layout import ITEMSIZE, BlobLayout, Projection

FORMULATIONS = ("naive", "fma", "grouped")
DEFAULT_FORMULATION = "grouped"
MATRIX = "matrix"  # the formulation of expert_mma.h: "grouped" on matrix instructions
CHUNK = 32
SPAN = 1024  # floats: one chunk for each of 32 lanes
PANEL = 16  # weight rows of a matrix instruction
COLUMNS = 8  # and rows of x
TYPES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}
MOST_ROWS = 16  # that expert_ffn is made for
MOST_TILES = 65535  # CUDA's limit on a grid's second dimension


@dataclass(frozen=True)
class Tiling:
    """How work is cut. Never changes what is computed, only how fast.

    Attributes:
        gate_simdgroups, down_simdgroups, rows_simdgroups: of a threadgroup, in each launch of expert_ffn and in
            both of expert_rows; it has 32 times as many threads.
        gate_rows, down_rows: weight rows a SIMD group takes in the two launches of expert_ffn.
        gate_spans, down_spans: spans of 4 KiB of inputs held in threadgroup memory at once.
        tile: rows of x that share one reading of the weights in expert_rows; 4 KiB of threadgroup memory each.
        pair: weight rows of each of two matrices that a SIMD group takes in expert_rows.
        matrix_gate, matrix_down, matrix_rows: SIMD groups of a threadgroup where matrix instructions are used.
    """

    gate_simdgroups: int
    gate_rows: int
    gate_spans: int
    down_simdgroups: int
    down_rows: int
    down_spans: int
    rows_simdgroups: int
    tile: int
    pair: int
    matrix_gate: int = 4
    matrix_down: int = 8
    matrix_rows: int = 4


@dataclass(frozen=True)
class Language:
    """What tells Metal from CUDA on this side. ``prefer_matrix``: MATRIX serves expert_rows where it can."""

    prelude: str
    positions: str
    make_kernel: Callable[..., Any]
    tiling: Tiling
    prefer_matrix: bool = False


def backend() -> ModuleType | None:
    """The module whose kernels run on the current device; None for a CPU."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return None
    return import_module("mlx_flashmoe.kernels." + ("metal" if mx.metal.is_available() else "cuda"))


def current() -> Language | None:
    """That of the current device; None for a CPU."""
    module = backend()
    return None if module is None else module.LANGUAGE


def for_rows(x: mx.array) -> Language | None:
    """``current`` for a kernel that takes one row of x [..., D] after the other; None where they are too many."""
    return current() if x.size <= MOST_TILES * x.shape[-1] else None


def make(
    language: Language, name: str, inputs: list[str], outputs: list[str], source: str, header: str
) -> Any:
    """A kernel whose name tells of its text: on Metal MLX compiles anew whenever a name's text changes."""
    source = language.positions + source
    name = f"flashmoe_{name}_{zlib.crc32((header + source).encode()):08x}"
    return language.make_kernel(name, inputs, outputs, source, header)


def row_kernel(
    language: Language,
    name: str,
    inputs: list[str],
    outputs: list[str],
    source: str,
    dtype: mx.Dtype,
    **constants: float,
) -> Any:
    """A kernel over rows of activations, with the words of ``rows.h``, its ``constants``, and T for ``dtype``."""
    whole = {k: v for k, v in constants.items() if isinstance(v, int)}
    lines = [
        _read(language.prelude),
        f"typedef fm_{TYPES[dtype]} T;",
        "enum : unsigned { " + ", ".join(f"{k} = {v}" for k, v in whole.items()) + " };",
        *(f"#define {k} {v!r}f" for k, v in constants.items() if k not in whole),
        _read("rows.h"),
    ]
    return make(language, name, inputs, outputs, source, "\n".join(lines))


def fuses(layout: BlobLayout) -> bool:
    """Tells whether the kernels support these experts: SwiGLU, without linear biases."""
    return layout.gate is not None and not layout.biased


def supports(layout: BlobLayout) -> bool:
    """Unquantized matrices whose inputs are no multiple of 32 are left to the reference."""
    return fuses(layout) and all(p.in_dims % CHUNK == 0 for p in layout.projections.values())


def supports_matrix(layout: BlobLayout, dtype: mx.Dtype) -> bool:
    """Whether expert_mma.h serves: 4 bits throughout, bfloat16 activations, gate and up in groups of one size."""
    return (
        dtype == mx.bfloat16
        and fuses(layout)
        and all(p.bits == 4 for p in layout.projections.values())
        and layout.projections["gate"].group_size == layout.up.group_size
    )


def _struct(name: str, p: Projection) -> str:
    words = p.weight.shape[1] * ITEMSIZE[p.weight.dtype] * CHUNK // (4 * p.in_dims)
    constants = {
        "quantized": int(p.scales is not None),
        "bits": p.bits,
        "rows": p.out_dims,
        "group_size": p.group_size or CHUNK,
        "groups": p.in_dims // (p.group_size or CHUNK),
        "is_float32": int(p.weight.dtype == "float32"),
        "is_bfloat16": int(p.weight.dtype == "bfloat16"),
        "words": words,
        "row_words": p.in_dims // CHUNK * words,
        "weight": p.weight.offset,
        "scales": p.scales.offset if p.scales else 0,
        "biases": p.biases.offset if p.biases else 0,
    }
    text = ", ".join(f"{k} = {v}" for k, v in constants.items())
    scale = p.scales.dtype if p.scales else "float32"
    return f"struct {name} {{ typedef fm_{scale} Scale; enum : unsigned {{ {text} }}; }};"


def _read(name: str) -> str:
    """A source file without comments and indentation: MLX copies and hashes the text at every launch."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    lines = (re.sub(r"//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _header(language: Language, layout: BlobLayout, formulation: str, top_k: int, body: str) -> str:
    t = language.tiling
    constants = {
        **{f.upper(): i for i, f in enumerate(FORMULATIONS)},
        "FORMULATION": FORMULATIONS.index(DEFAULT_FORMULATION if formulation == MATRIX else formulation),
        "HIDDEN": layout.hidden_size,
        "INTERMEDIATE": layout.intermediate_size,
        "TOP_K": top_k,
        "H_ROW": _spans(top_k * layout.intermediate_size),
        "GATE_SIMDGROUPS": t.gate_simdgroups,
        "GATE_ROWS": t.gate_rows,
        "GATE_SPANS": min(t.gate_spans, _spans(layout.hidden_size) // SPAN),
        "DOWN_SIMDGROUPS": t.down_simdgroups,
        "DOWN_ROWS": t.down_rows,
        "DOWN_SPANS": min(t.down_spans, _spans(top_k * layout.intermediate_size) // SPAN),
        "ROWS_SIMDGROUPS": t.rows_simdgroups,
        "TILE": t.tile,
        "PAIR": t.pair,
        "MATRIX_GATE_SIMDGROUPS": t.matrix_gate,
        "MATRIX_DOWN_SIMDGROUPS": t.matrix_down,
        "MATRIX_ROWS_SIMDGROUPS": t.matrix_rows,
    }
    lines = [
        _read(language.prelude),
        *(_struct(n.capitalize(), p) for n, p in layout.projections.items()),
        "enum : unsigned { " + ", ".join(f"{k} = {v}" for k, v in constants.items()) + " };",
        f"enum : size_t {{ BLOB_SIZE = {layout.blob_size} }};",
        _read("expert_common.h"),
        _read(body),
    ]
    return "\n".join(lines)


def _spans(count: int) -> int:
    """count, rounded up to whole spans."""
    return -(-count // SPAN) * SPAN


# The bodies. `group` is the threadgroup's position in the grid.
_GATE_UP = """
FM_ARRAY float4 staged[GATE_SPANS * SPAN / 4];
const unsigned token = group.y / TOP_K, k = group.y % TOP_K;
gate_up(
    x + token * HIDDEN,
    (const FM_DEVICE unsigned char*)slab + size_t(slots[group.y]) * BLOB_SIZE,
    k, h + token * H_ROW, (FM_SHARED float*)staged, group.x, simdgroup, lane);
"""
_DOWN_COMBINE = """
FM_ARRAY float4 staged[DOWN_SPANS * SPAN / 4];
FM_ARRAY int my_slots[TOP_K];
FM_ARRAY float my_weights[TOP_K];
for (unsigned k = simdgroup * LANES + lane; k < TOP_K; k += DOWN_SIMDGROUPS * LANES) {
  my_slots[k] = slots[group.y * TOP_K + k];
  my_weights[k] = weights[group.y * TOP_K + k];
}
fm_barrier();
down_combine(
    h + group.y * H_ROW, (const FM_DEVICE unsigned char*)slab, my_slots, my_weights,
    y + group.y * HIDDEN, (FM_SHARED float*)staged, group.x, simdgroup, lane);
"""
_ROWS_GATE_UP = """
FM_ARRAY float4 staged[TILE * SPAN / 4];
const size_t first = tiles[3 * group.y];
rows_gate_up(
    x + first * HIDDEN,
    (const FM_DEVICE unsigned char*)slab + size_t(tiles[3 * group.y + 2]) * BLOB_SIZE,
    unsigned(tiles[3 * group.y + 1]), h + first * H_ROW, (FM_SHARED float*)staged, group.x, simdgroup, lane);
"""
_ROWS_DOWN = """
FM_ARRAY float4 staged[TILE * SPAN / 4];
const size_t first = tiles[3 * group.y];
rows_down(
    h + first * H_ROW,
    (const FM_DEVICE unsigned char*)slab + size_t(tiles[3 * group.y + 2]) * BLOB_SIZE,
    unsigned(tiles[3 * group.y + 1]), y + first * HIDDEN, (FM_SHARED float*)staged, group.x, simdgroup, lane);
"""
_MATRIX_GATE_UP = """
FM_ARRAY float partial[8 * LANES * MATRIX_GATE_SIMDGROUPS];
const size_t token = group.y / TOP_K;
ffn_gate_up(
    x + token * HIDDEN,
    (const FM_DEVICE unsigned char*)slab + size_t(slots[group.y]) * BLOB_SIZE,
    group.y % TOP_K, h + token * (2 * TOP_K * INTERMEDIATE), partial, group.x, simdgroup, lane);
"""
_MATRIX_DOWN = """
FM_ARRAY float partial[4 * LANES * MATRIX_DOWN_SIMDGROUPS];
FM_ARRAY int my_slots[TOP_K];
FM_ARRAY float my_weights[TOP_K];
for (unsigned k = simdgroup * LANES + lane; k < TOP_K; k += MATRIX_DOWN_SIMDGROUPS * LANES) {
  my_slots[k] = slots[group.y * TOP_K + k];
  my_weights[k] = weights[group.y * TOP_K + k];
}
fm_barrier();
ffn_down(
    h + size_t(group.y) * (2 * TOP_K * INTERMEDIATE), (const FM_DEVICE unsigned char*)slab, my_slots,
    my_weights, y + group.y * HIDDEN, partial, group.x, simdgroup, lane);
"""
_MATRIX_ROWS_GATE_UP = """
const size_t first = tiles[3 * group.y];
rows_gate_up(
    x + first * HIDDEN,
    (const FM_DEVICE unsigned char*)slab + size_t(tiles[3 * group.y + 2]) * BLOB_SIZE,
    unsigned(tiles[3 * group.y + 1]), h + first * (2 * INTERMEDIATE),
    group.x * MATRIX_ROWS_SIMDGROUPS + simdgroup, lane);
"""
_MATRIX_ROWS_DOWN = """
const size_t first = tiles[3 * group.y];
rows_down(
    h + first * (2 * INTERMEDIATE),
    (const FM_DEVICE unsigned char*)slab + size_t(tiles[3 * group.y + 2]) * BLOB_SIZE,
    unsigned(tiles[3 * group.y + 1]), y + first * HIDDEN,
    group.x * MATRIX_ROWS_SIMDGROUPS + simdgroup, lane);
"""


# Text and bodies of the two launches, by formulation. expert_rows has two of them.
_FFN = {name: ("expert_ffn.h", _GATE_UP, _DOWN_COMBINE) for name in FORMULATIONS}
_FFN[MATRIX] = ("expert_mma.h", _MATRIX_GATE_UP, _MATRIX_DOWN)
_ROWS = {
    DEFAULT_FORMULATION: ("expert_rows.h", _ROWS_GATE_UP, _ROWS_DOWN),
    MATRIX: ("expert_mma.h", _MATRIX_ROWS_GATE_UP, _MATRIX_ROWS_DOWN),
}


@cache
def _ffn_kernels(language: Language, layout: BlobLayout, formulation: str, top_k: int) -> tuple[Any, Any]:
    text, gate_up, down = _FFN[formulation]
    header = _header(language, layout, formulation, top_k, text)
    return (
        make(language, "gate_up", ["x", "slab", "slots"], ["h"], gate_up, header),
        make(language, "down", ["h", "slab", "slots", "weights"], ["y"], down, header),
    )


@cache
def _rows_kernels(language: Language, layout: BlobLayout, formulation: str) -> tuple[Any, Any]:
    text, gate_up, down = _ROWS[formulation]
    header = _header(language, layout, formulation, 1, text)
    return (
        make(language, "rows_gate_up", ["x", "slab", "tiles"], ["h"], gate_up, header),
        make(language, "rows_down", ["h", "slab", "tiles"], ["y"], down, header),
    )


def best_for_rows(language: Language, layout: BlobLayout, dtype: mx.Dtype) -> str:
    """The formulation expert_rows takes when none is asked for; expert_ffn always takes DEFAULT_FORMULATION."""
    if language.prefer_matrix and supports_matrix(layout, dtype):
        return MATRIX
    return DEFAULT_FORMULATION


def expert_ffn(
    language: Language,
    x: mx.array,
    slab: mx.array,
    slots: mx.array,
    weights: mx.array,
    layout: BlobLayout,
    formulation: str | None = None,
    **launch: Any,
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_ffn`.

    Args:
        formulation: one of FORMULATIONS, or on CUDA MATRIX where supports_matrix() is true; None takes
            DEFAULT_FORMULATION.
        launch: passed on to MLX's kernels (``verbose``, ``init_value``, ``stream``).
    """
    if not supports(layout):
        return reference.expert_ffn(x, slab, slots, weights, layout)
    tokens, top_k = slots.shape
    formulation = formulation or DEFAULT_FORMULATION
    gate_up, down = _ffn_kernels(language, layout, formulation, top_k)
    t = language.tiling
    held = top_k * layout.intermediate_size
    if formulation == MATRIX:
        h_shape: tuple[int, ...] = (tokens, 2, held)
        h_dtype = mx.bfloat16
        threadgroups = (t.matrix_gate, PANEL), (t.matrix_down, PANEL)
    else:
        h_shape, h_dtype = (tokens, _spans(held)), mx.float32
        threadgroups = (
            (t.gate_simdgroups, t.gate_simdgroups * t.gate_rows),
            (t.down_simdgroups, t.down_simdgroups * t.down_rows),
        )
    slots = slots.astype(mx.int32)
    (h,) = gate_up(
        inputs=[x, slab, slots],
        output_shapes=[h_shape],
        output_dtypes=[h_dtype],
        **_grid(*threadgroups[0], layout.intermediate_size, tokens * top_k),
        **launch,
    )
    (y,) = down(
        inputs=[h, slab, slots, weights.astype(mx.float32)],
        output_shapes=[(tokens, layout.hidden_size)],
        output_dtypes=[x.dtype],
        **_grid(*threadgroups[1], layout.hidden_size, tokens),
        **launch,
    )
    return y


def expert_outputs(
    language: Language,
    x: mx.array,
    slab: mx.array,
    slots: mx.array,
    layout: BlobLayout,
    formulation: str | None = None,
    **launch: Any,
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_outputs`: expert_ffn with one expert a row, a few rows at once."""
    tokens, top_k = slots.shape
    rows, chosen = mx.repeat(x, top_k, axis=0), slots.reshape(-1, 1)
    ones = mx.ones(chosen.shape)
    pairs = []
    for start in range(0, tokens * top_k, MOST_ROWS):
        some = slice(start, start + MOST_ROWS)
        y = expert_ffn(language, rows[some], slab, chosen[some], ones[some], layout, formulation, **launch)
        pairs.append(y)
    return mx.concatenate(pairs).reshape(tokens, top_k, -1)


def expert_rows(
    language: Language,
    x: mx.array,
    slab: mx.array,
    slots: mx.array,
    layout: BlobLayout,
    formulation: str | None = None,
    **launch: Any,
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_rows`. A row's arithmetic is the same whatever rows are beside it.

    Args:
        formulation: DEFAULT_FORMULATION, or MATRIX as for expert_ffn; None takes best_for_rows().
        launch: passed on to MLX's kernels.
    """
    if not supports(layout):
        return reference.expert_rows(x, slab, slots, layout)
    formulation = formulation or best_for_rows(language, layout, x.dtype)
    t = language.tiling
    tiles = cut_into_tiles(np.asarray(slots), COLUMNS if formulation == MATRIX else t.tile)
    count = x.shape[0]
    if not count:
        return mx.zeros((0, layout.hidden_size), dtype=x.dtype)
    if len(tiles) > MOST_TILES:
        cut = int(tiles[MOST_TILES, 0])
        parts = [(x[:cut], slots[:cut]), (x[cut:], slots[cut:])]
        return mx.concatenate(
            [expert_rows(language, a, slab, b, layout, formulation, **launch) for a, b in parts]
        )
    gate_up, down = _rows_kernels(language, layout, formulation)
    if formulation == MATRIX:
        h_shape: tuple[int, ...] = (count, 2, layout.intermediate_size)
        h_dtype = mx.bfloat16
        threadgroups = ((t.matrix_rows, t.matrix_rows * PANEL),) * 2
    else:
        h_shape, h_dtype = (count, _spans(layout.intermediate_size)), mx.float32
        threadgroups = (
            (t.rows_simdgroups, t.rows_simdgroups * t.pair),
            (t.rows_simdgroups, t.rows_simdgroups * 2 * t.pair),
        )
    listed = mx.array(tiles)
    (h,) = gate_up(
        inputs=[x, slab, listed],
        output_shapes=[h_shape],
        output_dtypes=[h_dtype],
        **_grid(*threadgroups[0], layout.intermediate_size, len(tiles)),
        **launch,
    )
    (y,) = down(
        inputs=[h, slab, listed],
        output_shapes=[(count, layout.hidden_size)],
        output_dtypes=[x.dtype],
        **_grid(*threadgroups[1], layout.hidden_size, len(tiles)),
        **launch,
    )
    return y


def cut_into_tiles(slots: np.ndarray, tile: int) -> np.ndarray:
    """Runs of equal slots, cut into pieces of at most `tile` rows: int32 [tiles, 3] of (first row, rows, slot)."""
    starts = np.flatnonzero(np.diff(slots, prepend=-1))
    lengths = np.diff(starts, append=len(slots))
    pieces = -(-lengths // tile)
    run = np.repeat(np.arange(len(starts)), pieces)
    within = (np.arange(len(run)) - (np.cumsum(pieces) - pieces)[run]) * tile
    columns = [starts[run] + within, np.minimum(lengths[run] - within, tile), slots[starts[run]]]
    return np.stack(columns, axis=1).astype(np.int32)


def _grid(simdgroups: int, each: int, rows: int, count: int) -> dict[str, tuple[int, int, int]]:
    """Threadgroups of `simdgroups`, each taking `each` of `rows` weight rows; `count` times that."""
    threads = 32 * simdgroups
    return {"grid": (-(-rows // each) * threads, count, 1), "threadgroup": (threads, 1, 1)}
