"""macOS as it differs: settings by number, sleep, Rosetta. Here on a system that is made to look like it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_flashmoe import system
from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.system import check_processor, keep_awake, sysctl, translated

# Settings


class Libc:
    """A C library with sysctlbyname, called as the real one is.

    Args:
        values: by name, as the bytes that the system writes.
    """

    SIGNATURE = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
        ctypes.c_size_t,
    )

    def __init__(self, values: dict[str, bytes]):
        def call(
            name: bytes, value: int, size: ctypes._Pointer[ctypes.c_size_t], new: int, length: int
        ) -> int:
            assert new is None and length == 0  # nothing is set
            written = values.get(name.decode())
            if written is None or len(written) > size[0]:
                return -1
            ctypes.memmove(value, written, len(written))
            size[0] = len(written)
            return 0

        self.sysctlbyname = self.SIGNATURE(call)


def test_settings_are_read_in_the_size_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "hw.memsize": (48 * 2**30).to_bytes(8, sys.byteorder),
        "iogpu.wired_limit_mb": (40000).to_bytes(4, sys.byteorder),
        "kern.minus": (-1).to_bytes(4, sys.byteorder, signed=True),
        "kern.version": b"Darwin Kernel Version",
    }
    libc = Libc(values)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(system, "on_mac", lambda: False)
    assert sysctl("hw.memsize") is None  # not even asked
    monkeypatch.setattr(system, "on_mac", lambda: True)
    assert sysctl("hw.memsize") == 48 * 2**30
    assert sysctl("iogpu.wired_limit_mb") == 40000
    assert sysctl("kern.minus") == -1
    assert sysctl("kern.version") is None and sysctl("no.such.setting") is None


# Processors


@pytest.mark.parametrize(
    ("mac", "machine", "setting", "says"),
    [
        (True, "arm64", 0, None),
        (True, "arm64", None, None),
        (False, "x86_64", None, None),
        (
            True,
            "x86_64",
            1,
            "Rosetta translates, and MLX needs a native one: install Python for Apple Silicon",
        ),
        (True, "x86_64", 0, "a Mac with an Intel processor: MLX needs Apple Silicon, or Linux"),
        (True, "x86_64", None, "a Mac with an Intel processor"),
    ],
)
def test_what_mlx_has_no_gpu_for_is_refused(
    mac: bool, machine: str, setting: int | None, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "on_mac", lambda: mac)
    monkeypatch.setattr(system, "sysctl", {"sysctl.proc_translated": setting}.get)
    monkeypatch.setattr(system.platform, "machine", lambda: machine)
    assert translated() == (setting == 1)
    if says is None:
        check_processor()
    else:
        with pytest.raises(FlashMoEError, match=says):
            check_processor()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "x", "--prompt", "y"],
        ["doctor"],
        ["convert", "--hf-path", "x", "--mlx-path", "y"],
    ],
)
def test_a_translated_python_is_refused_in_one_line_before_anything_heavy_is_imported(
    arguments: list[str],
) -> None:
    script = """
import sys
from mlx_flashmoe import cli, system
system.on_mac, system.platform.machine = lambda: True, lambda: "x86_64"
system.sysctl = {"sysctl.proc_translated": 1}.get
for heavy in ("mlx", "psutil", "numpy", "tokenizers"):  # none of which such a Python may have
    sys.modules[heavy] = None
sys.exit(cli.main(sys.argv[1:]))
"""
    for more, status in ((arguments, 2), ([arguments[0], "--help"], 0), (["--version"], 0)):
        ran = subprocess.run([sys.executable, "-c", script, *more], capture_output=True, text=True)
        assert ran.returncode == status
        if status:
            assert ran.stderr.count("\n") == 1 and ran.stderr.startswith(
                "error: this Python is an Intel program"
            )
        else:
            assert ran.stdout and not ran.stderr


# Sleep


class Caffeinate:
    """A program of that name on PATH, which says what it was given, and how it ended."""

    SCRIPT = """#!{python}
import os, signal, sys, time
log = open({log!r}, "a", buffering=1)
def end(number, frame):
    log.write("ended\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
log.write(" ".join(["began", *sys.argv[1:]]) + "\\n")
log.write(f"{{os.getpgid(0) == os.getpid()}} {{os.isatty(0) or os.isatty(1) or os.isatty(2)}}\\n")
while os.getppid() == int(sys.argv[-1]):  # -w: as long as that process lives
    time.sleep(0.02)
log.write("left alone\\n")
"""

    def __init__(self, folder: Path):
        self._log = folder / "log"
        program = folder / "caffeinate"
        program.write_text(self.SCRIPT.format(python=sys.executable, log=str(self._log)))
        program.chmod(0o755)

    def lines(self, count: int) -> list[str]:
        """What it has said, once that are so many lines."""
        deadline = time.monotonic() + 60
        while True:
            lines = self._log.read_text().splitlines() if self._log.exists() else []
            if len(lines) >= count or time.monotonic() > deadline:
                return lines
            time.sleep(0.01)


@pytest.fixture
def caffeinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caffeinate]:
    monkeypatch.setattr(system, "on_mac", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    yield Caffeinate(tmp_path)


STARTED = [f"began -i -w {os.getpid()}", "True False"]  # out of reach of Ctrl-C and of the terminal


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_mac_is_kept_awake_as_long_as_something_goes_on(
    error: type[BaseException] | None, caffeinate: Caffeinate, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    spawn = os.posix_spawnp

    def spawned(*arguments: Any, **options: Any) -> int:
        started.append(spawn(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(os, "posix_spawnp", spawned)
    try:
        with keep_awake():
            assert caffeinate.lines(2) == STARTED
            if error is not None:
                raise error
    except BaseException as e:
        assert error is not None and type(e) is error
    assert caffeinate.lines(3) == [*STARTED, "ended"]
    (pid,) = started
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # nothing is left of it


def test_a_process_that_is_killed_does_not_keep_a_mac_awake(caffeinate: Caffeinate) -> None:
    script = """
import os, sys, time
from mlx_flashmoe import system
system.on_mac = lambda: True
with system.keep_awake():
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        assert caffeinate.lines(2)[0] == f"began -i -w {pid}"
        process.kill()
    assert caffeinate.lines(3)[2] == "left alone"


def test_without_the_program_work_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "on_mac", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with keep_awake():
        pass
    (tmp_path / "caffeinate").write_text("not a program")
    with keep_awake():
        pass


def test_other_systems_are_left_alone(caffeinate: Caffeinate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "on_mac", lambda: False)
    with keep_awake():
        time.sleep(0.1)
    assert caffeinate.lines(0) == []
