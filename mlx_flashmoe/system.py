"""The operating system, where Linux and macOS differ: every call that one of them lacks or has otherwise.

No other module of the package asks which system it runs on. What is said here of macOS was read, not tried: nobody
has run it on a Mac yet.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

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


def machine_name() -> str:
    """The kind of processor: "arm64", "x86_64"."""
    return platform.machine()


def description() -> str:
    """System, kind of processor and number of cores, in words."""
    return f"{system_name()} {machine_name()}, {os.cpu_count()} cores"
