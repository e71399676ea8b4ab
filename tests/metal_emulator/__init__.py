"""An emulation of Metal for testing kernels where there is no Mac. It is not a Mac.

The text that MLX would hand to Apple's compiler is obtained from MLX itself, compiled as C++ against
``metal_emulator.h`` and executed on the CPU; that header says what is checked. Usage::

    launches = record(metal.LANGUAGE, lambda language, x, ...: gpu.expert_ffn(language, x, ...), x, ...)
    libraries = compile_kernels(launches, folder)
    outputs = run(libraries, [Job(launches, {"x": ..., ...})])

Only the declarations of threadgroup arrays are rewritten, to memory shared by a threadgroup's threads.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
CLANG = next(filter(None, map(shutil.which, ("clang++", "clang++-14", "clang++-16", "clang++-18"))), None)
FLAGS = ["-std=gnu++14", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra"]
FLAGS += ["-march=native"] if platform.machine() == "x86_64" else []  # for its fma; ARM always has one
FLAGS += ["-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-ignored-attributes"]
FLAGS += ["-Wno-unused-parameter", "-Wno-unused-but-set-parameter", "-Wno-type-limits", "-Wno-div-by-zero"]
FLAGS += ["-Wno-deprecated-declarations"]  # macOS calls ucontext's functions deprecated
DTYPES = {mx.float32: np.float32, mx.bfloat16: np.uint16, mx.float16: np.float16, mx.int32: np.int32}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as MLX would make it. ``text`` is the whole Metal source, as MLX generates it."""

    text: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[Any, ...]

    @property
    def key(self) -> str:
        return "k" + hashlib.sha256(self.text.encode()).hexdigest()[:16]


