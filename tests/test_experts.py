"""The engine: reads, slots, and the promise that residency never changes a bit."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from blobs import write_experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flashmoe import kernels
from mlx_flashmoe.errors import MemoryPlanError, ReadError
from mlx_flashmoe.experts import Decode, ExpertStore, ReadAhead, SlotArena, StreamedExperts
from mlx_flashmoe.experts import store as store_module
from mlx_flashmoe.experts.ahead import KEEP, TRIAL, PaysOff
from mlx_flashmoe.experts.leaving import Leaving
from mlx_flashmoe.experts.policy import LRFU, LRU, POLICIES
from mlx_flashmoe.experts.slab import Slab
from mlx_flashmoe.experts.store import PendingReads, ReadRequest
from mlx_flashmoe.experts.streamed import waves
from mlx_flashmoe.kernels import reference
from mlx_flashmoe.layout import PAGE, BlobLayout, expert_file

LAYERS, EXPERTS, HIDDEN, TOP_K = 3, 12, 64, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path, layers=LAYERS, experts=EXPERTS)
    return path


def open_store(folder: Path) -> ExpertStore:
    return write_experts(folder, layers=LAYERS, experts=EXPERTS)[0]


def route(rng: np.random.Generator, tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    x = mx.array(rng.standard_normal((tokens, HIDDEN)).astype(np.float32))
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]).astype(np.int32)
    return x, mx.array(ids), mx.array(rng.random((tokens, TOP_K)).astype(np.float32))


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[StreamedExperts]:
    """Layers over an arena that holds everything."""
    arena = SlotArena(open_store(folder), LAYERS * EXPERTS)
    arena.load_all()
    return [StreamedExperts(Decode(arena), layer) for layer in range(LAYERS)]


class Always(PaysOff):
    """Reads ahead whatever it costs."""

    def token_took(self, seconds: float) -> None:
        pass


def guess(rng: np.random.Generator, layer: int, tokens: int) -> mx.array | None:
    """Any guess at the next layer's experts will do: right or wrong, it must not matter."""
    if tokens > 1 or layer == LAYERS - 1:
        return None
    return mx.array(rng.permutation(EXPERTS)[:TOP_K].astype(np.int32))


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [TOP_K, TOP_K + 1, 9, EXPERTS, 2 * EXPERTS, LAYERS * EXPERTS])
def test_residency_never_changes_a_bit(
    folder: Path, truth: list[StreamedExperts], policy: str, slots: int, read_ahead: bool
) -> None:
    arena = SlotArena(open_store(folder), slots, POLICIES[policy](LAYERS, EXPERTS))
    decode = Decode(arena, ReadAhead(arena, Always()) if read_ahead else None)
    layers = [StreamedExperts(decode, layer) for layer in range(LAYERS)]
    rng = np.random.default_rng(slots)
    for tokens in (1, 1, 7, 1, 40, 2, 1, 1):
        for layer in range(LAYERS):
            x, ids, weights = route(rng, tokens)
            likely = guess(rng, layer, tokens) if read_ahead else None
            got, want = layers[layer](x, ids, weights, likely), truth[layer](x, ids, weights)
            assert np.array_equal(np.asarray(got), np.asarray(want))
    if slots < LAYERS * EXPERTS:
        assert arena.misses > slots


def test_matches_the_definition(folder: Path, truth: list[StreamedExperts]) -> None:
    """Against a float64 computation from the blobs' own bytes."""
    _, blobs = write_experts(folder, layers=LAYERS, experts=EXPERTS)
    layout = truth[1]._layout
    x, ids, weights = route(np.random.default_rng(5), 6)

    def matrix(blob: bytes, projection) -> np.ndarray:
        parts = {}
        for name, c in projection.components.items():
            raw = blob[c.offset : c.offset + c.nbytes]
            parts[name] = np.frombuffer(raw, np.uint32 if name == "weight" else np.float32).reshape(c.shape)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        q = ((parts["weight"][..., None] >> shifts) & 15).reshape(projection.out_dims, -1, 32)
        dequantized = q * parts["scales"][..., None].astype(np.float64) + parts["biases"][..., None]
        return dequantized.reshape(projection.out_dims, projection.in_dims)

    want = np.zeros((6, HIDDEN))
    for t in range(6):
        for k in range(TOP_K):
            blob = blobs[1][int(ids[t, k])]
            v = np.asarray(x[t]).astype(np.float64)
            gate, up = matrix(blob, layout.gate) @ v, matrix(blob, layout.up) @ v
            h = gate / (1 + np.exp(-gate)) * up
            want[t] += float(weights[t, k]) * (matrix(blob, layout.down) @ h)
    got = np.asarray(truth[1](x, ids, weights))
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def spy_on_reads(store: ExpertStore, patch: pytest.MonkeyPatch) -> list[int]:
    """The experts asked of ``store`` from now on, in order."""
    order: list[int] = []
    prepare = store.prepare

    def spy(requests: list[ReadRequest], slab: Slab) -> PendingReads:
        order.extend(r.expert for r in requests)
        return prepare(requests, slab)

    patch.setattr(store, "prepare", spy)
    return order


