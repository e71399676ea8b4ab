"""What is promised to outlive a power cut has been flushed before the promise: on macOS by F_FULLFSYNC, never fsync.

The tests see the calls that reach the disk. In ``make test-darwin`` a call of os.fsync by the project is an error, and
what is seen here as a flush can only have been an F_FULLFSYNC.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from checkpoints import Spec, write_checkpoint

from mlx_flashmoe import system
from mlx_flashmoe.convert import convert, damage, units, verify
from mlx_flashmoe.convert.destination import Destination
from mlx_flashmoe.convert.journal import Beginning, Journal
from mlx_flashmoe.convert.part import PartFile
from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.layout import MANIFEST, Manifest

SPEC = Spec(extras=False, layers=2, experts=4)


class Disk:
    """Records what reaches the disk: events are ("write" or "flush", inode) and ("name", the new name)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Any]] = []
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))
        monkeypatch.setattr(os, "pwrite", self._writing(os.pwrite))
        if sys.platform == "darwin":
            monkeypatch.setattr(fcntl, "fcntl", self._control(fcntl.fcntl))
        else:
            monkeypatch.setattr(os, "fsync", self._flushing(os.fsync))

    def _writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            written = real(fd, *rest)
            self.events.append(("write", os.fstat(fd).st_ino))
            return written

        return call

    def _flushing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            # Before it begins: what is written meanwhile is not flushed.
            self.events.append(("flush", os.fstat(fd).st_ino))
            return real(fd, *rest)

        return call

    def _control(self, real: Callable[..., Any]) -> Callable[..., Any]:
        flushing = self._flushing(real)
        return lambda fd, command, *rest: (flushing if command == 51 else real)(fd, command, *rest)

    def _naming(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any) -> None:
            real(source, target)
            self.events.append(("name", str(target)))

        return call

    def flushes(self, change: Callable[[], Any]) -> list[int]:
        """The inodes that are flushed by a change, in order."""
        self.events.clear()
        change()
        return [what for kind, what in self.events if kind == "flush"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), SPEC, "fused", shards=2)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "model"
    convert(source, out)
    return out


def test_a_manifest(made: Path, tmp_path: Path, disk: Disk) -> None:
    """Its bytes, then its name."""
    manifest = Manifest.load(made)
    assert disk.flushes(lambda: manifest.save(tmp_path)) == [inode(tmp_path / MANIFEST), inode(tmp_path)]
    assert [kind for kind, _ in disk.events] == ["flush", "name", "flush"]