@contextmanager
def _standard_output() -> Iterator[Callable[[], str]]:
    """Catches what C++ prints to standard output."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:

            def text() -> str:
                file.seek(0)
                return file.read().decode()

            yield text
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def record(language: Any, call: Callable[..., Any], *arrays: mx.array) -> list[Launch]:
    """Traces ``call(language, *arrays)`` and returns its launches, with the Metal that MLX generates for each."""
    launches: list[Launch] = []

    def make(name: str, inputs: list[str], outputs: list[str], source: str, header: str) -> Any:
        kernel = language.make_kernel(name, inputs, outputs, source, header)

        def launch(**arguments: Any) -> Any:
            with _standard_output() as text:
                result = kernel(**arguments, verbose=True)
                printed = text()
            match = re.fullmatch(r"Generated source code for `.*?`:\n```\n(.*)\n```\n", printed, re.DOTALL)
            assert match, printed
            launches.append(
                Launch(
                    match[1],
                    tuple(inputs),
                    tuple(outputs),
                    arguments["grid"],
                    arguments["threadgroup"],
                    tuple(map(tuple, arguments["output_shapes"])),
                    tuple(arguments["output_dtypes"]),
                )
            )
            return result

        return launch

    recorder = replace(language, make_kernel=make)
    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(f"{folder}/traced.mlxfn", lambda *a: call(recorder, *a), *arrays)
    return launches


SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
BUFFER = re.compile(r"\s*(const )?(device|constant) (\w+)\* (\w+) \[\[buffer\((\d+)\)\]\]")
POSITION = re.compile(r"\s*\w+ (\w+) \[\[(\w+)\]\]")
ARRAY = re.compile(r"(?m)^\s*(?:FM_ARRAY|threadgroup)\s+(\w+)\s+(\w+)\[([^\]]+)\];")


def _translation_unit(launches: Iterable[Launch]) -> str:
    parts = ['#include "metal_emulator.h"']
    for launch in launches:
        signature = SIGNATURE.search(launch.text)
        assert signature, launch.text
        arguments = []
        for parameter in signature[2].split(",\n"):
            if buffer := BUFFER.fullmatch(parameter):
                arguments.append(f"({buffer[1] or ''}{buffer[3]}*)buffers[{buffer[5]}]")
            else:
                position = POSITION.fullmatch(parameter)
                assert position, parameter
                arguments.append(f"emulator::self().{position[2]}")
        text = ARRAY.sub(r"EMULATOR_THREADGROUP_ARRAY(\1, \2, \3);", launch.text)
        defined = re.findall(r"(?m)^#define (\w+)", text)
        parts.append(f"namespace {launch.key} {{\n{text}\n}}")
        parts.extend(f"#undef {name}" for name in defined)
        parts.append(
            f'extern "C" void run_{launch.key}(int n, const emulator::Buffer* b, const int32_t* grid,'
            f" const int32_t* group, int backwards) {{\n"
            f"  emulator::launch([](void** buffers) {{ {launch.key}::{signature[1]}({', '.join(arguments)}); }},"
            f" n, b, grid, group, backwards);\n}}"
        )
    return "\n".join(parts)


def compile_kernels(launches: Iterable[Launch], folder: Path, units: int = 2) -> dict[str, Path]:
    """Compiles every distinct kernel; returns key -> shared library. `units` compilers run at once."""
    distinct = list({launch.key: launch for launch in launches}.values())
    each = 12  # a library
    batches = [distinct[i : i + each] for i in range(0, len(distinct), each)]
    folder.mkdir(parents=True, exist_ok=True)
    libraries: dict[str, Path] = {}

    def build(number: int) -> None:
        source, library = folder / f"unit{number}.cpp", folder / f"unit{number}.so"
        source.write_text(_translation_unit(batches[number]))
        command = [str(COMPILER), *FLAGS, f"-I{HERE}", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or done.stderr:
            raise AssertionError(f"{source} does not compile cleanly:\n{done.stderr[:8000]}")
        libraries.update((launch.key, library) for launch in batches[number])

    with ThreadPoolExecutor(units) as pool:
        list(pool.map(build, range(len(batches))))
    return libraries


def check_address_spaces(launch: Launch, clang: str) -> None:
    """Compiles the kernel with Metal's address spaces as clang's. Raises AssertionError with clang's message."""
    text = ARRAY.sub(r"extern threadgroup \1 \2[\3];", launch.text)  # clang has no such arrays in functions
    command = [clang, "-std=gnu++14", "-fsyntax-only", "-w", "-include", str(HERE / "address_spaces.h")]
    done = subprocess.run([*command, "-x", "c++", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


EXECUTED: list[Launch] = []  # what run() has run in this process without an objection, for report.py


@dataclass
class Sparse:
    """An array of `total` bytes of which only `pieces` (offset -> bytes) may be touched."""

    total: int
    pieces: dict[int, np.ndarray]


@dataclass
class Job:
    """Launches that follow each other: a launch's outputs are inputs of the next by name."""

    launches: list[Launch]
    inputs: dict[str, np.ndarray | Sparse]


def run(libraries: dict[str, Path], jobs: list[Job]) -> list[dict[str, np.ndarray]]:
    """Runs the jobs in a child process; returns every output by name. bfloat16 comes as uint16.

    Raises:
        AssertionError: a forbidden access, threads that wait for different things, or results that depend on
            the order of threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "question"), Path(folder, "answer")
        plain = [
            (
                [
                    (
                        str(libraries[m.key]),
                        m.key,
                        m.inputs,
                        m.outputs,
                        m.grid,
                        m.threadgroup,
                        m.output_shapes,
                        [np.dtype(DTYPES[d]).str for d in m.output_dtypes],
                    )
                    for m in job.launches
                ],
                {
                    k: (v.total, v.pieces) if isinstance(v, Sparse) else (v.nbytes, {0: v})
                    for k, v in job.inputs.items()
                },
            )
            for job in jobs
        ]
        question.write_bytes(pickle.dumps(plain))
        done = subprocess.run(
            [sys.executable, str(HERE / "worker.py"), str(question), str(answer)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise AssertionError(f"exit status {done.returncode}: {done.stderr[-3000:]}")
        results: list[dict[str, np.ndarray]] = pickle.loads(answer.read_bytes())
        EXECUTED.extend(launch for job in jobs for launch in job.launches)
        return results