def test_prefill_reads_each_expert_of_the_union_once_and_in_file_order(folder: Path) -> None:
    for slots in (TOP_K, 7, EXPERTS):
        store = open_store(folder)
        layer = StreamedExperts(Decode(SlotArena(store, slots)), 0)
        x, ids, weights = route(np.random.default_rng(1), 5)
        union = np.unique(np.asarray(ids))
        with pytest.MonkeyPatch.context() as patch:
            order = spy_on_reads(store, patch)
            mx.eval(layer(x, ids, weights))
        assert order == union.tolist()
        assert store.bytes_read == len(union) * store.layout(0).blob_size


def test_waves_spare_residents_of_later_waves(folder: Path) -> None:
    store = open_store(folder)
    arena = SlotArena(store, 12)
    arena.touch(0, np.arange(9, 12))
    arena.fetch(0, np.arange(9, 12)).wait()
    for first, last, _ in waves(arena, 0, np.arange(12)):
        assert last - first <= 4
    assert store.reads == 12  # 3 before, 9 now


# --- The rule of SlotArena: a slot is written only after what was built on its contents has been evaluated.


def overwrite_while_unevaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    """Builds outputs lazily (with the lazy reference kernel), lets other experts take their slots, evaluates."""
    monkeypatch.setattr(kernels, "expert_ffn", reference.expert_ffn)
    arena = SlotArena(open_store(folder), TOP_K)
    layers = [StreamedExperts(Decode(arena), layer) for layer in range(LAYERS)]
    whole = SlotArena(open_store(folder), LAYERS * EXPERTS)
    whole.load_all()
    calls = [(layer % LAYERS, *route(np.random.default_rng(layer), 1)) for layer in range(12)]
    lazy = [layers[layer](*call) for layer, *call in calls]
    want = [StreamedExperts(Decode(whole), layer)(*call) for layer, *call in calls]
    return np.asarray(mx.stack(lazy)), np.asarray(mx.stack(want))


def test_slots_are_overwritten_only_after_their_consumers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, want = overwrite_while_unevaluated(folder, monkeypatch)
    assert np.array_equal(got, want)


def test_the_test_above_notices_when_the_rule_is_broken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotArena, "used", lambda self, slots, output: None)
    got, want = overwrite_while_unevaluated(folder, monkeypatch)
    assert not np.array_equal(got, want)


# --- Decode, one layer behind, as on a GPU: there kernels compute later than they are built.


