"""make test-darwin is what it says: the project sees macOS, in every process, and everybody else sees Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_flashmoe import system

HERE = Path(__file__).parent
SHAPE = HERE / "darwin"

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS is shown on Linux; a Mac has no need of it")


def in_shape(code: str, tmp_path: Path) -> str:
    """The output of a program in a process of make test-darwin's.

    Args:
        code: the program; ``probe`` in it is PROBE, a module as if of the project's.
        tmp_path: an empty folder.
    """
    package = tmp_path / "examples"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "probe.py").write_text(PROBE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SHAPE, tmp_path)))}
    program = f"from examples import probe\n{code}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PROBE = """
import fcntl, mmap, os, os.path, platform, resource, sys
import pathlib, shutil, tempfile
from sys import platform as named

def refused(call, *arguments):
    try:
        call(*arguments)
    except Exception as e:
        return type(e).__name__
    return ""

def numba():
    import numba
"""


def test_this_process_has_the_shape_that_it_should_have() -> None:
    """Otherwise make test-darwin would pass as make test does."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    shaped = sys.platform != "linux" or str(SHAPE) in folders
    assert shaped != system.LINUX


@linux
@pytest.mark.parametrize(
    ("code", "sees"),
    [
        ("probe.sys.platform, probe.named, probe.platform.system()", ("darwin", "darwin", "Darwin")),
        ("[hasattr(probe.os, n) for n in ('posix_fadvise', 'O_DIRECT', 'MFD_CLOEXEC')]", [False] * 3),
        (
            "[n in dir(probe.os) for n in ('memfd_create', 'timerfd_create', 'sched_getaffinity')]",
            [False] * 3,
        ),
        ("probe.fcntl.F_FULLFSYNC, probe.fcntl.F_NOCACHE", (51, 48)),
        (
            "probe.os.getpid() == os.getpid(), probe.os.path is os.path, probe.sys.path is sys.path",
            (True,) * 3,
        ),
        ("sys.platform, hasattr(os, 'posix_fadvise')", ("linux", True)),
    ],
)
def test_who_sees_what(tmp_path: Path, code: str, sees: object) -> None:
    assert in_shape(f"import os, sys; print(({code}))", tmp_path) == str(sees)


@linux
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("probe.refused(probe.pathlib.Path('/proc/meminfo').read_text)", "FileNotFoundError"),
        ("probe.refused(probe.os.open, '/proc/self/cgroup', 0)", "FileNotFoundError"),
        ("probe.refused(probe.os.listdir, '/proc')", "FileNotFoundError"),
        ("probe.refused(probe.shutil.copyfile, '/sys/fs/cgroup/x', '/dev/null')", "FileNotFoundError"),
        ("probe.refused(lambda: probe.os.posix_fadvise(0, 0, 0, 0))", "AttributeError"),
        ("probe.refused(probe.os.fsync, 0)", "AssertionError"),
        ("probe.refused(probe.os.pread, 0, 2**31, 0)", "OSError"),
        ("probe.refused(probe.os.preadv, 0, [memoryview(bytes(2**20))] * 2048, 0)", "OSError"),
        ("probe.refused(probe.os.sysconf, 'SC_AVPHYS_PAGES')", "ValueError"),
        ("probe.refused(probe.fcntl.fcntl, 987, 51)", "OSError"),
        ("probe.refused(probe.fcntl.fcntl, 'no descriptor', 48, 1)", "AttributeError"),
        ("probe.refused(probe.numba)", "ModuleNotFoundError"),
        ("probe.refused(probe.tempfile.mkdtemp)", ""),
    ],
)
def test_what_is_refused(tmp_path: Path, call: str, error: str) -> None:
    assert in_shape(f"print({call})", tmp_path) == error


@linux
def test_replaced_functions_are_seen(tmp_path: Path) -> None:
    """As tests do it: in the real module, or in the project's view of it."""
    code = """
import os
os.getpid = lambda: "replaced"
print(probe.os.getpid())
probe.os.getppid = lambda: "replaced there"
print(os.getppid())
probe.os.fsync = lambda fd: None
print(probe.os.fsync(0), os.fsync is probe.os.fsync)
os.fsync = lambda fd: print("flushed", fd)
probe.fcntl.fcntl(1, probe.fcntl.F_FULLFSYNC)
"""
    assert in_shape(code, tmp_path).splitlines() == ["replaced", "replaced there", "None False", "flushed 1"]


@linux
@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run([sys.executable, '-c', ask], check=True)",
        "subprocess.run([sys.executable, '-m', 'examples.asked'], check=True)",
        "multiprocessing.get_context('spawn').Pool(1).apply(exec, [ask])",
        "multiprocessing.get_context('forkserver').Pool(1).apply(exec, [ask])",
        "multiprocessing.get_context('fork').Pool(1).apply(exec, [ask])",
    ],
)
def test_children_are_shaped_too(tmp_path: Path, start: str) -> None:
    ask = "from mlx_flashmoe import system; print(system.LINUX, flush=True)"
    code = f"""
import multiprocessing, pathlib, subprocess, sys
ask = {ask!r}
pathlib.Path(probe.__file__).with_name("asked.py").write_text(ask)
if __name__ == "__main__":
    {start}
"""
    assert in_shape(code, tmp_path) == "False"
