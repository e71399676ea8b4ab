"""Measures which formulation and which cut of the work a GPU computes fastest, for one layout of experts.

Each launch is varied alone and compared with the language's own choice, in rounds of random order. A variant is chosen
if it is faster on average and no slower at any number of tokens; otherwise the language's own choice stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from time import perf_counter
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import gpu
from mlx_flashmoe.layout import BlobLayout

TOKENS = (1, 4, 16)
RUN = (
    5  # rows of an expert in a measurement of expert_rows; a prompt of 256 has as many with 10 of 512 experts
)
CALLS = 6  # in a row, each on the result of the one before
ROUNDS = 9
LEAST_GAIN = 0.97  # of the time, on average
MOST_LOSS = 1.02  # of the time, at any number of tokens

V = TypeVar("V", bound=Hashable)


class Launch:
    """A measurement: calling it gives the seconds that ``build``'s graph takes, to build and to compute."""

    def __init__(self, build: Callable[[], mx.array]):
        self.build = build

    def __call__(self) -> float:
        started = perf_counter()
        mx.eval(self.build())
        return perf_counter() - started


def tune(
    language: gpu.Language, slab: mx.array, layout: BlobLayout, dtype: mx.Dtype, top_k: int
) -> tuple[str, str, gpu.Tiling]:
    """Returns the fastest formulations of expert_ffn and expert_rows, and the fastest tiling, on the current device.

    Args:
        slab: uint32 [slots, blob_size / 4], better more than the device's caches hold.
        dtype: of the activations.
        top_k: experts of a token; at most as many as there are slots.
    """
    formulations = [*gpu.FORMULATIONS]
    if language.prefer_matrix and gpu.supports_matrix(layout, dtype):
        formulations.append(gpu.MATRIX)

    def ffn(formulation: str, tiling: gpu.Tiling) -> list[Launch]:
        return _ffn(replace(language, tiling=tiling), slab, layout, dtype, top_k, formulation)

    def rows(formulation: str, tiling: gpu.Tiling) -> list[Launch]:
        return [_rows(replace(language, tiling=tiling), slab, layout, dtype, formulation)]

    tiling = language.tiling
    best = fastest(gpu.DEFAULT_FORMULATION, formulations, lambda f: ffn(f, tiling))
    for tilings in (gate_tilings(best), down_tilings(best)):
        # Each is a change to the tiling found so far.
        tiling = fastest(tiling, [replace(tiling, **change) for change in tilings], lambda t: ffn(best, t))
    own = gpu.best_for_rows(language, layout, dtype)
    both = [own] if own == gpu.DEFAULT_FORMULATION else [own, gpu.DEFAULT_FORMULATION]
    ways = [(f, replace(tiling, **change)) for f in both for change in ({}, *rows_tilings(f))]
    best_rows, tiling = fastest((own, tiling), ways, lambda way: rows(*way))
    return best, best_rows, tiling


def gate_tilings(formulation: str) -> list[dict[str, int]]:
    """Changes to a tiling that cut the first launch of expert_ffn otherwise."""
    if formulation == gpu.MATRIX:
        return [{"matrix_gate": n} for n in (2, 8)]
    return [{"gate_simdgroups": n, "gate_rows": r} for n, r in _CUTS]


def down_tilings(formulation: str) -> list[dict[str, int]]:
    """Changes to a tiling that cut the second launch of expert_ffn otherwise."""
    if formulation == gpu.MATRIX:
        return [{"matrix_down": n} for n in (4, 16)]
    return [{"down_simdgroups": n, "down_rows": r} for n, r in _CUTS]


def rows_tilings(formulation: str) -> list[dict[str, int]]:
    """Changes to a tiling that cut expert_rows otherwise."""
    if formulation == gpu.MATRIX:
        return [{"matrix_rows": n} for n in (2, 8)]
    return [{"rows_simdgroups": n, "tile": tile} for n in (4, 8) for tile in (4, 8)]


_CUTS = ((4, 1), (4, 2), (8, 1), (8, 2), (4, 4))  # SIMD groups of a threadgroup, rows of a SIMD group