def lazy_ffn(x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout) -> mx.array:
    """One token's experts in MLX operations alone: nothing, not even the slots, is looked at when it is built."""
    blobs = slab[slots[0]]

    def matrix(name: str) -> mx.array:
        p = layout.projections[name]
        parts = []
        for c in p.components.values():
            rows = blobs if c.dtype == "uint32" else blobs.view(mx.float32)
            parts.append(rows[:, c.offset // 4 : (c.offset + c.nbytes) // 4].reshape(-1, *c.shape))
        return mx.dequantize(*parts, group_size=p.group_size, bits=p.bits)

    h = nn.silu(matrix("gate") @ x[0]) * (matrix("up") @ x[0])
    y = (matrix("down") @ h[..., None])[..., 0]
    return (weights[0][:, None] * y).sum(axis=0, keepdims=True)


@pytest.mark.parametrize("slots", [TOP_K, 7, LAYERS * EXPERTS])
@pytest.mark.parametrize("evaluate", ["each token", "at the end"])
def test_deferred_decode_gives_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slots: int, evaluate: str
) -> None:
    monkeypatch.setattr(kernels, "expert_ffn", lazy_ffn)
    results = []
    for deferred in (False, True):
        arena = SlotArena(open_store(folder), slots)
        decode = Decode(arena, ReadAhead(arena, Always()))
        decode.deferred = deferred
        layers = [StreamedExperts(decode, layer) for layer in range(LAYERS)]
        rng = np.random.default_rng(11)
        outputs = []
        for _ in range(10):
            x = mx.zeros((1, HIDDEN))
            for layer in range(LAYERS):
                noise, ids, weights = route(rng, 1)
                # Each layer goes on from the one before, as a model does.
                x = x + layers[layer](x + noise, ids, weights, guess(rng, layer, 1))
            outputs.append(x)
            if evaluate == "each token":
                mx.eval(x)
        results.append(np.asarray(mx.stack(outputs)))
    assert np.array_equal(*results)
    assert np.abs(results[0]).max() > 0


def test_deferred_read_errors_come_with_the_next_layer_and_leave_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "expert_ffn", lazy_ffn)
    arena = SlotArena(open_store(folder), TOP_K)
    decode = Decode(arena)
    decode.deferred = True
    layers = [StreamedExperts(decode, layer) for layer in range(LAYERS)]
    call = route(np.random.default_rng(0), 1)
    with monkeypatch.context() as broken:
        broken.setattr(store_module.os, "preadv", lambda *_: 0)
        layers[0](*call)
        with pytest.raises(ReadError, match="layer 0, expert"):
            layers[1](*call)
    got = layers[0](*call)
    decode.settle()
    whole = SlotArena(open_store(folder), LAYERS * EXPERTS)
    whole.load_all()
    assert np.array_equal(np.asarray(got), np.asarray(StreamedExperts(Decode(whole), 0)(*call)))


# --- Faults


def test_a_truncated_file_is_named_with_layer_and_expert(tmp_path: Path) -> None:
    store, blobs = write_experts(tmp_path, layers=2, experts=EXPERTS)
    arena = SlotArena(store, 6)
    path = tmp_path / expert_file(1)
    whole = path.read_bytes()
    size = store.layout(1).blob_size
    os.truncate(path, 5 * size + 100)
    with pytest.raises(
        ReadError, match=rf"{path}: layer 1, expert 5.*ends after 100 of the blob's {size} bytes"
    ):
        arena.fetch(1, np.array([4, 5])).wait()
    assert (arena.slot_of == -1).all()
    with open(path, "r+b") as f:
        f.write(whole)
    arena.fetch(1, np.array([4, 5])).wait()
    slot = arena.slot_of[1, 5]
    assert np.asarray(arena.slab)[slot].tobytes() == blobs[1][5]


@pytest.mark.parametrize("experts", [1, 5])
def test_reads_are_spread_over_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    """Many experts go whole to each copy in turn; the parts of a single one, too."""
    write_experts(tmp_path, layers=LAYERS, experts=EXPERTS, hidden=256, intermediate=128)
    store, blobs = write_experts(
        tmp_path / "second", layers=LAYERS, experts=EXPERTS, hidden=256, intermediate=128, also=[tmp_path]
    )
    monkeypatch.setattr(store_module, "LEAST_PART", PAGE)
    count = {fd: 0 for fd in store._files[2].fds}
    preadv = os.preadv

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        count[fd] += 1
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(store_module.os, "preadv", spy)
    arena = SlotArena(store, EXPERTS)
    arena.fetch(2, np.arange(experts)).wait()
    parts = experts * len(store.spans(2, experts))
    assert parts > 1 and sorted(count.values()) == [parts // 2, parts - parts // 2]
    for expert in range(experts):
        assert np.asarray(arena.slab)[arena.slot_of[2, expert]].tobytes() == blobs[2][expert]


def test_reads_may_come_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, blobs = write_experts(folder, layers=LAYERS, experts=EXPERTS)
    preadv = os.preadv
    monkeypatch.setattr(
        store_module.os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:1000]], offset)
    )
    arena = SlotArena(store, 3)
    arena.fetch(2, np.array([7])).wait()
    assert np.asarray(arena.slab)[arena.slot_of[2, 7]].tobytes() == blobs[2][7]


