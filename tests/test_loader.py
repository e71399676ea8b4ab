"""load: what it refuses, what it plans, and that a folder is used as the manifest says."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Spec, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashmoe import convert, load, loader, system
from mlx_flashmoe.errors import FormatError, MemoryPlanError, RequestError
from mlx_flashmoe.experts import arena, slab
from mlx_flashmoe.generate import generate_step, prefill
from mlx_flashmoe.kernels import on_cpu, reference
from mlx_flashmoe.layout import PAGE
from mlx_flashmoe.memory import Plan, Room, parse_size, plan, prefill_chunk
from mlx_flashmoe.models import config as model_config
from mlx_flashmoe.sizes import show_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model without a tokenizer."""
    base = tmp_path_factory.mktemp("loader")
    write_checkpoint(base / "source", Spec(), "fused")
    (base / "source" / "tokenizer.json").unlink(missing_ok=True)
    convert(base / "source", base / "model", q_bits=4, q_group_size=32)
    return base / "model"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One to damage."""
    for path in folder.rglob("*"):
        target = tmp_path / "model" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    return tmp_path / "model"


def logits(path: Path, **options: object) -> np.ndarray:
    model, _ = load(path, **options)  # type: ignore[arg-type]
    return np.asarray(model(mx.array([[1, 2, 3, 4, 5]])))


def test_a_folder_without_tokenizer_loads_and_says_so_when_text_is_wanted(folder: Path) -> None:
    model, tokenizer = load(folder)
    assert model(mx.array([[1, 2]])).shape[:2] == (1, 2)
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        tokenizer.encode("hello")


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere products of one row may be computed another way"
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_pieces_of_a_prompt_change_no_bit(tmp_path: Path, dtype: mx.Dtype) -> None:
    if on_cpu.module() is reference:
        pytest.skip("MLX's own products of one row and of many differ")
    write_checkpoint(tmp_path / "source", Spec(experts=16, per_token=6), "fused")
    (tmp_path / "source" / "tokenizer.json").unlink()
    convert(tmp_path / "source", tmp_path / "model", q_bits=4, q_group_size=32)
    model, _ = load(tmp_path / "model", dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 40)

    def read(cuts: list[int]) -> np.ndarray:
        cache = model.make_cache()
        pieces = [model(mx.array(tokens[None, a:b]), cache)[0] for a, b in itertools.pairwise(cuts)]
        return np.array(mx.concatenate(pieces).astype(mx.float32))

    whole = read([0, 40])
    for cuts in ([0, 13, 14, 40], [0, 39, 40], [*range(41)]):
        assert np.array_equal(read(cuts), whole)


def test_a_model_is_used_on_another_thread_than_loaded_it(folder: Path) -> None:
    model, _ = load(folder)
    got: list[np.ndarray] = []

    def use() -> None:
        got.append(np.asarray(model(mx.array([[1, 2, 3]])).astype(mx.float32)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert np.array_equal(got[0], np.asarray(model(mx.array([[1, 2, 3]])).astype(mx.float32)))


def test_a_prompt_pays_for_no_logits(folder: Path) -> None:
    model, _ = load(folder)
    cache = model.make_cache()
    model.model.lm_head = None  # calling it would be an error
    prefill(model, mx.arange(1, 11), cache, 4)
    assert all(layer.offset == 10 for layer in cache)


def test_expert_memory_changes_no_bit(folder: Path) -> None:
    want = logits(folder)
    for expert_memory in ("os", "200kB", 150_000):
        assert np.array_equal(logits(folder, expert_memory=expert_memory), want)
    assert np.array_equal(logits(folder, read_ahead=False, expert_memory="os"), want)


@pytest.mark.parametrize("expert_memory", ["100KB", "1GB"])
def test_a_dropped_model_leaves_nothing(folder: Path, expert_memory: str) -> None:
    """Not when Python next looks for cycles, but at once: it may be most of the machine's memory."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    gc.disable()
    try:
        model, _ = load(folder, expert_memory=expert_memory)
        cache = model.make_cache()
        mx.eval(model(mx.array([[1, 2, 3]]), cache), model(mx.array([[1]]), cache))
        del model, cache
        assert mx.get_active_memory() - before < 10_000
    finally:
        gc.enable()


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="elsewhere slabs are aligned by themselves")
@pytest.mark.parametrize("direct_reads", [False, True])
def test_a_slab_too_long_for_one_dimension(
    folder: Path, direct_reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8.6 GB and more its slots have spare pages, so that each begins at a page: direct reads need that."""
    try:
        os.close(system.open_for_reading(next((folder / "experts").iterdir()), direct_reads))
    except OSError:
        pytest.skip("this file system has no direct reads")
    want = logits(folder)
    monkeypatch.setattr(slab, "MOST_ELEMENTS", 1)
    model, _ = load(folder, expert_memory="100KB", direct_reads=direct_reads)
    array = model.arena.slab
    assert np.asarray(array).ctypes.data % PAGE == 0 and np.asarray(array).strides[0] % PAGE == 0
    assert array.shape[1] * 4 == model.arena.slot_bytes
    for options in ({"expert_memory": "100KB"}, {}):
        assert np.array_equal(logits(folder, direct_reads=direct_reads, **options), want)


def test_experts_on_several_disks(copy: Path, tmp_path: Path) -> None:
    """A copy of one layer beside all of them, then each layer in one place only: the same bits."""
    want = logits(copy)
    other = tmp_path / "other"
    (other / "experts").mkdir(parents=True)
    here, there = (base / "experts" / "layer_001.bin" for base in (copy, other))
    there.write_bytes(here.read_bytes())
    for options in ({}, {"expert_memory": "os"}, {"expert_memory": "os", "direct_reads": True}):
        assert np.array_equal(logits(copy, experts_path=[other], **options), want)
    here.unlink()
    assert np.array_equal(logits(copy, experts_path=[other], expert_memory="os"), want)
    os.truncate(there, there.stat().st_size - 1)
    with pytest.raises(FormatError, match=rf"{there}.*bytes, but should have"):
        load(copy, experts_path=[other])
    there.unlink()
    with pytest.raises(FormatError, match=r"layer_001\.bin.*is missing"):
        load(copy, experts_path=[other])


def test_a_path_without_expert_files_is_no_experts_path(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"--experts-path {tmp_path}: there is no experts/layer_000\.bin"):
        load(folder, experts_path=[tmp_path])


def test_auto_reads_directly_only_where_every_copy_can_be_read_so(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    (other / "experts").mkdir(parents=True)
    (other / "experts" / "layer_001.bin").write_bytes((copy / "experts" / "layer_001.bin").read_bytes())
    room = load(copy)[0].plan.total - 1  # not for all experts
    monkeypatch.setattr(Room, "here", lambda: Room(10**12, room, 10**12))
    monkeypatch.setattr(loader, "reads_directly", lambda path: other not in path.parents)
    monkeypatch.setattr(system, "open_for_reading", lambda path, direct: os.open(path, os.O_RDONLY))
    assert load(copy)[0].plan.direct
    assert not load(copy, experts_path=[other])[0].plan.direct


def test_experts_of_another_model_are_no_copies(copy: Path, tmp_path: Path) -> None:
    """Of one of the same sizes: its manifest tells. Without one, a file of another size is the copy's fault."""
    write_checkpoint(tmp_path / "source", Spec(seed=1), "fused")
    other = tmp_path / "other"
    convert(tmp_path / "source", other, q_bits=4, q_group_size=32)
    (other / "experts" / "layer_000.bin").unlink()
    with pytest.raises(FormatError, match=rf"{other} belongs to another model: .* of layer 1 than {copy}"):
        load(copy, experts_path=[other])
    # The whole model elsewhere is a copy like any other.
    assert np.array_equal(logits(copy, experts_path=[copy]), logits(copy))
    (other / "flashmoe.json").unlink()
    load(copy, experts_path=[other])
    os.truncate(other / "experts" / "layer_001.bin", 16384)
    with pytest.raises(FormatError, match=rf"has 16384 bytes.*; copy it again from where {copy} has it") as e:
        load(copy, experts_path=[other])
    assert "convert" not in str(e.value)


def test_fewer_active_experts_is_another_answer(folder: Path) -> None:
    assert not np.array_equal(logits(folder, active_experts=1), logits(folder))
    for number in (0, 10_000):
        with pytest.raises(MemoryPlanError, match=f"--active-experts {number}"):
            load(folder, active_experts=number)


def damage_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "flashmoe.json").read_text())
    (path / "flashmoe.json").write_text(json.dumps({**manifest, **changes}))