def fastest(own: V, ways: Iterable[V], launches: Callable[[V], list[Launch]]) -> V:
    """Returns the way whose launches take the least time: ``own`` unless another is clearly faster.

    Args:
        launches: the measurements of a way, the same number for each; each returns seconds.
    """
    of = {way: launches(way) for way in dict.fromkeys([own, *ways])}
    if not mx.metal.is_available():  # building a graph compiles its kernels: here side by side
        with ThreadPoolExecutor() as pool:
            list(pool.map(_compile, of.values()))
    of = {way: each for way, each in of.items() if _runs(each)}
    if own not in of:
        return own
    best = better(own, _measure(of))
    # Measured once more, by itself: of many ways one is fast by chance.
    return best if best == own else better(own, _measure({own: of[own], best: of[best]}))


def _compile(launches: list[Launch]) -> None:
    """Builds graphs and drops them: MLX evaluates a graph only where it was built. Errors show in ``_runs``."""
    with suppress(Exception):
        for launch in launches:
            launch.build()


def _runs(launches: list[Launch]) -> bool:
    """Tells whether the kernels compile and run: the device may lack registers or threadgroup memory."""
    try:
        for launch in launches:
            launch()
    except Exception:  # whatever it is, this way is not to be gone
        return False
    return True


def _measure(of: dict[V, list[Launch]]) -> dict[V, list[float]]:
    """The median seconds of each way's launches."""
    taken: dict[V, list[list[float]]] = {way: [[] for _ in each] for way, each in of.items()}
    rng = np.random.default_rng(0)
    ways = list(of)
    for _ in range(ROUNDS):
        for i in rng.permutation(len(ways)):
            for seconds, launch in zip(taken[ways[i]], of[ways[i]], strict=True):
                seconds.append(launch())
    return {way: [statistics.median(each) for each in seconds] for way, seconds in taken.items()}


def better(own: V, seconds: dict[V, list[float]]) -> V:
    """Returns the way with the least time relative to ``own``, if it gains on average and loses nowhere."""
    ratios = {
        way: [a / b for a, b in zip(taken, seconds[own], strict=True)] for way, taken in seconds.items()
    }
    gains = {way: statistics.geometric_mean(r) for way, r in ratios.items() if max(r) <= MOST_LOSS}
    least = min(gains, key=lambda way: gains[way], default=own)
    return least if gains.get(least, 1.0) <= LEAST_GAIN else own


def _ffn(
    language: gpu.Language,
    slab: mx.array,
    layout: BlobLayout,
    dtype: mx.Dtype,
    top_k: int,
    formulation: str,
) -> list[Launch]:
    def measure(tokens: int) -> Launch:
        weights = mx.full((tokens, top_k), 1 / top_k)
        turns = _turns(slab.shape[0], tokens, top_k)
        activations = _activations(tokens, layout, dtype)

        def build() -> mx.array:
            x = activations
            for slots in turns:
                x = gpu.expert_ffn(language, x, slab, slots, weights, layout, formulation)
            return x

        return Launch(build)

    return [measure(tokens) for tokens in TOKENS]


def _rows(
    language: gpu.Language, slab: mx.array, layout: BlobLayout, dtype: mx.Dtype, formulation: str
) -> Launch:
    slots = mx.array(np.repeat(np.arange(slab.shape[0], dtype=np.int32), RUN))
    x = _activations(slots.size, layout, dtype)
    mx.eval(slots)
    return Launch(lambda: gpu.expert_rows(language, x, slab, slots, layout, formulation))


def _turns(slots: int, tokens: int, top_k: int) -> list[mx.array]:
    """int32 [tokens, top_k] for each of ``CALLS`` calls, going round the slots in an order that is not theirs."""
    order = np.random.default_rng(1).permutation(slots)
    each = tokens * top_k
    turns = [
        mx.array(order[(i * each + np.arange(each)) % slots].reshape(tokens, top_k).astype(np.int32))
        for i in range(CALLS)
    ]
    mx.eval(turns)
    return turns


def _activations(rows: int, layout: BlobLayout, dtype: mx.Dtype) -> mx.array:
    x = mx.full((rows, layout.hidden_size), 0.5, dtype)
    mx.eval(x)
    return x