def test_too_few_slots_is_an_error_and_leaves_the_arena_usable(folder: Path) -> None:
    arena = SlotArena(open_store(folder), 3)
    with pytest.raises(MemoryPlanError, match="only 3 slots"):
        arena.fetch(0, np.arange(4))
    arena.fetch(0, np.arange(3)).wait()
    assert (arena.slot_of[0, :3] >= 0).all()


def test_reads_of_an_abandoned_call_give_their_slots_back(folder: Path) -> None:
    arena = SlotArena(open_store(folder), 3)
    arena.fetch(0, np.arange(3))  # nobody waits
    arena.fetch(1, np.arange(3)).wait()
    assert (arena.slot_of[1, :3] >= 0).all() and (arena.slot_of[0] == -1).all()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), slots=st.integers(TOP_K, 20), fault=st.floats(0, 0.2))
def test_stress_with_read_faults(
    folder: Path, truth: list[StreamedExperts], seed: int, slots: int, fault: float
) -> None:
    """Random routing, tiny arenas, reads that fail or come back short: a right answer or a named error."""
    preadv = os.preadv
    chance = random.Random(seed)

    def faulty(fd: int, buffers: list[memoryview], offset: int) -> int:
        kind = chance.random()
        if kind < fault / 3:
            raise OSError(5, "Input/output error")
        if kind < 2 * fault / 3:
            return 0
        if kind < fault:
            return preadv(fd, [buffers[0][: len(buffers[0]) // 2 + 1]], offset)
        return preadv(fd, buffers, offset)

    store = open_store(folder)
    arena = SlotArena(store, slots, chance.choice([LRU, LRFU])(LAYERS, EXPERTS))
    decode = Decode(arena, ReadAhead(arena, Always()) if chance.random() < 0.5 else None)
    layers = [StreamedExperts(decode, layer) for layer in range(LAYERS)]
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module.os, "preadv", faulty)
        for step in range(60):
            layer = step % LAYERS
            tokens = 1 if chance.random() < 0.7 else chance.randint(2, 9)
            call = route(rng, tokens)
            try:
                got = np.asarray(layers[layer](*call, guess(rng, layer, tokens)))
            except ReadError as e:
                assert f"layer {layer}, expert" in str(e) and expert_file(layer) in str(e)
                continue
            assert np.array_equal(got, np.asarray(truth[layer](*call)))
    arena.settle()
    resident = np.argwhere(arena.slot_of >= 0)
    slots_held = arena.slot_of[arena.slot_of >= 0]
    assert len(set(slots_held.tolist())) == len(slots_held)
    _, blobs = write_experts(folder, layers=LAYERS, experts=EXPERTS)
    for (layer, expert), slot in zip(resident.tolist(), slots_held.tolist()):
        assert np.asarray(arena.slab)[slot].tobytes() == blobs[layer][expert]


# --- Reading ahead


def test_a_right_guess_is_a_hit_and_a_wrong_one_costs_no_correctness(folder: Path) -> None:
    arena = SlotArena(open_store(folder), 3 * TOP_K)
    ahead = ReadAhead(arena, Always())
    decode = Decode(arena, ahead)
    layers = [StreamedExperts(decode, layer) for layer in range(2)]
    x, ids, weights = route(np.random.default_rng(3), 1)
    _, following, _ = route(np.random.default_rng(4), 1)
    layers[0](x, ids, weights, following)
    assert ahead._fetch is not None
    ahead._fetch.wait()  # the computation took long enough
    layers[1](x, following, weights)
    assert (arena.hits, arena.misses) == (TOP_K, TOP_K)


@pytest.mark.parametrize(("with_it", "without"), [(1.0, 2.0), (2.0, 1.0)])
def test_reading_ahead_stays_on_only_while_it_pays(with_it: float, without: float) -> None:
    decision = PaysOff()
    for _ in range(2 * TRIAL):
        decision.token_took(with_it if decision.on else without)
    assert decision.on == (with_it < without)
    # The machine changes: the next trial notices.
    with_it, without = without, with_it
    for _ in range(KEEP + 2 * TRIAL):
        decision.token_took(with_it if decision.on else without)
    assert decision.on == (with_it < without)


# --- Policies


def test_lru_evicts_the_least_recently_used() -> None:
    policy = LRU(1, 4)
    for expert in (0, 1, 2, 3, 0):
        policy.touch(0, np.array([expert]))
    assert np.argsort(policy.priority[0]).tolist() == [1, 2, 3, 0]


@given(st.lists(st.integers(0, 5), max_size=60), st.floats(0.5, 500))
def test_lrfu_priorities_order_as_the_decayed_sums(uses: list[int], half_life: float) -> None:
    policy = LRFU(1, 6, half_life)
    for expert in uses:
        policy.touch(0, np.array([expert]))
    worth = np.zeros(6)
    for age, expert in enumerate(reversed(uses)):
        worth[expert] += 2.0 ** (-age / half_life)
    used = worth > 0
    assert np.isneginf(policy.priority[0][~used]).all()
    got = policy.priority[0][used] - len(uses) / half_life
    assert np.allclose(got, np.log2(worth[used]), atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_leaves_is_held_and_not_busy_and_worth_least(data: st.DataObject) -> None:
    """Chosen ahead or not, whatever happens in between."""
    slots = data.draw(st.integers(1, 24))
    policy = LRU(1, slots)
    owner = np.array(data.draw(st.permutations(range(slots))))
    held = np.array(data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots)))
    leaving = Leaving(policy, owner, held)
    some = st.sets(st.integers(0, slots - 1))
    for expert in data.draw(st.lists(st.integers(0, slots - 1), max_size=30)):
        policy.touch(0, np.array([expert]))
    in_use, used, gone = data.draw(some), data.draw(some), data.draw(some)
    leaving.choose_ahead(data.draw(st.integers(0, 6)), in_use)
    policy.touch(0, owner[sorted(in_use | used)])
    held[sorted(gone)] = False
    busy, n = data.draw(some), data.draw(st.integers(0, 8))
    chosen = leaving.choose(n, busy)
    free = [slot for slot in range(slots) if held[slot] and slot not in busy]
    assert len(set(chosen)) == len(chosen) == min(n, len(free)) and set(chosen) <= set(free)
    # Uses only make an expert worth more: those chosen ahead and not used since are still worth least.
    worth = policy.priority[0, owner]
    assert sorted(worth[chosen]) == sorted(worth[free])[: len(chosen)]


# --- Interrupts


@contextmanager
def interrupted_at(chance: int) -> Iterator[list[int]]:
    """Ctrl-C at the nth chance that Python has to notice it in the engine's own modules: where a function begins,
    and where one written in C has returned. Yields the chances counted so far."""
    home, count = str(Path(store_module.__file__).parent), [0]

    def notice(frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(home):
            count[0] += 1
            if count[0] == chance:
                raise KeyboardInterrupt

    sys.setprofile(notice)
    try:
        yield count
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_interrupt_at_any_time_costs_no_slot_and_no_bit(
    folder: Path, truth: list[StreamedExperts], tokens: int
) -> None:
    arena = SlotArena(open_store(folder), 2 * TOP_K)
    decode = Decode(arena, ReadAhead(arena, Always()) if tokens == 1 else None)
    layers = [StreamedExperts(decode, layer) for layer in range(LAYERS)]
    rng = np.random.default_rng(tokens)

    def step(layer: int) -> None:
        call = route(rng, tokens)
        assert np.array_equal(
            np.asarray(layers[layer](*call, guess(rng, layer, tokens))), np.asarray(truth[layer](*call))
        )

    chance = 0
    while True:
        chance += 1
        try:
            with interrupted_at(chance) as chances:
                layer = chance % LAYERS
                mx.eval(layers[layer](*route(rng, tokens), guess(rng, layer, tokens)))
            done = chances[0] < chance
        except KeyboardInterrupt:
            done = False
        for layer in range(LAYERS):
            step(layer)
        if decode.ahead is not None:
            decode.ahead.stop()
        arena.settle()
        assert len(set(arena._free_slots)) == len(arena._free_slots) == arena.capacity - arena._held.sum()
        placed = arena.slot_of[arena.slot_of >= 0]
        assert sorted(placed.tolist()) == np.flatnonzero(arena._held).tolist()
        if done:
            break
    assert chance > 50


def test_a_prompt_leaves_no_more_than_its_last_layers_output_behind(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for slots in (TOP_K, LAYERS * EXPERTS):
        arena = SlotArena(open_store(folder), slots)
        if slots == LAYERS * EXPERTS:
            arena.load_all()
        decode = Decode(arena)
        for layer in range(LAYERS):
            mx.eval(StreamedExperts(decode, layer)(*route(rng, 30)))
        assert len(arena._pending) == (0 if arena.resident else 1)
