"""The CPU kernel and the reference against float64, and what a row's bits may depend on: itself alone."""

import gc
import signal
import threading
import time
from itertools import cycle, pairwise, product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe import kernels
from mlx_flashmoe.kernels import gpu, mlx_experts, on_cpu, reference
from mlx_flashmoe.kernels.random_slab import random_slab
from mlx_flashmoe.layout import BITS, GROUP_SIZES
from mlx_flashmoe.selftest.expert_cases import (
    TOLERANCE,
    Experts,
    clamped_swiglu,
    layout_of,
    squared_relu,
)
from mlx_flashmoe.selftest.floats import error, from_bfloat16

try:
    from mlx_flashmoe.kernels import cpu
except ImportError:
    cpu = None
MODULES = [reference] if cpu is None else [reference, cpu]
GENERAL = [*MODULES, mlx_experts]  # those that know every layout and activation
needs_numba = pytest.mark.skipif(cpu is None, reason="numba is absent")

DTYPES = ("bfloat16", "float16", "float32")
# Every width with every group size and with every dtype, every group size with every dtype.
FORMATS = [
    (bits, group, DTYPES[(i + j) % 3])
    for (i, bits), (j, group) in product(enumerate(BITS), enumerate(GROUP_SIZES))
] + [(16, 0, dtype) for dtype in DTYPES]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def slab_of(experts: Experts) -> mx.array:
    return mx.array(experts.blobs.view(np.uint32))


def inputs(rng, tokens, hidden, count, top_k):
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    picked = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (tokens, top_k)).astype(np.float32)
    return x, picked, weights


def bits_of(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).view(np.uint32)


@pytest.mark.parametrize("bits, group, dtype", FORMATS)
def test_every_format_against_float64(bits, group, dtype):
    # 640 inputs: vectors of every format end inside a row's last full step, and some are shorter.
    layout = layout_of(640, 384, bits, group, dtype)
    experts = Experts(layout, 6, seed=bits * 1000 + group)
    x, picked, weights = inputs(np.random.default_rng(1), 5, 640, 6, 3)
    expected = experts.ffn(x.astype(np.float64), picked, weights)
    for module in MODULES:
        y = module.expert_ffn(mx.array(x), slab_of(experts), mx.array(picked), mx.array(weights), layout)
        assert y.dtype == mx.float32 and y.shape == x.shape
        assert error(np.array(y), expected) < 5e-6, module.__name__


# Experts of every kind that is not computed by a fused kernel, in every width.
KINDS = [
    (gated, bias, activation)
    for gated, activation in ((True, None), (True, clamped_swiglu), (False, squared_relu))
    for bias in (None, "own", "float32", "bfloat16")
]
GENERAL_CASES = [
    (*kind, bits, group, dtype)
    for (bits, group, dtype), kind in zip(2 * FORMATS, cycle(KINDS))
    if bits == 16 or (group == 64 or bits == 3)
] + [(*kind, 4, 64, "bfloat16") for kind in KINDS]


@pytest.mark.parametrize("gated, bias, activation, bits, group, dtype", GENERAL_CASES)
def test_every_kind_of_expert_against_float64(gated, bias, activation, bits, group, dtype):
    """Each expert's outputs and rows of several lengths; a pair's output does not depend on the others."""
    layout = layout_of(640, 384, bits, group, dtype, gated, dtype if bias == "own" else bias)
    experts = Experts(layout, 6, seed=bits, activation=activation)
    slab = slab_of(experts)
    x, picked, _ = inputs(np.random.default_rng(1), 5, 640, 6, 3)
    x[0] *= 4  # what is clamped
    rows, slots = np.repeat(x[:4], (1, 9, 2, 5), axis=0), np.repeat([4, 0, 5, 0], (1, 9, 2, 5))
    expected = experts.outputs(x.astype(np.float64), picked)
    of_rows = experts.outputs(rows.astype(np.float64), slots[:, None])[:, 0]
    for module in GENERAL:
        y = module.expert_outputs(mx.array(x), slab, mx.array(picked), layout, activation)
        assert y.dtype == mx.float32 and y.shape == (5, 3, 640)
        assert error(np.array(y), expected) < 5e-6, module.__name__
        for t in range(5):
            one, few = slice(t, t + 1), picked[t : t + 1, [2, 0]]
            alone = module.expert_outputs(mx.array(x[one]), slab, mx.array(few), layout, activation)
            assert (bits_of(alone)[0] == bits_of(y)[t, [2, 0]]).all(), module.__name__
        y = module.expert_rows(mx.array(rows), slab, mx.array(slots), layout, activation)
        assert error(np.array(y), of_rows) < 5e-6, module.__name__


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("gated, bias, activation", KINDS)
def test_every_kind_of_expert_in_the_dtype_of_x(gated, bias, activation, kind):
    layout = layout_of(256, 128, 4, 64, kind, gated, kind if bias == "own" else bias)
    experts = Experts(layout, 4, activation=activation)
    x, picked, _ = inputs(np.random.default_rng(2), 3, 256, 4, 2)
    x = mx.array(x).astype(getattr(mx, kind))
    expected = experts.outputs(np.array(x.astype(mx.float32)).astype(np.float64), picked)
    for module in GENERAL:
        # On a CPU, MLX's own products are summed in x's dtype.
        allowed = TOLERANCE[kind] * (10 if module is mlx_experts else 1)
        seen = []

        def spy(*hidden, seen=seen):
            seen.extend(hidden)
            return activation(*hidden)

        given = None if activation is None else spy
        y = module.expert_outputs(x, slab_of(experts), mx.array(picked), layout, given)
        assert y.dtype == x.dtype
        assert error(np.array(y.astype(mx.float32)), expected) < allowed
        y = module.expert_rows(x, slab_of(experts), mx.array(picked[:, 0]), layout, given)
        assert y.dtype == (x.dtype if module is mlx_experts else mx.float32)
        assert error(np.array(y.astype(mx.float32)), expected[:, 0]) < allowed
        assert {(h.dtype, h.ndim, h.shape[1]) for h in seen} <= {(y.dtype, 2, 128)}