def test_damaged_folders_are_refused_by_name(copy: Path) -> None:
    expert_file = copy / "experts" / "layer_001.bin"
    whole = expert_file.read_bytes()
    os.truncate(expert_file, len(whole) - 1)
    with pytest.raises(FormatError, match=r"layer_001\.bin.*bytes, but should have"):
        load(copy)
    expert_file.unlink()
    with pytest.raises(FormatError, match=r"layer_001\.bin.*is missing"):
        load(copy)
    expert_file.write_bytes(whole)
    load(copy)
    dense = next(copy.glob("*.safetensors"))
    os.truncate(dense, dense.stat().st_size - 4)
    with pytest.raises(FormatError, match=dense.name):
        load(copy)


def test_other_format_versions_and_no_model_at_all(copy: Path, tmp_path: Path) -> None:
    damage_manifest(copy, format_version=99)
    with pytest.raises(FormatError, match="format version 99"):
        load(copy)
    (copy / "flashmoe.json").unlink()
    with pytest.raises(FormatError, match="is not a converted model"):
        load(copy)
    with pytest.raises(FormatError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_config_and_manifest_must_agree(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_experts"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config\.json says"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json"):
        load(copy)


@pytest.mark.parametrize("resident", [True, False])
def test_loading_tells_of_every_byte_it_reads(
    folder: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert_memory = "auto" if resident else 3 * load(folder)[0].plan.slot_bytes
    told: list[tuple[int, int]] = []
    model, _ = load(folder, expert_memory, progress=lambda done, total: told.append((done, total)))
    total = model.plan.dense + model.plan.arena * model.resident
    assert model.resident == resident
    assert [t for _, t in told] == [total] * len(told)
    counts = [done for done, _ in told]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == total and len(set(counts)) > 10
    # Layers that are larger than what is read at once tell of their parts.
    monkeypatch.setattr(arena, "LOAD_BYTES", 2 * model.plan.slot_bytes)
    pieces: list[int] = []
    again, _ = load(folder, expert_memory, progress=lambda done, total: pieces.append(done))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(again(tokens), model(tokens)).item()
    if model.resident:
        assert 2 * model.plan.slot_bytes in np.diff(sorted(set(pieces))) and len(pieces) > len(told)


def test_a_prompts_progress_is_told_layer_by_layer(folder: Path) -> None:
    model, _ = load(folder, expert_memory="os")
    seen: list[int] = []
    prefill(model, mx.array([1, 2, 3, 4, 5, 6, 7]), model.make_cache(), 4, seen.append)
    assert seen == [2, 4, 4, 5, 7, 7]  # half a chunk after one of two layers
    model(mx.array([[1, 2]]))
    assert len(seen) == 6


def test_token_ids_outside_the_vocabulary_are_refused(folder: Path) -> None:
    model, _ = load(folder)
    for bad in (-1, model.vocab_size):
        with pytest.raises(RequestError, match="vocabulary"):
            next(generate_step(mx.array([1, bad]), model))


# --- The memory plan


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[
            ("8GB", 8 * 10**9),
            ("8GiB", 8 * 2**30),
            ("1.5 gb", 15 * 10**8),
            ("700mb", 7 * 10**8),
            (12345, 12345),
        ],
        *[("4096B", 4096), ("0", 0), (" 0.0 ", 0), ("0GB", 0), (0, 0)],
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8XB", "-3GB", "GB", "eight"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(MemoryPlanError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [("48", "48GB"), (" 1.5 ", "1.5GB"), ("999999", "999999GB"), ("8000000000", "8000000000B")],
)
def test_text_without_a_unit_is_refused_with_the_unit_that_may_be_meant(text: str, says: str) -> None:
    for flag, choices in (("--sim-disk", "/s"), ("--prefix-memory", "")):
        with pytest.raises(MemoryPlanError) as error:
            parse_size(text, flag, choices)
        assert str(error.value) == f"{flag} {text.strip()}: give a unit, {says}{choices}"


def test_sizes_for_people() -> None:
    shown = [show_size(n) for n in (5, 1000, 6_750_000, 209e9, 7_077_888)]
    assert shown == ["5 bytes", "1 kB", "6.75 MB", "209 GB", "7.08 MB"]


def a_plan(
    expert_memory: str | int,
    total: int,
    usable: int | None = None,
    available: int | None = None,
    experts: int = 1000,
    **options: Any,
) -> Plan:
    room = Room(total, usable or total, total if available is None else available)
    return plan(
        expert_memory,
        dense=10**9,
        slot_bytes=10**7,
        experts=experts,
        active=10,
        kv=10**8,
        room=room,
        **options,
    )


def test_plans_never_exceed_the_limit() -> None:
    assert a_plan("auto", 123 * 10**8).slots == 1000
    assert a_plan("auto", 123 * 10**8).notes == ()
    for limit in (2 * 10**9, 5 * 10**9, 10**10, 12 * 10**9):
        partial = a_plan("auto", limit)
        direct = a_plan("auto", limit, may_read_directly=True)
        # At least a twentieth is left to other programs.
        for auto in (partial, direct):
            assert 10 <= auto.slots < 1000 and auto.total <= 0.95 * limit + 10**8
        assert direct.direct and direct.slots >= partial.slots and not partial.direct
    assert not a_plan("auto", 10**11, may_read_directly=True).direct  # all fit: nothing is read but once
    assert not a_plan("3GB", 10**10, may_read_directly=True).direct  # as asked
    assert a_plan("3GB", 10**10).slots == 300
    assert a_plan("os", 10**10).slots == 32
    assert a_plan("900GB", 10**11).slots == 1000
    assert a_plan("os", 1_750_000_000).slots == 15
    for expert_memory, limit in (("auto", 10**9), ("9GB", 10**10), ("os", 1_690_000_000)):
        with pytest.raises(MemoryPlanError, match="does not fit"):
            a_plan(expert_memory, limit)
    with pytest.raises(MemoryPlanError, match="give at least 100 MB"):
        a_plan("50MB", 10**10)


@given(
    total=st.integers(2 * 10**9, 10**11),
    usable=st.floats(0.5, 1),
    available=st.floats(0, 1),
    direct=st.booleans(),
)
def test_auto_leaves_other_programs_what_they_use(
    total: int, usable: float, available: float, direct: bool
) -> None:
    """In every branch: all experts in memory, half of what is free, reads around the page cache."""
    room = Room(total, int(usable * total), int(available * total))
    try:
        auto = a_plan("auto", room.total, room.usable, room.available, may_read_directly=direct)
    except MemoryPlanError:
        assert a_plan("os", 10**12).total - 22 * 10**7 > room.usable  # ten experts are too many
        return
    assert auto.total <= room.usable
    assert auto.total <= room.free or auto.slots == 10
    # macOS adds the hint that raises the GPU's limit, where that would be enough.
    assert any(note.startswith("warning") for note in auto.notes) == (auto.total > room.available)
    if auto.slots < 1000:
        assert auto.total - auto.arena + 10**10 > room.free
        free = room.free - (auto.total - auto.arena)
        assert auto.slots == max(10, free // (10**7 if auto.direct else 2 * 10**7))
        assert ("are in use" in auto.reason) == (room.free == room.available)


def test_the_reason_says_what_is_in_use() -> None:
    assert a_plan("auto", 48 * 10**9, 36 * 10**9, 30 * 10**9).reason == "all of them fit"
    half = a_plan("auto", 48 * 10**9, 36 * 10**9, 8 * 10**9)
    assert half.reason == "32% of them; 40 GB are in use, the rest of memory is left to the page cache"
    direct = a_plan("auto", 10**10, available=6 * 10**9, may_read_directly=True)
    assert direct.reason == "44% of them; 4 GB are in use, the others are read around the page cache"
    assert a_plan("auto", 10**10).reason == "40% of them; the rest of memory is left to the page cache"


def test_more_than_is_free_is_given_with_a_warning() -> None:
    asked = a_plan("9GB", 48 * 10**9, available=8 * 10**9)
    assert asked.slots == 900
    (line,) = asked.notes
    assert line == (
        "warning: only 8 GB of memory are free now, so that the system may swap: close other programs, or give "
        "less --expert-memory"
    )
    for least in ("os", "100MB", "auto"):
        (line,) = a_plan(least, 48 * 10**9, available=10**9).notes
        assert line.endswith("close other programs" + ", or give less --expert-memory" * (least == "os"))
    assert a_plan("9GB", 48 * 10**9, available=11 * 10**9).notes == ()


@pytest.mark.parametrize(
    ("total", "most"),
    [
        (16, 12 * 10**9 // 2**20),
        (32, 24 * 10**9 // 2**20),
        (48, 40 * 10**9 // 2**20),
        (128, 120 * 10**9 // 2**20),
    ],
)
def test_a_mac_whose_gpu_may_not_use_enough_is_told_the_command(
    total: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = total * 10**9 * 2 // 3
    sizes: dict[str, Any] = {"dense": usable - 10**9, "slot_bytes": 10**7, "active": 10, "kv": 0}
    command = f"with `sudo sysctl iogpu.wired_limit_mb={most}`, which holds until the next restart, "

    def planned(expert_memory: str, experts: int, available: int = total) -> Plan:
        room = Room(total * 10**9, usable, available * 10**9)
        return plan(expert_memory, experts=experts, room=room, **sizes)

    fits = (most * 2**20 - usable + 10**9 - 5 * 10**8) // 10**7
    asked = f"{fits * 10**7}B"
    # Elsewhere there is no such setting, and no such advice.
    monkeypatch.setattr(system, "sysctl", lambda name: None)
    assert planned("auto", fits).notes == ()
    with pytest.raises(MemoryPlanError, match=r"room for 500 MB$"):
        planned(asked, 10**6)

    settings = {"iogpu.wired_limit_mb": 0}
    monkeypatch.setattr(system, "sysctl", settings.get)
    (hint,) = planned("auto", fits).notes
    shown = f"macOS lets the GPU use {show_size(usable)} of {total} GB: {command}"
    assert hint == f"{shown}all experts fit"
    with pytest.raises(MemoryPlanError, match=re.escape(f"room for 500 MB; {shown}it fits")):
        planned(asked, 10**6)
    # Where it would not do, it is not said: more than may be raised, more than is free, enough as it is.
    assert planned("auto", fits + 100).notes == ()
    with pytest.raises(MemoryPlanError, match=r"room for 500 MB$"):
        planned(f"{(fits + 100) * 10**7}B", 10**6)
    assert not any("sysctl" in note for note in planned("auto", fits, available=total // 2).notes)
    assert planned("auto", 50).notes == ()


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (
            {"prefixes": 10**11},
            "most goes to kept prompts (100 GB), give less --prefix-memory: without it 1.7 GB will do; "
            "with 10 experts all need 102 GB",
        ),
        (  # not the most, but enough
            {"dense": 8 * 10**9, "prefixes": 2 * 10**9},
            "most goes to the dense part (8 GB), give less --prefix-memory: without it 8.7 GB will do; ",
        ),
        ({"dense": 10**10}, "most goes to the dense part (10 GB); with 10 experts all need 10.7 GB"),
        ({"kv": 10**11}, "most goes to the KV cache (100 GB); with 10 experts all need 102 GB"),
        (
            {"expert_memory": "9GB"},
            "give less --expert-memory: besides everything else there is room for 8.4 GB",
        ),
    ],
)
def test_what_does_not_fit_is_blamed_on_what_takes_the_most(sizes: dict[str, Any], says: str) -> None:
    usual = {"expert_memory": "auto", "dense": 10**9, "slot_bytes": 10**7, "kv": 10**8}
    with pytest.raises(MemoryPlanError, match=f"does not fit; {re.escape(says)}"):
        plan(**{**usual, **sizes}, experts=1000, active=10, room=Room(*[10**10] * 3))


def test_a_longer_context_is_counted_and_refused_where_it_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "here", lambda: Room(10**12, 600 * 10**6, 10**12))
    model, _ = load(folder, expert_memory="os")
    before = model.plan
    model.reserve(100)
    assert model.plan == before
    model.reserve(100_000)
    assert model.plan.kv > before.kv and model.plan.arena == before.arena
    with pytest.raises(MemoryPlanError, match="a context of 10000000 tokens does not fit"):
        model.reserve(10_000_000)
    model.plan = replace(model.plan, prefixes=10**7)
    with pytest.raises(MemoryPlanError, match="--max-tokens included, or less --prefix-memory"):
        model.reserve(10_000_000)


def test_a_longer_context_that_a_macs_gpu_may_not_have_comes_with_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "here", lambda: Room(10**9, 600 * 10**6, 10**9))
    monkeypatch.setattr(system, "sysctl", {"iogpu.wired_limit_mb": 0}.get)
    model, _ = load(folder, expert_memory="os")
    longest = model.max_context
    monkeypatch.setattr(model, "context_length", 10**6)
    with pytest.raises(MemoryPlanError, match=r"wired_limit_mb=715`.* it fits$"):
        model.reserve(model.max_context + 100)
    assert longest <= model.max_context


def test_a_plan_larger_than_what_is_free_is_announced_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for available, count in ((10**9, 1), (10**8, 2)):
        lines: list[str] = []
        monkeypatch.setattr(Room, "here", lambda: Room(10**9, 10**9, available))  # noqa: B023
        load(folder, announce=lines.append)
        assert len(lines) == count and lines[0].startswith("memory: ")
    assert lines[1].startswith("warning: only 100 MB of memory are free now")


def test_memory_for_kept_prompts_is_part_of_the_plan(folder: Path) -> None:
    lines: list[str] = []
    with_prefixes = load(folder, prefix_memory=10**7, announce=lines.append)[0].plan
    assert with_prefixes.total == load(folder)[0].plan.total + 10**7
    assert "KV cache" in lines[0] and " + kept prompts 10 MB + working " in lines[0]
    sizes = {"dense": 10**9, "slot_bytes": 10**7, "experts": 1000, "active": 10, "kv": 10**8}
    less = plan("auto", **sizes, prefixes=2 * 10**9, room=Room(*[10**10] * 3))
    assert less.slots == a_plan("auto", 10**10).slots - 100 and less.total <= 10**10


def test_one_array_is_no_larger_than_the_device_allows() -> None:
    def capped(expert_memory: str) -> Plan:
        return plan(
            expert_memory,
            dense=10**9,
            slot_bytes=10**7,
            experts=1000,
            active=10,
            kv=10**8,
            room=Room(*[10**11] * 3),
            largest_buffer=4 * 10**9,
        )

    assert capped("auto").slots == 400
    with pytest.raises(MemoryPlanError, match="largest buffer is 4 GB"):
        capped("5GB")


def test_chunks_are_whole_and_bounded() -> None:
    assert prefill_chunk(10**9) == 64
    assert prefill_chunk(1) == 4096
    assert prefill_chunk(200_000) % 64 == 0
    assert prefill_chunk(20_000, besides=50 * 10**6) < prefill_chunk(20_000)


def test_a_long_prompt_mixes_in_slices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = mx.array(np.random.default_rng(0).integers(0, 96, (1, 50)))
    model, _ = load(folder)
    want = np.asarray(model(tokens, model.make_cache()))
    monkeypatch.setattr(model_config, "MIXED", {mx.DeviceType.cpu: 7, mx.DeviceType.gpu: 7})
    assert np.allclose(np.asarray(model(tokens, model.make_cache())), want, atol=1e-5)


def test_yarn_added_by_hand_lengthens_what_is_answered_and_what_errors_say(copy: Path) -> None:
    """As model cards ask for it: a converted model's own config.json, max_position_embeddings left as it is."""
    path = copy / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    assert load(copy)[0].max_context == text["max_position_embeddings"] == 4096
    text["max_position_embeddings"] = 16
    text["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    path.write_text(json.dumps(config))
    model, _ = load(copy)
    assert model.context_length == model.max_context == 64
    prompt = mx.array(np.arange(60) % 96)
    assert len(list(generate_step(prompt, model, max_tokens=-1))) == 4
    with pytest.raises(RequestError, match=r"a prompt of 64 tokens .* the context of 64 tokens"):
        next(generate_step(mx.array(np.arange(64)), model))
