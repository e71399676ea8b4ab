"""Damaged headers, indexes and configs: a named error or a conversion that verifies, and nothing anywhere else."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flashmoe.convert import convert, verify
from mlx_flashmoe.errors import FlashMoEError

MEMORY = 300 << 20  # bytes that no input of this size may make a conversion take
SPEC = Spec(hidden=32, inner=32, shared=32, experts=2, layers=2, vocab=8, head=16, key_head=16, value_head=16)
INDEX = "model.safetensors.index.json"
HUGE = [0, 1, -1, 7, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, True, None, 1.5, "4", [], {}, float("inf")]
NAMES = ["../x.safetensors", "/x.safetensors", "config.json", "", ".", "a\0.safetensors", "\ud800", "x" * 300]

values = st.sampled_from(HUGE + NAMES) | st.integers(-5, 300) | st.text(max_size=4)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something could be changed in parsed JSON."""
    found = [path] if path else []
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        found += places(value, (*path, key))
    return found


def change(data: Any, draw: st.DataObject) -> Any:
    """The same JSON with one to three things replaced, removed, renamed or swapped."""
    for _ in range(draw.draw(st.integers(1, 3))):
        options = places(data)
        if not options:
            break
        path = options[draw.draw(st.integers(0, len(options) - 1))]
        inside = data
        for key in path[:-1]:
            inside = inside[key]
        how = draw.draw(st.sampled_from(["replace", "remove", "rename", "nudge", "copy"]))
        if how == "remove":
            del inside[path[-1]]
        elif how == "rename" and isinstance(inside, dict):
            inside[draw.draw(st.sampled_from(NAMES) | st.text(max_size=9))] = inside.pop(path[-1])
        elif how == "nudge" and type(inside[path[-1]]) is int:
            inside[path[-1]] += draw.draw(st.integers(-9, 9))
        elif how == "copy":
            other = options[draw.draw(st.integers(0, len(options) - 1))]
            value = data
            try:
                for key in other:
                    value = value[key]
            except (KeyError, IndexError, TypeError):
                continue
            inside[path[-1]] = json.loads(json.dumps(value))
        else:
            inside[path[-1]] = draw.draw(values)
    return data


def spoil(source: Path, draw: st.DataObject) -> None:
    target = draw.draw(st.sampled_from(["header", "header", "bytes", "length", "cut", "index", "config"]))
    shard = source / "model-00001-of-00002.safetensors"
    if target in ("index", "config"):
        path = source / (INDEX if target == "index" else "config.json")
        path.write_text(json.dumps(change(json.loads(path.read_text()), draw)))
        return
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if target == "header":
        header = json.dumps(change(json.loads(content[8 : 8 + length]), draw)).encode()
        shard.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    elif target == "bytes":
        at = draw.draw(st.integers(0, 7 + length))
        shard.write_bytes(content[:at] + bytes([draw.draw(st.integers(0, 255))]) + content[at + 1 :])
    elif target == "length":
        shard.write_bytes(draw.draw(st.binary(min_size=8, max_size=8)) + content[8:])
    else:
        shard.write_bytes(content[: draw.draw(st.integers(0, len(content)))])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good") / "source", SPEC, "per_expert", shards=2)


def fuzz(good: Path, folder: Path, draw: st.DataObject) -> None:
    source, out = folder / "source", folder / "out"
    for path in (source, out):
        if path.exists():
            shutil.rmtree(path)
    shutil.copytree(good, source)
    spoil(source, draw)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    try:
        convert(source, out, q_bits=4, q_group_size=32)
        verify(out, source)
    except FlashMoEError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000 and not out.exists()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and out not in p.parents} == before
    assert peak() < fuzz.allowed  # type: ignore[attr-defined]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_few(good: Path, data: st.DataObject) -> None:
    if not hasattr(fuzz, "allowed"):
        fuzz.allowed = peak() + MEMORY  # type: ignore[attr-defined]
    fuzz(good, good.parent / "work", data)


@pytest.mark.exhaustive
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_ten_thousand(good: Path, data: st.DataObject) -> None:
    if not hasattr(fuzz, "allowed"):
        fuzz.allowed = peak() + MEMORY  # type: ignore[attr-defined]
    fuzz(good, good.parent / "work", data)
