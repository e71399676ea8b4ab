"""Experts whose outputs are returned one by one, as others' modules want them: exact, and the same bits anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from blobs import write_experts

from mlx_flashmoe.experts import Decode, ExpertStore, SlotArena, StreamedExperts, StreamedOutputs
from mlx_flashmoe.kernels import reference

LAYERS, EXPERTS, HIDDEN, TOP_K = 2, 12, 64, 4


def clamped(up: mx.array, gate: mx.array) -> mx.array:
    """A gated activation that is no SwiGLU."""
    return mx.minimum(gate, 0.5) * mx.sigmoid(1.7 * gate) * (up + 1)


ACTIVATIONS: list[Callable[..., mx.array] | None] = [None, clamped]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path, layers=LAYERS, experts=EXPERTS)
    return path


def open_store(folder: Path) -> ExpertStore:
    return write_experts(folder, layers=LAYERS, experts=EXPERTS)[0]


def routed(rng: np.random.Generator, tokens: int, repeats: bool = False) -> tuple[mx.array, np.ndarray]:
    """Activations [1, tokens, D] and ids [1, tokens, K]; some of a token's may be the same."""
    x = mx.array(rng.standard_normal((1, tokens, HIDDEN)).astype(np.float32))
    if repeats:
        return x, rng.integers(0, EXPERTS, (1, tokens, TOP_K), dtype=np.int32)
    return x, np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]).astype(np.int32)[None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_every_output_is_that_of_its_expert(
    folder: Path, tokens: int, activation: Callable[..., mx.array] | None
) -> None:
    arena = SlotArena(open_store(folder), LAYERS * EXPERTS)
    arena.load_all()
    layer = StreamedOutputs(Decode(arena), 1, activation)
    x, ids = routed(np.random.default_rng(tokens), tokens, repeats=True)
    got = np.asarray(layer(x, mx.array(ids)))
    assert got.shape == (1, tokens, TOP_K, HIDDEN)
    for t in range(tokens):
        for k in range(TOP_K):
            slot = mx.array([int(arena.slot_of[1, ids[0, t, k]])])
            one = reference.expert_rows(x[0, t][None], arena.slab, slot, layer._layout, activation)
            assert np.abs(got[0, t, k] - np.asarray(one[0])).max() <= 1e-5 * np.abs(got).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slots", [TOP_K, 7, LAYERS * EXPERTS])
def test_residency_never_changes_a_bit(
    folder: Path, slots: int, activation: Callable[..., mx.array] | None
) -> None:
    whole = SlotArena(open_store(folder), LAYERS * EXPERTS)
    whole.load_all()
    few = SlotArena(open_store(folder), slots)
    decodes = Decode(whole), Decode(few)
    truth, layers = ([StreamedOutputs(d, i, activation) for i in range(LAYERS)] for d in decodes)
    rng = np.random.default_rng(slots)
    for tokens in (1, 1, 30, 1, 2, 1):
        for i in range(LAYERS):
            x, ids = routed(rng, tokens, repeats=tokens != 30)
            got, want = layers[i](x, mx.array(ids)), truth[i](x, mx.array(ids))
            assert np.array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("tokens", [1, 33])
def test_their_weighted_sum_is_what_the_fused_layer_gives(folder: Path, tokens: int) -> None:
    arena = SlotArena(open_store(folder), LAYERS * EXPERTS)
    arena.load_all()
    decode = Decode(arena)
    rng = np.random.default_rng(3)
    x, ids = routed(rng, tokens)
    weights = rng.random((1, tokens, TOP_K)).astype(np.float32)
    each = np.asarray(StreamedOutputs(decode, 0, None)(x, mx.array(ids)))
    together = np.asarray(StreamedExperts(decode, 0)(x, mx.array(ids), mx.array(weights)))
    want = (each * weights[..., None]).sum(axis=-2)
    assert np.abs(together - want).max() <= 1e-5 * np.abs(want).max()


def test_experts_are_counted_once_for_a_token_that_chooses_one_twice(folder: Path) -> None:
    arena = SlotArena(open_store(folder), TOP_K)
    layer = StreamedOutputs(Decode(arena), 0, None)
    x = mx.ones((1, 1, HIDDEN))
    layer(x, mx.array([[[3, 3, 5, 3]]]))
    assert (arena.hits, arena.misses, arena.store.reads) == (0, 2, 2)
    layer(x, mx.array([[[5, 3, 5, 5]]]))
    assert (arena.hits, arena.misses, arena.store.reads) == (2, 2, 2)


def test_what_is_routed_is_told(folder: Path) -> None:
    decode = Decode(SlotArena(open_store(folder), LAYERS * EXPERTS))
    told: list[tuple[int, list[list[int]]]] = []
    decode.on_routing = lambda layer, ids: told.append((layer, ids.tolist()))
    x, ids = routed(np.random.default_rng(1), 2)
    StreamedOutputs(decode, 1, None)(x, mx.array(ids))
    StreamedExperts(decode, 0)(x, mx.array(ids), mx.ones((1, 2, TOP_K)))
    assert told == [(1, ids[0].tolist()), (0, ids[0].tolist())]
