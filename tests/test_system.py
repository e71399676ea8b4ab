"""What Linux and macOS do differently stands in one module, and does there what it says."""

from __future__ import annotations

import errno
import os
import re
import resource
import zlib
from pathlib import Path

import pytest

from mlx_flashmoe import system
from mlx_flashmoe.convert.reread import crc32_on_disk

ROOT = Path(__file__).parents[1]

# Calls and names that Linux or macOS lacks or has otherwise.
ELSEWHERE = re.compile(
    r"fsync|fdatasync|msync|posix_fadvise|POSIX_FADV|O_DIRECT|F_NOCACHE|F_FULLFSYNC|F_RDADVISE|sched_[gs]etaffinity|/proc\b|"
    r"/sys/fs/|sys\.platform|\bplatform\.|import platform|from platform|sysconf|ru_maxrss|"
    r"(has|get)attr\((os|fcntl)\b|memfd_|copy_file_range|sendfile|fallocate|os\.uname|sysctl|psutil"
)
# Files that may name them, and why.
MAY_NAME_THEM = {
    "mlx_flashmoe/system.py": "it is their place",
    "mlx_flashmoe/memory.py": "its advice names the command that sets macOS's limit",
    "examples/limited_memory.py": "control groups, which it is about, are Linux's",
    "examples/doctor_against_bench.py": "its limits are control groups too",
}


def test_nothing_else_asks_which_system_it_is() -> None:
    naming = {}
    for folder in ("mlx_flashmoe", "convert", "kernels", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = path.read_text().splitlines()
            if found := [f"{i}: {line.strip()}" for i, line in enumerate(lines, 1) if ELSEWHERE.search(line)]:
                naming[str(path.relative_to(ROOT))] = found
    assert {name: lines for name, lines in naming.items() if name not in MAY_NAME_THEM} == {}
    assert naming.keys() == MAY_NAME_THEM.keys(), "an exception that is not needed any more"


# Flushing


class Flushes:
    """Stands in for both ways to flush, and says which was taken.

    Attributes:
        full, plain: descriptors, in order.
        refusal: the error number that a full flush ends with, if any.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full: list[int] = []
        self.plain: list[int] = []
        self.refusal: int | None = None
        monkeypatch.setattr(system.os, "fsync", self.plain.append)
        if not system.LINUX:
            monkeypatch.setattr(system.fcntl, "fcntl", self.fcntl)

    def fcntl(self, fd: int, command: int, argument: int = 0) -> int:
        assert command == 51  # F_FULLFSYNC
        self.full.append(fd)
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return 0


macos = pytest.mark.skipif(system.LINUX, reason="of macOS: on Linux fsync is a full flush")


@pytest.mark.skipif(not system.LINUX, reason="of Linux")
def test_flush_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    system.flush(7)
    assert flushes.plain == [7]


@macos
def test_flush_reaches_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    system.flush(7)
    assert (flushes.full, flushes.plain) == ([7], [])


@macos
@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_without_a_full_flush(monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    flushes = Flushes(monkeypatch)
    flushes.refusal = refusal
    system.flush(7)
    assert (flushes.full, flushes.plain) == ([7], [7])


@macos
@pytest.mark.parametrize("failure", [errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_full_flush_that_fails(monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    """Is not made up for by a lesser one."""
    flushes = Flushes(monkeypatch)
    flushes.refusal = failure
    with pytest.raises(OSError) as e:
        system.flush(7)
    assert e.value.errno == failure and flushes.plain == []


def test_flush_of_a_folder_closes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    system.flush_folder(tmp_path)
    (fd,) = flushes.plain + flushes.full
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(FileNotFoundError):
        system.flush_folder(tmp_path / "none")


def test_flush_of_no_file() -> None:
    with pytest.raises(OSError) as e:
        system.flush(987)
    assert e.value.errno == errno.EBADF


# The page cache


@pytest.mark.parametrize("size", [0, 1, 100_000, 1 << 20])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, 10), (4097, 30_000), (70_000, 0), (1 << 21, 5)])
def test_forgotten_pages_are_read_again(tmp_path: Path, size: int, offset: int, nbytes: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    fd = system.open_for_reading(path, direct=False)
    try:
        system.flush(fd)
        assert system.forget_pages(fd, offset, nbytes)
        assert os.pread(fd, size + 1, 0) == data
        part = data[offset : offset + nbytes]
        if len(part) == nbytes:
            assert crc32_on_disk(fd, offset, nbytes) == zlib.crc32(part)
    finally:
        os.close(fd)


def test_what_was_written_is_not_forgotten_before_it_is_on_the_disk(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        for i in range(20):
            os.pwrite(fd, bytes([i]) * 50_000, 50_000 * i)
            system.forget_pages(fd)
        assert os.pread(fd, 1 << 20, 0) == b"".join(bytes([i]) * 50_000 for i in range(20))
    finally:
        os.close(fd)


def test_pages_of_what_is_no_file() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError):
            system.forget_pages(987)
        if not system.LINUX:
            assert system.forget_pages(reading)  # there is nothing to forget
    finally:
        os.close(reading)
        os.close(writing)


def test_open_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16384)
    for direct in (False, True):
        try:
            fd = system.open_for_reading(path, direct)
        except OSError as e:
            assert direct and e.errno == errno.EINVAL  # the file system of the folder has no direct reads
            continue
        assert not os.get_inheritable(fd)
        os.close(fd)
        with pytest.raises(FileNotFoundError):
            system.open_for_reading(tmp_path / "none", direct)


@macos
def test_direct_reads_leave_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16384)
    commands, real = [], system.fcntl.fcntl
    monkeypatch.setattr(system.fcntl, "fcntl", lambda *call: (commands.append(call), real(*call))[1])
    through, around = (system.open_for_reading(path, direct) for direct in (False, True))
    assert commands == [(around, 48, 1)]  # F_NOCACHE
    assert crc32_on_disk(through, 0, 16384) == zlib.crc32(b"x" * 16384)
    assert commands[1:] == [(through, 48, 1)]
    os.close(through)
    os.close(around)


@macos
def test_open_for_direct_reads_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    opened = []

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        opened.append(fd)
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(system.fcntl, "fcntl", refuse)
    with pytest.raises(OSError):
        system.open_for_reading(path, direct=True)
    with pytest.raises(OSError):
        os.fstat(opened[0])


# Processors and the machine


def test_processors() -> None:
    processors = system.usable_processors()
    assert processors == sorted(set(processors)) and 1 <= len(processors) <= (os.cpu_count() or 1)
    system.stay_on(10**4)  # there is none: no error


def test_peak_memory_is_in_bytes() -> None:
    before = system.peak_memory()
    assert 10**7 < before < 10**12
    block = bytearray(300 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert system.peak_memory() >= max(before, 300 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_description() -> None:
    name = "Linux" if system.LINUX else "Darwin"
    assert system.system_name() == name
    assert system.description() == f"{name} {system.machine_name()}, {os.cpu_count()} cores"
