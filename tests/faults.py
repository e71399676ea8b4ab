"""Conversions in processes of their own that die on the way: killed at an instant, or at the n-th change to the disk.

A power cut is a kill after which whatever was not flushed may be lost: the process counts what it wrote since the
last flush (fsync; on macOS, where that does not reach the disk, F_FULLFSYNC), and takes some of it back before it
dies. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNIT, PIECE = 60_000, 9_000  # small enough that a small model has many

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["faults", "mlx_flashmoe.convert", "huggingface_hub"])


@dataclass
class Cut:
    """Dies at the ``at``-th change to the disk; ``power``: as if by a power cut, a random one of that ``seed``."""

    at: int
    power: bool = False
    seed: int = 0
    calls: int = 0
    unsynced: dict[int, list[tuple[int, bytes]]] = field(
        default_factory=dict
    )  # inode -> what was there before
    paths: dict[int, str] = field(default_factory=dict)  # inode -> where it was opened
    made: dict[str, list[str]] = field(default_factory=dict)  # folder -> entries that are new since its flush

    def step(self) -> None:
        """Another change to the disk. One at a time: what is lost is what other threads have not flushed."""
        self.calls += 1
        if self.calls == self.at:
            if self.power:
                self.lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def lose(self) -> None:
        rng = random.Random(self.seed)
        for inode, writes in self.unsynced.items():
            fd = os.open(self.paths[inode], os.O_RDWR)
            for offset, before in reversed(writes):
                if rng.random() < 0.5:
                    _real["pwrite"](fd, before, offset)
        for folder, entries in self.made.items():
            for entry in entries:
                path = os.path.join(folder, entry)
                if rng.random() < 0.5 and os.path.isfile(path):
                    os.unlink(path)


MACOS = sys.platform == "darwin"

_real_fcntl = fcntl.fcntl
_real: dict[str, Callable[..., Any]] = {
    name: getattr(os, name)
    for name in ("pwrite", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir", "rmdir", "open")
}


def _install(cut: Cut) -> None:
    """Has every call that changes the disk counted."""

    one_at_a_time = threading.RLock()

    def alone(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            with one_at_a_time:
                return change(*args, **named)

        return call

    def pwrite(fd: int, data: Any, offset: int) -> int:
        cut.step()
        stat = os.fstat(fd)
        before = os.pread(fd, len(data), offset).ljust(len(data), b"\0")
        cut.unsynced.setdefault(stat.st_ino, []).append((offset, before))
        return _real["pwrite"](fd, data, offset)

    def flushed(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        cut.unsynced.pop(inode, None)
        cut.made.pop(cut.paths.get(inode, ""), None)

    def fsync(fd: int) -> None:
        cut.step()
        _real["fsync"](fd)
        if not MACOS:
            flushed(fd)

    def control(fd: int, command: int, argument: Any = 0) -> Any:
        full = MACOS and command == fcntl.F_FULLFSYNC
        if full:
            cut.step()
        result = _real_fcntl(fd, command, argument)
        if full:
            flushed(fd)
        return result

    def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        new = flags & os.O_CREAT and not os.path.exists(path)
        if new:
            cut.step()
        fd = _real["open"](path, flags, *rest, **named)
        if "dir_fd" not in named:  # shutil's, of folders that it removes
            cut.paths[os.fstat(fd).st_ino] = os.path.abspath(path)
        if new:
            folder, entry = os.path.split(os.path.abspath(path))
            cut.made.setdefault(folder, []).append(entry)
        return fd

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            cut.step()
            return _real[name](*args, **named)

        return call

    for name in _real:
        change = {"pwrite": pwrite, "fsync": fsync, "open": open_}.get(name) or counted(name)
        setattr(os, name, alone(change))
    fcntl.fcntl = alone(control)


def _convert(source: str, out: Path, options: dict[str, Any], cut: Cut | None, started: Any) -> None:
    from mlx_flashmoe.convert import convert, units

    units.UNIT, units.PIECE = UNIT, PIECE
    if cut is not None:
        _install(cut)
    started.set()
    convert(source, out, **options)
    os._exit(0)


def start(source: object, out: Path, options: dict[str, Any], cut: Cut | None = None) -> Any:
    """A conversion in a process of its own, already at work."""
    started = _context.Event()
    process = _context.Process(target=_convert, args=(str(source), out, options, cut, started))
    process.start()
    assert started.wait(60)
    return process


def finished(process: Any) -> bool:
    """Whether it came to its end, rather than being killed; anything else is an error."""
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def killed_after(seconds: float, source: object, out: Path, options: dict[str, Any]) -> bool:
    """Converts, and kills that after so many seconds; whether it was over by then."""
    process = start(source, out, options)
    process.join(seconds)
    process.kill()
    return finished(process)