def moved(experts, order):
    """The slab with expert e in slot order[e]."""
    blobs = np.empty_like(experts.blobs)
    blobs[order] = experts.blobs
    return mx.array(blobs.view(np.uint32))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bits_depend_neither_on_the_split_between_runs_nor_on_slots(data):
    """What makes residency bit-identical, for every kind of expert and an inner dimension that is no power of two."""
    gated, bias, activation = data.draw(st.sampled_from(KINDS))
    quantized = data.draw(st.booleans())
    inner = 192 if quantized else data.draw(st.integers(8, 70))
    layout = layout_of(
        128, inner, 4 if quantized else 16, 64, "float16", gated, "float16" if bias == "own" else bias
    )
    experts = Experts(layout, 5, activation=activation)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    ids = np.repeat(rng.permutation(5)[: len(lengths)], lengths)
    x = rng.standard_normal((len(ids), 128)).astype(np.float32)
    place = rng.permutation(5)
    ends = np.cumsum(lengths)
    cuts = [0, *(end for end in ends[:-1] if data.draw(st.booleans())), ends[-1]]
    for module in GENERAL:
        whole = module.expert_rows(mx.array(x), slab_of(experts), mx.array(ids), layout, activation)
        slab, slots = moved(experts, place), place[ids]
        parts = [
            module.expert_rows(mx.array(x[a:b]), slab, mx.array(slots[a:b]), layout, activation)
            for a, b in pairwise(cuts)
        ]
        assert (bits_of(mx.concatenate(parts)) == bits_of(whole)).all(), module.__name__
        few = slice(0, 3)
        outputs = [
            module.expert_outputs(mx.array(x[few]), s, mx.array(i[few, None]), layout, activation)
            for s, i in ((slab_of(experts), ids), (slab, slots))
        ]
        assert (bits_of(outputs[0]) == bits_of(outputs[1])).all(), module.__name__
        if module is cpu:
            assert (bits_of(outputs[0])[:, 0] == bits_of(whole)[few]).all()


@pytest.mark.parametrize("module", GENERAL)
def test_an_activation_is_needed_and_keeps_the_shape(module):
    ungated, gated = layout_of(64, 64, 4, 64, gated=False), layout_of(64, 64, 4, 64)
    x = mx.ones((1, 64))
    for call, slots in ((module.expert_outputs, mx.array([[0]])), (module.expert_rows, mx.array([0]))):
        with pytest.raises(ValueError, match="without a gate"):
            call(x, slab_of(Experts(ungated, 1)), slots, ungated)
        with pytest.raises(ValueError, match=r"makes \[1, 32\] of \[1, 64\]"):
            call(x, slab_of(Experts(gated, 1)), slots, gated, lambda up, gate: (up * gate)[:, ::2])


