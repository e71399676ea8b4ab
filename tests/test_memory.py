"""What the system says of its memory: limits of control groups, what is available, and how short it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashmoe import system
from mlx_flashmoe.memory import Room
from mlx_flashmoe.system import PressureGauge, available_memory, memory_groups, physical_memory

GB = 10**9
V1 = Path("/sys/fs/cgroup/memory")


class Machine:
    """A machine's figures, which a test can change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.total, self.available, self.swapped = 16 * GB, 8 * GB, 0
        self.settings: dict[str, int] = {}
        self.groups: list[tuple[int, int]] = []
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: SimpleNamespace(total=self.total, available=self.available)
        )
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(sout=self.swapped))
        monkeypatch.setattr(system, "available_memory", available_memory)
        monkeypatch.setattr(system, "sysctl", lambda name: self.settings.get(name))
        monkeypatch.setattr(system, "memory_groups", lambda: self.groups)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# Control groups


def write_group(folder: Path, version: int, limit: int | str, usage: int, cached: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    for name, value in zip(names, (limit, usage)):
        (folder / name).write_text(f"{value}\n")
    before = "total_" if version == 1 else ""
    stat = "".join(f"{before}{kind} {size}\n" for kind, size in cached.items())
    (folder / "memory.stat").write_text(f"anon 5\n{stat}shmem 7\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_allows_its_limit_less_what_is_no_page_cache(version: int, tmp_path: Path) -> None:
    top = tmp_path / ("memory" if version == 1 else "")
    unlimited = 2**63 - 4096 if version == 1 else "max"
    write_group(top / "a" / "b", version, unlimited, 3 * GB, {"active_file": GB, "inactive_file": GB})
    write_group(top / "a", version, 8 * GB, 5 * GB, {"active_file": GB, "inactive_file": 2 * GB})
    proc = tmp_path / "proc"
    proc.write_text(f"3:cpu,cpuacct:/other\n{'5:memory' if version == 1 else '0:'}:/a/b\n")
    limited = [group for group in memory_groups(tmp_path, proc) if group.limit < 2**60]
    assert limited == [(8 * GB, 2 * GB)]
    # In a container the path is the host's, which is not there; the top is the container's own group.
    proc.write_text(f"{'5:memory' if version == 1 else '0:'}:/docker/0123\n")
    assert memory_groups(tmp_path, proc) == []
    write_group(top, version, 2 * GB, GB, {"active_file": 0, "inactive_file": 0})
    assert memory_groups(tmp_path, proc) == [(2 * GB, GB)]


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert memory_groups(tmp_path, tmp_path / "missing") == []
    (tmp_path / "proc").write_text("0::/\n")
    assert memory_groups(tmp_path, tmp_path / "proc") == []


@given(st.lists(st.tuples(st.integers(0, 20 * GB), st.integers(0, 20 * GB)), max_size=4))
def test_the_tightest_group_counts(groups: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch)
        machine.groups = [system.MemoryGroup(limit, held) for limit, held in groups]
        assert physical_memory() == min([16 * GB, *(limit for limit, _ in groups)])
        left = [max(0, limit - held) for limit, held in groups]
        assert available_memory() == min([8 * GB, *left])
        assert 0 <= available_memory() <= physical_memory()


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of version 1 with 256 MB."""
    if system.on_mac() or os.geteuid() != 0 or not (V1 / "cgroup.procs").exists():
        pytest.skip("needs root and control groups of version 1")
    group = V1 / f"flashmoe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(256 * 2**20))
    except OSError as e:
        pytest.skip(f"control groups of version 1 cannot be made here: {e.strerror}")
    yield group
    (group / "memory.force_empty").write_text("0")
    group.rmdir()


def test_a_real_group_counts_what_is_held_and_not_the_page_cache(group: Path, tmp_path: Path) -> None:
    """100 MB of a file that was read can be had again, 100 MB of a program cannot."""
    (tmp_path / "file").write_bytes(b"1" * 100 * 2**20)
    os.sync()
    script = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import psutil
from mlx_flashmoe.system import available_memory, physical_memory
psutil.virtual_memory = lambda: SimpleNamespace(total=2**40, available=2**40)  # the group's figures alone count
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
file = os.open(sys.argv[2], os.O_RDONLY)
before = available_memory()
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
while os.read(file, 2**20):
    pass
read = available_memory()
held = bytearray(os.urandom(2**20)) * 100
print(physical_memory(), before, read, available_memory())
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, group, tmp_path / "file"], capture_output=True, text=True, check=True
    )
    total, before, read, holding = (int(n) / 2**20 for n in ran.stdout.split())
    assert total == 256 and 200 < before <= 256
    assert read == pytest.approx(before, abs=15)
    assert holding == pytest.approx(before - 100, abs=20)


# Available


def test_what_is_available_is_not_more_than_there_is() -> None:
    assert 0 < available_memory() <= physical_memory()
    assert physical_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = Room.here()
    assert 0 < room.free <= room.available <= room.total


def test_on_macos_all_page_cache_is_available_however_lately_it_was_used(machine: Machine) -> None:
    """psutil has only the inactive part, so that a second run would find less than the first."""
    page = system.os.sysconf("SC_PAGE_SIZE")
    machine.available = 2 * GB
    machine.settings = {"vm.page_free_count": 1000, "vm.page_purgeable_count": 0}
    assert available_memory() == 2 * GB  # not all figures: psutil's
    machine.settings["vm.page_pageable_external_count"] = 500_000
    assert available_memory() == 501_000 * page


# Pressure


@pytest.mark.parametrize(("level", "pressure"), [(1, "normal"), (2, "warning"), (4, "critical")])
def test_macos_says_itself_how_short_of_memory_it_is(level: int, pressure: str, machine: Machine) -> None:
    machine.settings = {"kern.memorystatus_vm_pressure_level": level}
    machine.available = 10**6  # its own judgement counts
    assert PressureGauge()() == pressure


def test_elsewhere_memory_is_short_if_little_is_left_and_swap_grows(machine: Machine) -> None:
    gauge = PressureGauge()
    for available, swapped, pressure in (
        (0.5, 0, "normal"),
        (0.5, 1000, "normal"),  # swaps, but has enough
        (0.04, 1000, "normal"),  # little left, but does not swap
        (0.04, 2000, "warning"),
        (0.04, 2000, "normal"),
        (0.01, 2000, "critical"),  # however it came
        (0.06, 3000, "normal"),
    ):
        machine.available, machine.swapped = int(available * machine.total), swapped
        assert gauge() == pressure, (available, swapped)
