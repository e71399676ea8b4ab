"""The operating system, where Linux and macOS differ: every call that one of them lacks or has otherwise.

No other module of the package asks which system it runs on. The statements about macOS come from its documentation and
source: this has not run on a Mac yet. Importing it is cheap: it needs no MLX, and psutil only when memory is asked for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from mlx_flashmoe.errors import FlashMoEError

LINUX = sys.platform == "linux"


# Files

# The errors of file systems that have no full flush: network and non-Apple ones.
_NO_FULL_FLUSH = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


def flush(fd: int) -> None:
    """Puts what was written to a file, or a folder's entries, on the disk for good: they outlive a power cut.

    Raises:
        OSError: writing failed.
    """
    if sys.platform == "darwin":
        try:
            # fsync leaves the data in the disk's own cache there.
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as e:
            if e.errno not in _NO_FULL_FLUSH:
                raise
    os.fsync(fd)


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Puts a folder's entries on the disk for good. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        flush(fd)
    finally:
        os.close(fd)


def open_for_reading(path: Path, direct: bool) -> int:
    """A file descriptor. ``direct``: reads go around the operating system's page cache.

    Raises:
        OSError: it cannot be opened, or not in this way.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    if not direct:
        return os.open(path, flags)
    if sys.platform == "linux":
        return os.open(path, flags | os.O_DIRECT)
    fd = os.open(path, flags)
    try:
        keep_no_pages(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def keep_no_pages(fd: int) -> None:
    """Has what is read and written through ``fd`` from now on leave no pages, on macOS; elsewhere does nothing.

    Raises:
        OSError: the file system has no such mode.
    """
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def forget_pages(fd: int, offset: int = 0, nbytes: int = 0) -> bool:
    """Has the page cache forget part of a file: those pages that are on the disk too.

    Args:
        fd: open for reading.
        offset, nbytes: of the part; 0 bytes: to the end of the file.

    Returns:
        whether the system could be told so.

    Raises:
        OSError: ``fd`` is no file's.
    """
    if sys.platform == "linux":
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return True
    size = os.fstat(fd).st_size
    end = min(size, offset + nbytes) if nbytes else size
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    return start >= end or _invalidate(fd, start, end - start)


_MS_INVALIDATE = 2  # of <sys/mman.h>, on macOS as on Linux


def _invalidate(fd: int, offset: int, nbytes: int) -> bool:
    """Forgets a file's pages through a mapping of them, which is how macOS does it."""
    import numpy as np  # not needed by a command that only parses its arguments

    try:
        pages = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
    except OSError:
        return False
    with pages:
        msync = ctypes.CDLL(None, use_errno=True).msync
        msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        address = np.frombuffer(pages, np.uint8).ctypes.data
        return bool(msync(address, nbytes, _MS_INVALIDATE) == 0)


# Processors


def usable_processors() -> list[int]:
    """The processors this process may use; where the system does not say which, as many as there are."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stay_on(processor: int) -> None:
    """Keeps the calling thread on a processor, on Linux; elsewhere does nothing."""
    if sys.platform == "linux":
        with suppress(OSError):  # the processor has been taken away since
            os.sched_setaffinity(0, {processor})  # 0: this thread alone


# The machine


def peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def system_name() -> str:
    """The operating system's name: "Linux", or "Darwin"."""
    return platform.system()


def release() -> str:
    """The operating system's name and version: "macOS 15.1", or "Linux" and the kernel's."""
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else f"{system_name()} {platform.release()}"


def machine_name() -> str:
    """The kind of processor: "arm64", "x86_64"."""
    return platform.machine()


def description() -> str:
    """System, kind of processor and number of cores, in words."""
    return f"{system_name()} {machine_name()}, {os.cpu_count()} cores"


# Memory


def physical_memory() -> int:
    """Bytes of memory, or of a control group's limit on it: programs and page cache together."""
    import psutil

    return min([psutil.virtual_memory().total, *(group.limit for group in memory_groups())])


def available_memory() -> int:
    """Bytes that can be had without swapping: free memory, and what the system can give back at once.

    A control group allows its limit less what its programs hold. On macOS: free, purgeable and file-backed pages, as
    Activity Monitor counts; psutil's figure there leaves out page cache that was used lately, such as the experts of
    the last run.
    """
    import psutil

    available: int = psutil.virtual_memory().available
    pages = [sysctl(f"vm.page_{kind}_count") for kind in ("free", "purgeable", "pageable_external")]
    if None not in pages:
        available = os.sysconf("SC_PAGE_SIZE") * sum(filter(None, pages))
    return max(0, min([available, *(group.limit - group.held for group in memory_groups())]))


class MemoryGroup(NamedTuple):
    """A control group's limit, and the bytes of it that cannot be reclaimed, because they are no page cache."""

    limit: int
    held: int


def memory_groups(
    root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")
) -> list[MemoryGroup]:
    """The control groups with a memory limit that this process is in (version 1 and 2), and their parents."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            top, limit, usage, cached = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        elif controllers == "":
            top, limit, usage, cached = root, "memory.max", "memory.current", ""
        else:
            continue
        folder = top / path.lstrip("/")
        # In a container the path can be the host's: then only the top is there.
        for group in [folder, *(p for p in folder.parents if p == top or top in p.parents)]:
            with suppress(OSError, ValueError):  # no such group, or "max"
                most = int((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                files = sum(int(stat[f"{cached}{kind}_file"]) for kind in ("active", "inactive"))
                groups.append(MemoryGroup(most, max(0, int((group / usage).read_text()) - files)))
    return groups


Pressure = Literal["normal", "warning", "critical"]

# Elsewhere than on macOS: memory is short if less than the first share is available and the system swaps out, or less
# than the second anyway.
SHORT, VERY_SHORT = 0.05, 0.02


class PressureGauge:
    """How short of memory the system is: macOS's own judgement, elsewhere from what is available and swapped out.

    Linux's pressure-stall figures are no measure here: they count the page cache's misses, which are this program's
    normal way of working.
    """

    def __init__(self) -> None:
        self._swapped = _swapped_out()

    def __call__(self) -> Pressure:
        """The pressure now; memory is swapped out if more is than at the last call."""
        level = sysctl("kern.memorystatus_vm_pressure_level")
        if level is not None:
            return "critical" if level >= 4 else "warning" if level >= 2 else "normal"
        before, self._swapped = self._swapped, _swapped_out()
        share = available_memory() / physical_memory()
        if share < VERY_SHORT:
            return "critical"
        return "warning" if share < SHORT and self._swapped > before else "normal"


def _swapped_out() -> int:
    """Bytes swapped out since the system was started."""
    import psutil

    return int(psutil.swap_memory().sout)


# macOS


def on_mac() -> bool:
    return sys.platform == "darwin"


def sysctl(name: str) -> int | None:
    """An integer setting or figure of macOS; None if there is none of the name, as on other systems."""
    if not on_mac():
        return None
    value, size = ctypes.create_string_buffer(8), ctypes.c_size_t(8)
    call = ctypes.CDLL(None).sysctlbyname
    call.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    if call(name.encode(), value, ctypes.byref(size), None, 0) != 0:
        return None
    return int.from_bytes(value.raw[: size.value], sys.byteorder, signed=True)


# Sleep


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keeps a Mac from going to sleep by itself; closing the lid still does. Nothing happens on other systems."""
    pid = None
    if on_mac():
        # Not subprocess: that would fork a process that may hold most of the memory. A group of its own: Ctrl-C is
        # not for it. It ends with this process in any case (-w).
        nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        command = ["caffeinate", "-i", "-w", str(os.getpid())]
        with suppress(OSError):
            pid = os.posix_spawnp(command[0], command, os.environ, file_actions=nowhere, setpgroup=0)
    try:
        yield
    finally:
        if pid is not None:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)


# The processor


def translated() -> bool:
    """This is an Apple Silicon Mac, but Python is a program for Intel processors, which Rosetta translates."""
    return sysctl("sysctl.proc_translated") == 1


def check_processor() -> None:
    """Refuses Macs without Apple Silicon, and Pythons that are not for it: MLX has no GPU there, nor packages.

    Raises:
        FlashMoEError: says what to do.
    """
    if not on_mac() or platform.machine() != "x86_64":
        return
    if translated():
        raise FlashMoEError(
            "this Python is an Intel program that Rosetta translates, and MLX needs a native one: install Python "
            "for Apple Silicon, from python.org or with /opt/homebrew/bin/brew, and make the environment anew with it"
        )
    raise FlashMoEError("this is a Mac with an Intel processor: MLX needs Apple Silicon, or Linux")