@pytest.mark.parametrize("tokens, top_k", [(1, 3), (2, 10), (16, 3)])
def test_a_gpu_s_outputs_are_its_sums_over_one_expert(monkeypatch, tokens, top_k):
    def few(language, x, slab, slots, weights, layout, formulation):
        assert x.shape[0] <= 16 and slots.shape == (x.shape[0], 1) and formulation == "fma"
        return reference.expert_ffn(x, slab, slots, weights, layout)

    monkeypatch.setattr(gpu, "expert_ffn", few)
    layout = layout_of(64, 96, 4, 32)
    experts = Experts(layout, 10)
    x, picked, _ = inputs(np.random.default_rng(8), tokens, 64, 10, top_k)
    y = gpu.expert_outputs(None, mx.array(x), slab_of(experts), mx.array(picked), layout, "fma")
    assert error(np.array(y), experts.outputs(x.astype(np.float64), picked)) < 5e-6


@pytest.mark.parametrize("bits, dtype", [(4, "bfloat16"), (16, "float16"), (16, "float32")])
def test_random_experts_have_every_part(bits, dtype):
    """Sizes that fill no whole words: each part is where the layout says, and there is nothing but its numbers."""
    layout = layout_of(*((64, 96) if bits == 4 else (37, 21)), bits, 32, dtype, False, dtype)
    slab = random_slab(layout, 4)
    for name, part, c in layout.components():
        values = np.stack([reference.component_view(slab, s, c).astype(mx.float32) for s in range(4)])
        if c.dtype != "uint32":
            assert 0 < np.abs(values).max() < 6, (name, part)
        if part == "bias":
            assert 0.5 < values.std() < 1.5 and (values[0] != values[1]).any()
    y = reference.expert_outputs(mx.ones((1, c.shape[0])), slab, mx.array([[0, 3]]), layout, squared_relu)
    assert mx.isfinite(y).all().item() and y.abs().max().item() < 100


def test_the_device_s_functions_take_every_kind_of_expert():
    for gated, bias, activation in KINDS:
        layout = layout_of(64, 64, 4, 64, "float32", gated, "float32" if bias else None)
        experts = Experts(layout, 3, activation=activation)
        x, picked, _ = inputs(np.random.default_rng(9), 2, 64, 3, 2)
        expected = experts.outputs(x.astype(np.float64), picked)
        slab, x = slab_of(experts), mx.array(x)
        y = kernels.expert_outputs(x, slab, mx.array(picked), layout, activation)
        assert error(np.array(y), expected) < 5e-6
        y = kernels.expert_rows(x, slab, mx.array(picked[:, 0]), layout, activation)
        assert error(np.array(y), expected[:, 0]) < 5e-6


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16, mx.float32])
def test_x_of_every_dtype(kind):
    layout = layout_of(256, 128, 4, 64)
    experts = Experts(layout, 4)
    x, picked, weights = inputs(np.random.default_rng(2), 3, 256, 4, 2)
    x = mx.array(x).astype(kind)
    expected = experts.ffn(np.array(x.astype(mx.float32)).astype(np.float64), picked, weights)
    name = str(kind).rpartition(".")[2]
    for module in MODULES:
        y = module.expert_ffn(x, slab_of(experts), mx.array(picked), mx.array(weights), layout)
        assert y.dtype == kind
        assert error(np.array(y.astype(mx.float32)), expected) < TOLERANCE[name]
        rows = module.expert_rows(x, slab_of(experts), mx.array(picked[:, 0]), layout)
        assert rows.dtype == mx.float32 and rows.shape == x.shape  # not rounded before they are summed


@needs_numba
def test_projections_of_different_formats_in_one_blob():
    layout = layout_of(
        256, 384, (4, 8, 3), (64, 32, 128), {"gate": "bfloat16", "up": "float16", "down": "float32"}
    )
    experts = Experts(layout, 3)
    x, picked, weights = inputs(np.random.default_rng(3), 2, 256, 3, 3)
    y = cpu.expert_ffn(mx.array(x), slab_of(experts), mx.array(picked), mx.array(weights), layout)
    assert error(np.array(y), experts.ffn(x.astype(np.float64), picked, weights)) < 5e-6


