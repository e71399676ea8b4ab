"""The Metal kernels, executed by an emulation on the CPU (tests/metal_emulator). No Mac takes part.

What is compiled is the text that MLX itself generates for Apple's compiler. Every result is compared with
float64 arithmetic that shares no code with the kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import (
    CLANG,
    COMPILER,
    Job,
    Launch,
    Sparse,
    check_address_spaces,
    compile_kernels,
    record,
    run,
)

from mlx_flashmoe.kernels import gpu, metal, tuning
from mlx_flashmoe.layout import BITS, GROUP_SIZES, BlobLayout
from mlx_flashmoe.selftest.expert_cases import TOLERANCE, Experts, layout_of, pack
from mlx_flashmoe.selftest.floats import decode, encode, error

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler (g++ or clang++) to emulate Metal with"
)

MX = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class Case:
    """One call of a kernel: its configuration and its sizes."""

    layout: BlobLayout
    dtype: str = "bfloat16"  # of x and y
    formulation: str = "grouped"
    tokens: int = 1
    top_k: int = 3
    rows: tuple[int, ...] = ()  # run lengths: expert_rows instead of expert_ffn
    slots: tuple[int, ...] = (0, 1, 2, 3, 4)  # where the experts lie
    tiling: gpu.Tiling = metal.LANGUAGE.tiling


def launches_of(case: Case) -> list[Launch]:
    x = mx.zeros((sum(case.rows) or case.tokens, case.layout.hidden_size), MX[case.dtype])
    slab = mx.zeros((1, case.layout.blob_size // 4), mx.uint32)
    tiled = replace(metal.LANGUAGE, tiling=case.tiling)
    if case.rows:
        slots = mx.array(np.repeat(np.arange(len(case.rows)), case.rows).astype(np.int32))

        def rows(language, x, slab):
            return gpu.expert_rows(language, x, slab, slots, case.layout)

        return record(tiled, rows, x, slab)

    def ffn(language, x, slab, slots, weights):
        return gpu.expert_ffn(language, x, slab, slots, weights, case.layout, case.formulation)

    slots = mx.zeros((case.tokens, case.top_k), mx.int32)
    return record(tiled, ffn, x, slab, slots, mx.zeros(slots.shape))


def prepare(case: Case, launches: list[Launch], seed: int = 0) -> tuple[Job, np.ndarray]:
    """The job, and the float64 answer."""
    rng = np.random.default_rng(seed)
    layout = case.layout
    experts = Experts(layout, len(case.slots), seed)
    x = encode(rng.standard_normal((sum(case.rows) or case.tokens, layout.hidden_size)), case.dtype)
    places = np.array(case.slots, np.int32)
    slab = Sparse(
        (int(places.max()) + 2) * layout.blob_size,
        {int(s) * layout.blob_size: blob for s, blob in zip(places, experts.blobs)},
    )
    inputs: dict = {"x": x, "slab": slab}
    if case.rows:
        which = np.repeat(rng.permutation(len(case.slots))[: len(case.rows)], case.rows)
        expected = np.stack([experts.one(e, row) for e, row in zip(which, decode(x))])
        inputs["tiles"] = gpu.cut_into_tiles(places[which], case.tiling.tile)
    else:
        which = np.stack([rng.permutation(len(case.slots))[: case.top_k] for _ in range(case.tokens)])
        weights = rng.uniform(0.05, 1, which.shape).astype(np.float32)
        expected = experts.ffn(decode(x), which, weights)
        inputs |= {"slots": places[which], "weights": weights}
    return Job(launches, inputs), expected


def check(cases: list[Case], folder) -> None:
    recorded = [launches_of(case) for case in cases]
    libraries = compile_kernels((launch for launches in recorded for launch in launches), folder)
    prepared = [prepare(case, launches, seed) for seed, (case, launches) in enumerate(zip(cases, recorded))]
    for case, (_, expected), result in zip(cases, prepared, run(libraries, [job for job, _ in prepared])):
        assert error(decode(result["y"]), expected) < TOLERANCE[case.dtype], case
        # The scratch: each of its elements written, and nothing in the padding.
        held = case.layout.intermediate_size * (1 if case.rows else case.top_k)
        assert (np.isfinite(result["h"]).sum(axis=1) == held).all(), case


def every_configuration() -> list[Case]:
    """Every formulation, bits, group size and dtype; sizes that are no multiple of anything vary along."""
    cases = []
    dtypes = ["float32", "bfloat16", "float16"]
    for i, (formulation, bits, group_size, dtype) in enumerate(
        itertools.product(gpu.FORMULATIONS, BITS, GROUP_SIZES, dtypes)
    ):
        hidden = group_size * (1, 3, 2)[i % 3] + (1152 if i % 5 == 0 else 0)
        intermediate = group_size * (2, 1, 3)[i // 3 % 3] + (1024 if i % 11 == 0 else 0)
        layout = layout_of(hidden, intermediate, bits, group_size, dtypes[(i // 3 + i // 9) % 3])
        tokens, top_k = ((1, 1), (1, 4), (2, 3), (5, 2))[i % 4]
        cases.append(Case(layout, dtype, formulation, tokens, top_k))
        if formulation == "grouped":  # expert_rows has no formulations
            cases.append(Case(layout, dtype, rows=((1, 4), (5,), (3, 9, 1))[i % 3]))
    return cases


def every_tiling() -> list[Case]:
    """Every cut of each launch that tuning may choose; sizes that are no multiple of any."""
    own, layout, cases = metal.LANGUAGE.tiling, layout_of(1152, 1056, 4, 32), []
    for gate, down in zip(
        tuning.gate_tilings(gpu.DEFAULT_FORMULATION),
        tuning.down_tilings(gpu.DEFAULT_FORMULATION),
        strict=True,
    ):
        cases.append(Case(layout, tokens=2, tiling=replace(own, **gate, **down)))
    for rows in tuning.rows_tilings(gpu.DEFAULT_FORMULATION):
        cases.append(Case(layout, rows=(3, 9, 1), tiling=replace(own, **rows)))
    return cases


MIXED_DTYPES = {"gate": "float16", "up": "float32", "down": "bfloat16"}
MIXED_AND_UNQUANTIZED = [
    Case(layout_of(256, 384, (4, 3, 6), (64, 32, 128), MIXED_DTYPES)),
    Case(layout_of(256, 384, (8, 16, 2), (32, 32, 64), MIXED_DTYPES), "float32"),
    Case(layout_of(96, 160, 16, 0, "bfloat16"), "float32", tokens=2),
    Case(layout_of(96, 160, 16, 0, "float16"), "float32", rows=(3, 5)),
    Case(layout_of(96, 160, 16, 0, "float32"), "float32"),
]


def test_packing_is_mlx_s() -> None:
    """The tests' own packing is what mx.quantize makes."""
    for bits, group_size in itertools.product(BITS, GROUP_SIZES):
        q = np.random.default_rng(bits).integers(0, 2**bits, (3, 128))
        one, zero = mx.ones((3, 128 // group_size)), mx.zeros((3, 128 // group_size))
        values = mx.dequantize(mx.array(pack(q, bits)), one, zero, group_size=group_size, bits=bits)
        assert np.array_equal(np.array(values), q)


def test_configurations(tmp_path) -> None:
    """Each value of each parameter, and each pair of formulation, bits and dtype at least once."""
    check(every_configuration()[::7], tmp_path)


def test_every_tiling(tmp_path) -> None:
    check(every_tiling(), tmp_path)


@pytest.mark.slow
def test_every_configuration(tmp_path) -> None:
    check(every_configuration(), tmp_path)


def test_mixed_and_unquantized(tmp_path) -> None:
    """gate, up and down of different bits, groups and dtypes; unquantized ones."""
    check(MIXED_AND_UNQUANTIZED, tmp_path)


def test_sizes(tmp_path) -> None:
    """One kernel each, many sizes: tokens from 1 to 16, and inputs larger than threadgroup memory holds."""
    layout = layout_of(160, 96, 4, 32)
    cases = [Case(layout, tokens=t, top_k=k) for t, k in ((1, 1), (7, 1), (3, 5), (8, 5), (16, 5))]
    cases += [Case(layout, rows=r) for r in ((1,), (2,), (4,), (5,), (7, 1, 1, 12, 3))]
    cases.append(Case(layout_of(5216, 1120, 4, 32), "float32", top_k=5))
    check(cases, tmp_path)


def test_slots_beyond_4_gib(tmp_path) -> None:
    """Offsets take 64 bits. Only the experts' own pages exist: every other access would end the process."""
    layout = layout_of(128, 64, 4, 64)
    far = 9 * 2**30 // layout.blob_size
    slots = (far, 3, far // 2 + 1, far - 7, 2**32 // layout.blob_size)
    check([Case(layout, "float32", slots=slots), Case(layout, "float32", rows=(2, 5), slots=slots)], tmp_path)


def test_rows_do_not_depend_on_the_split(tmp_path) -> None:
    """A row's bits: the same in one call, in a call for its run, and with its run in other company."""
    case = Case(layout_of(1216, 96, 4, 32), "float32", rows=(6, 3, 2))
    launches = launches_of(case)
    job, _ = prepare(case, launches)
    jobs = [job]
    for rows in (slice(0, 6), slice(6, 9), slice(3, 4), slice(9, 11)):
        slots = np.repeat(job.inputs["tiles"][:, 2], job.inputs["tiles"][:, 1])[rows]
        alone = launches_of(Case(case.layout, "float32", rows=(rows.stop - rows.start,)))
        tiles = gpu.cut_into_tiles(slots, metal.LANGUAGE.tiling.tile)
        jobs.append(Job(alone, job.inputs | {"x": job.inputs["x"][rows], "tiles": tiles}))
    libraries = compile_kernels((m for j in jobs for m in j.launches), tmp_path)
    whole, *parts = (r["y"] for r in run(libraries, jobs))
    for part, rows in zip(parts, (slice(0, 6), slice(6, 9), slice(3, 4), slice(9, 11))):
        assert np.array_equal(part, whole[rows])


@pytest.mark.skipif(CLANG is None, reason="no clang++ to check Metal's address spaces with")
def test_address_spaces() -> None:
    """Each pointer stays in its address space, and a mistake in one is noticed."""
    cases = [
        Case(layout_of(64, 64, bits, 32), top_k=k, rows=r)
        for bits in (3, 4, 16)
        for k, r in ((8, ()), (3, (2,)))
    ]
    launches = [launch for case in cases for launch in launches_of(case)]
    for launch in launches:
        check_address_spaces(launch, CLANG)
    wrong = replace(launches[0], text=launches[0].text.replace("(FM_SHARED float*)staged", "h"))
    with pytest.raises(AssertionError, match=r"changes address space|no matching function"):
        check_address_spaces(wrong, CLANG)


def test_the_emulation_notices(tmp_path) -> None:
    """What the emulation is for: a missing barrier, an access outside, a write to an input."""
    case = Case(layout_of(160, 96, 4, 32), "float32", top_k=3)
    good = launches_of(case)

    def broken(number: int, old: str, new: str) -> list[Launch]:
        assert old in good[number].text
        changed = replace(good[number], text=good[number].text.replace(old, new))
        return [changed if i == number else launch for i, launch in enumerate(good)]

    mistakes = {
        "data race": broken(
            0, "#define fm_barrier() threadgroup_barrier(mem_flags::mem_threadgroup)", "#define fm_barrier()"
        ),
        "forbidden access to slab": broken(0, "M::row_words + chunk", "M::row_words + 1000 * chunk"),
        "forbidden access to slots": broken(0, "slots[group.y]", "slots[group.y + 1]"),
        "forbidden access to h": broken(0, "h[place(", "h[8192 + place("),
        "wait for different things": broken(
            1, "const float out = fm_sum(total[r]);", "const float out = lane ? 0 : fm_sum(total[r]);"
        ),
        "forbidden access to weights": broken(1, "my_weights[k] =", "((FM_DEVICE float*)weights)[k] ="),
        "threadgroup array": broken(1, "FM_ARRAY int my_slots[TOP_K]", "FM_ARRAY int my_slots[1]"),
    }
    libraries = compile_kernels((launch for launches in mistakes.values() for launch in launches), tmp_path)
    for message, launches in mistakes.items():
        with pytest.raises(AssertionError, match=message):
            run(libraries, [prepare(case, launches)[0]])
