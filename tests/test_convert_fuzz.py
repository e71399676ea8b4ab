"""Damaged headers, indexes and configs: a named error or a correct conversion, and nothing anywhere else.

Nor a crash, nor a hang, nor more memory than MEMORY. Ten thousand of them, with what came of them, take half an hour:

    python -m pytest -s -m exhaustive tests/test_convert_fuzz.py
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Array, Spec, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import check_dense, check_experts

from mlx_flashmoe.convert import convert, verify
from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.layout import Manifest

MEMORY = 300 << 20  # bytes that no input of this size may make a conversion take
DEADLINE = 30.0  # seconds for a conversion that takes a tenth of one
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


@dataclass
class Published(Spec):
    """A model whose weights are those of a checkpoint's files, believed in everything."""

    folder: Path = Path()

    def weights(self) -> dict[str, Array]:
        out: dict[str, Array] = {}
        for path in self.folder.glob("*.safetensors"):
            content = path.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            for name, entry in header.items():
                if not name.startswith(("model.visual.", "mtp.", "__metadata__")):
                    begin, end = (start + offset for offset in entry["data_offsets"])
                    at = name.replace("model.language_model.", "model.", 1)
                    out[at] = Array(entry["dtype"], tuple(entry["shape"]), content[begin:end])
        return out


def check(source: Path, out: Path) -> None:
    """Every value of a conversion at 4 bits in groups of 32 is what the spoiled files say."""
    layers = Manifest.load(out).layers
    assert len({entry.num_experts for entry in layers}) == 1
    published = Published(layers=len(layers), experts=layers[0].num_experts, folder=source)
    check_experts(out, published, 4, 32)
    check_dense(out, published, "per_expert", 4, 32)


class Writes:
    """Context manager: ``paths`` that are created, opened for writing, renamed or removed in this process meanwhile."""

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
    _watching: Writes | None = None
    _hooked = False

    def __enter__(self) -> Writes:
        self.paths: set[str] = set()
        Writes._watching = self
        if not Writes._hooked:  # a hook cannot be taken away again
            Writes._hooked = True
            sys.addaudithook(Writes._hook)
        return self

    def __exit__(self, *_: object) -> None:
        Writes._watching = None

    @staticmethod
    def _hook(event: str, args: tuple[Any, ...]) -> None:
        watching = Writes._watching
        if watching is None:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            watching.paths.add(os.fspath(args[0]))
        elif event in Writes.CHANGES or event == "shutil.rmtree":
            watching.paths.update(os.path.abspath(p) for p in args[:2] if isinstance(p, (str, os.PathLike)))


def in_time(work: Callable[[], None]) -> None:
    """Does it in another thread, and raises what it raises; an AssertionError if it does not come to its end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), f"not over after {DEADLINE:.0f} s"
    if failed:
        raise failed[0]


class Fuzz:
    """Spoils copies of the checkpoint ``good``, and converts them, in a folder beside it."""

    def __init__(self, good: Path) -> None:
        self.good, self.folder = good, good.parent / "work"
        self.before = peak()
        self.errors = self.conversions = 0
        self.slowest = 0.0

    def __call__(self, draw: st.DataObject) -> None:
        source, out = self.folder / "source", self.folder / "out"
        for path in (source, out):
            if path.exists():
                shutil.rmtree(path)
        shutil.copytree(self.good, source)
        spoil(source, draw)
        before = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        started = time.perf_counter()
        with Writes() as writes:
            try:
                in_time(lambda: self.convert(source, out))
                self.conversions += 1
            except FlashMoEError as e:
                self.errors += 1
                assert "\n" not in str(e) and len(str(e)) < 1000 and not out.exists()
        self.slowest = max(self.slowest, time.perf_counter() - started)
        assert all(path == str(out) or path.startswith(f"{out}/") for path in writes.paths), writes.paths
        files = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file() and out not in p.parents}
        assert files == before
        assert peak() - self.before < MEMORY

    @staticmethod
    def convert(source: Path, out: Path) -> None:
        convert(source, out, q_bits=4, q_group_size=32)
        verify(out, source)
        check(source, out)

    def __str__(self) -> str:
        return (
            f"{self.errors} named errors, {self.conversions} correct conversions; the slowest took "
            f"{self.slowest:.2f} s; {(peak() - self.before) / 1e6:.0f} MB more memory than before"
        )


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(write_checkpoint(tmp_path_factory.mktemp("good") / "source", SPEC, "per_expert", shards=2))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_few(fuzz: Fuzz, data: st.DataObject) -> None:
    fuzz(data)


@pytest.mark.exhaustive
def test_ten_thousand(fuzz: Fuzz) -> None:
    @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def all_of_them(data: st.DataObject) -> None:
        fuzz(data)

    all_of_them()
    print(f"\n{fuzz}")


def test_what_is_written_elsewhere_is_seen(tmp_path: Path) -> None:
    with Writes() as writes:
        (tmp_path / "a").write_text("")
        (tmp_path / "a").rename(tmp_path / "b")
        os.close(os.open(tmp_path / "c", os.O_CREAT))
        (tmp_path / "c").read_text()
    assert writes.paths == {str(tmp_path / name) for name in "abc"}
