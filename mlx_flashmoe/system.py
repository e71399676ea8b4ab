"""The machine and its operating system: memory, sleep, the kind of processor.

Light to import: nothing of MLX, and psutil only when it is asked.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from mlx_flashmoe.errors import FlashMoEError

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