def test_a_journal(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    for change in (
        lambda: journal.begin(Beginning({}, {}, "plan", {}, {})),
        lambda: journal.finish("unit", [1]),
        journal.move,
    ):
        assert disk.flushes(change) == [inode(path)]
        assert disk.events[-1][0] == "flush"
    journal.close()


def test_a_download(tmp_path: Path, disk: Disk) -> None:
    """What came is flushed before the record of it; the name last."""
    path, part, record = (tmp_path / f"file{end}" for end in ("", ".part", ".ranges"))
    file = PartFile(path, 10, "stamp")
    assert [what for kind, what in disk.events if kind == "flush"] == [inode(record), inode(tmp_path)]

    def come() -> None:
        file.write_at(0, b"0123456789")
        file.keep([(0, 10)])

    assert disk.flushes(come) == [inode(part), inode(record)]
    assert [kind for kind, _ in disk.events] == ["write", "flush", "write", "flush"]
    assert disk.flushes(file.place) == [inode(tmp_path)]
    file.close()


def test_a_record_of_damage(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / damage.RECORD
    saved = disk.flushes(lambda: damage.save_record(tmp_path, {"model.safetensors": set()}))
    assert saved == [inode(path), inode(tmp_path)]
    assert disk.flushes(lambda: damage.save_record(tmp_path, {})) == [inode(tmp_path)]


def test_a_small_file_of_a_conversion(tmp_path: Path, disk: Disk) -> None:
    with Destination(tmp_path / "out") as out:
        out.keep()
        written = disk.flushes(lambda: out.write("config.json", b"{}"))
        path = out.path("config.json")
        assert written[-1] == inode(path) and inode(path.parent) in written
        placed = disk.flushes(lambda: out.place("config.json"))
        assert placed == [inode(out.folder), inode(path.parent)]


def flushed_when(disk: Disk, named: Path) -> tuple[set[int], set[int]]:
    """The inodes that had been written, and those with a write that was not flushed, when a file got its name."""
    written, open_ = set(), set()
    for kind, what in disk.events[: disk.events.index(("name", str(named)))]:
        if kind == "write":
            written.add(what)
            open_.add(what)
        elif kind == "flush":
            open_.discard(what)
    return written, open_


def folders_of_names(disk: Disk, named: Path) -> tuple[set[int], set[int]]:
    """The folders in which a file had got a name before ``named`` got its own: all, and those not flushed since."""
    seen, open_ = set(), set()
    for kind, what in disk.events[: disk.events.index(("name", str(named)))]:
        if kind == "name":
            seen.add(inode(Path(what).parent))
            open_.add(inode(Path(what).parent))
        elif kind == "flush":
            open_.discard(what)
    return seen, open_


@pytest.mark.parametrize("delete_source", [False, True])
def test_a_conversion(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, delete_source: bool
) -> None:
    """Every file, and every folder in which one has got its name, before the manifest makes it a model."""
    monkeypatch.setattr(units, "UNIT", faults.UNIT)
    monkeypatch.setattr(units, "PIECE", faults.PIECE)
    source, out = write_checkpoint(tmp_path / "source", SPEC, "fused", shards=2), tmp_path / "out"
    manifest = convert(source, out, delete_source=delete_source)
    written, unflushed = flushed_when(disk, out / MANIFEST)
    files = [out / entry.file for entry in (*manifest.layers, *manifest.dense)]
    assert {inode(path) for path in files} < written
    assert unflushed == set()
    seen, unflushed = folders_of_names(disk, out / MANIFEST)
    assert inode(out) in seen and unflushed == set()
    # The manifest's own name, then.
    assert ("flush", inode(out)) in disk.events[disk.events.index(("name", str(out / MANIFEST))) :]


def test_a_repair(source: Path, made: Path, tmp_path: Path, disk: Disk) -> None:
    """Mended bytes before the record says that nothing is damaged any more."""
    out = tmp_path / "out"
    out.mkdir()
    for path in made.rglob("*"):
        target = out / path.relative_to(made)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    file = out / Manifest.load(out).layers[1].file
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="damaged in 1 place"):
        verify(out)
    assert json.loads((out / damage.RECORD).read_text())
    removed: list[int] = []
    real = os.unlink

    disk.events.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", lambda *a, **k: (removed.append(len(disk.events)), real(*a, **k))[1])
        convert(source, out)
    assert not (out / damage.RECORD).exists() and removed
    writes = [i for i, event in enumerate(disk.events) if event == ("write", inode(file))]
    flushes = [i for i, event in enumerate(disk.events) if event == ("flush", inode(file))]
    assert writes and flushes and writes[-1] < flushes[-1] < removed[-1]


@pytest.mark.skipif("darwin_shape" not in sys.modules, reason="counted by make test-darwin")
def test_on_macos_every_flush_is_a_full_one(tmp_path: Path, disk: Disk) -> None:
    import darwin_shape

    before = len(darwin_shape.commands)
    convert(write_checkpoint(tmp_path / "source", SPEC, "fused"), tmp_path / "out")
    full = [inode for command, inode in darwin_shape.commands[before:] if command == darwin_shape.F_FULLFSYNC]
    assert sorted(full) == sorted(what for kind, what in disk.events if kind == "flush")
    assert len(full) > 10 and not system.LINUX