@needs_numba
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_against_float64(data):
    """Few formats, since each is compiled; any number of groups, outputs, tokens and experts."""
    bits, group, dtype = data.draw(
        st.sampled_from([(4, 64, "bfloat16"), (3, 32, "float16"), (16, 0, "bfloat16")])
    )
    unit = group or 1
    # Not fewer than 8: a single product of two sums that happen to cancel has any relative error.
    sizes = st.integers(1, 7) if group else st.integers(8, 70)
    hidden, intermediate = (unit * data.draw(sizes) for _ in range(2))
    count = data.draw(st.integers(1, 5))
    layout = layout_of(hidden, intermediate, bits, group, dtype)
    experts = Experts(layout, count, seed=data.draw(st.integers(0, 99)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = data.draw(st.integers(1, 16))
    x, picked, weights = inputs(rng, tokens, hidden, count, data.draw(st.integers(1, count)))
    y = cpu.expert_ffn(mx.array(x), slab_of(experts), mx.array(picked), mx.array(weights), layout)
    assert error(np.array(y), experts.ffn(x.astype(np.float64), picked, weights)) < 5e-5


@needs_numba
@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    threads=st.integers(1, 5),
)
def test_the_bits_of_a_row_depend_on_nothing_else(runs, seed, threads):
    """Runs in one call, row by row, through expert_ffn, on another number of threads: the same bits."""
    layout = layout_of(256, 128, 4, 64)
    experts = Experts(layout, 5)
    slab = slab_of(experts)
    slots = np.repeat(np.random.default_rng(seed).permutation(5)[: len(runs)], runs).astype(np.int32)
    x = np.random.default_rng(seed).standard_normal((len(slots), 256)).astype(np.float32)
    whole = bits_of(cpu.expert_rows(mx.array(x), slab, mx.array(slots), layout))
    expected = np.stack([experts.one(s, row) for s, row in zip(slots, x.astype(np.float64))])
    assert error(whole.view(np.float32), expected) < 5e-6
    for row in {0, len(slots) // 2, len(slots) - 1}:
        one = slice(row, row + 1)
        alone = cpu.expert_rows(mx.array(x[one]), slab, mx.array(slots[one]), layout)
        assert (bits_of(alone) == whole[one]).all()
        ones = mx.ones((1, 1))
        assert (
            bits_of(cpu.expert_ffn(mx.array(x[one]), slab, mx.array(slots[one, None]), ones, layout))
            == whole[one]
        ).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "THREADS", threads)
        patch.setattr(cpu, "SMALL", 0)
        assert (bits_of(cpu.expert_rows(mx.array(x), slab, mx.array(slots), layout)) == whole).all()


@needs_numba
def test_tokens_of_expert_ffn_do_not_see_each_other():
    layout = layout_of(256, 128, 4, 64)
    slab = slab_of(Experts(layout, 6))
    x, picked, weights = map(mx.array, inputs(np.random.default_rng(5), 16, 256, 6, 4))
    whole = bits_of(cpu.expert_ffn(x, slab, picked, weights, layout))
    for t in range(16):
        one = slice(t, t + 1)
        assert (bits_of(cpu.expert_ffn(x[one], slab, picked[one], weights[one], layout)) == whole[one]).all()


@needs_numba
@pytest.mark.parametrize("bits, group, dtype", [(4, 64, "bfloat16"), (6, 32, "float16"), (16, 0, "float16")])
def test_slots_that_are_not_named_do_not_matter(bits, group, dtype):
    """Every other slot is full of NaN, and so is the padding of the named ones."""
    layout = layout_of(256, 128, bits, group, dtype)
    experts = Experts(layout, 5)
    x, picked, weights = inputs(np.random.default_rng(6), 4, 256, 2, 2)
    picked = picked * 2 + 1  # slots 1 and 3
    poisoned = np.full_like(experts.blobs, 0xFF)
    for slot in (1, 3):
        for _, _, c in layout.components():
            part = slice(c.offset, c.offset + c.nbytes)
            poisoned[slot, part] = experts.blobs[slot, part]
    assert np.isnan(from_bfloat16(poisoned[0].view(np.uint16))).all()
    outputs = [
        bits_of(
            cpu.expert_ffn(
                mx.array(x), mx.array(b.view(np.uint32)), mx.array(picked), mx.array(weights), layout
            )
        )
        for b in (experts.blobs, poisoned)
    ]
    assert np.isfinite(outputs[0].view(np.float32)).all()
    assert (outputs[0] == outputs[1]).all()


@needs_numba
def test_float16_weights_of_every_kind():
    """Subnormals, signed zero and the largest number are exact; NaN and infinity stay what they are."""
    every = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    layout = layout_of(256, 256, 16, 0, "float16")
    m = cpu._Matrix(layout.gate)
    blob = np.array([every.ctypes.data])
    out = np.empty((256, 256), np.float32)
    arranged, sums = m.arrange(np.eye(256, dtype=np.float32))
    starts, order = np.array([0, 256]), np.arange(256)
    m.project(blob, blob, blob, starts, order, arranged, sums, 256, out, 0, 64)
    expected = every.view(np.float16).astype(np.float32).T
    rows = np.isfinite(expected).all(axis=0)  # 0 * infinity spoils the rest of such a row
    assert rows.sum() == 248 and (out[:, rows] == expected[:, rows]).all()
    assert np.isnan(out[:, ~rows]).any(axis=0).all()


@needs_numba
def test_the_slab_is_read_in_place():
    """A byte written through the slab's memory is seen: no copy of it is kept or made."""
    layout = layout_of(64, 64, 4, 64)
    slab = slab_of(Experts(layout, 2))
    x, slots, weights = mx.ones((1, 64)), mx.array([[0]]), mx.ones((1, 1))
    before = bits_of(cpu.expert_ffn(x, slab, slots, weights, layout))
    memory = np.asarray(slab)
    memory[0] = memory[1]
    after = bits_of(cpu.expert_ffn(x, slab, slots, weights, layout))
    other = bits_of(cpu.expert_ffn(x, slab, mx.array([[1]]), weights, layout))
    assert (after == other).all() and (after != before).any()


@needs_numba
def test_calls_from_several_threads_at_once(monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    layout = layout_of(256, 128, 4, 64)
    slab = slab_of(Experts(layout, 6))
    mx.eval(slab)
    x, picked, weights = inputs(np.random.default_rng(7), 8, 256, 6, 4)
    expected = bits_of(
        cpu.expert_ffn(*map(mx.array, (x,)), slab, mx.array(picked), mx.array(weights), layout)
    )
    wrong = []

    def call():
        with mx.stream(mx.cpu):
            for _ in range(20):
                y = cpu.expert_ffn(mx.array(x), slab, mx.array(picked), mx.array(weights), layout)
                if not (bits_of(y) == expected).all():
                    wrong.append(y)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@needs_numba
@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_outside_the_slab_is_refused(slot):
    layout = layout_of(64, 64, 4, 64)
    slab = slab_of(Experts(layout, 2))
    with pytest.raises(ValueError, match="slab of 2"):
        cpu.expert_ffn(mx.ones((1, 64)), slab, mx.array([[slot]]), mx.ones((1, 1)), layout)


@pytest.mark.parametrize("module", MODULES)
def test_no_rows(module):
    layout = layout_of(64, 64, 4, 64)
    slab = slab_of(Experts(layout, 1))
    y = module.expert_rows(mx.zeros((0, 64), mx.bfloat16), slab, mx.zeros((0,), mx.int32), layout)
    assert y.shape == (0, 64) and y.dtype == mx.float32


@needs_numba
def test_the_cpu_gets_the_fast_kernel_and_the_reference_without_numba(monkeypatch):
    assert on_cpu.module() is cpu
    monkeypatch.setattr(on_cpu, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    on_cpu.module.cache_clear()
    try:
        assert on_cpu.module() is reference
    finally:
        on_cpu.module.cache_clear()


@needs_numba
def test_an_interrupt_while_threads_compute_leaves_at_once(monkeypatch):
    if cpu.THREADS == 1:
        pytest.skip("one processor computes by itself")
    begun, left, at_it, go = [], [], threading.Event(), threading.Event()

    def work(low, high):
        begun.append(low)
        at_it.set()
        go.wait()

    def interrupt():
        at_it.wait()
        while not left:  # a signal that comes just before a lock is waited for is noticed after that
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            time.sleep(0.02)

    def once(number, frame):
        if not left:
            left.append(number)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, once)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        cpu.split(work, list(range(101)))
    thread.join()
    signal.signal(signal.SIGUSR1, before)
    assert not go.is_set()
    go.set()
    done = []
    cpu.split(lambda low, high: done.append(low), list(range(101)))
    assert sorted(done) == list(range(100)) and len(begun) <= cpu.THREADS


@needs_numba
def test_what_threads_compute_with_outlasts_the_call(monkeypatch):
    """They are given addresses, and an interrupt does not wait for them."""
    works = []
    monkeypatch.setattr(cpu, "split", lambda work, bounds: works.append(work))
    monkeypatch.setattr(cpu, "SMALL", 0)
    layout = layout_of(256, 128, 4, 64)
    blobs = Experts(layout, 6).blobs.view(np.uint32)
    before = mx.get_active_memory()
    slab = mx.array(blobs) + 0
    x = mx.zeros((2, 256))
    mx.eval(slab, x)
    with np.errstate(all="ignore"):  # nothing is computed: the numbers are what memory held
        cpu.expert_rows(x, slab, mx.array([0, 1], dtype=mx.int32), layout)
    del slab
    assert mx.get_active_memory() - before >= blobs.nbytes
    works.clear()
    gc.collect()
    assert mx.get_active_memory() - before < blobs.nbytes
