"""CUDA kernels compiled by NVIDIA's run-time compiler, and kept on disk.

``mx.fast.cuda_kernel`` compiles in every process anew, and includes headers that take ten times as long as a kernel
of ours. Here a kernel includes nothing but the 16-bit floats, what was compiled stays in the user's cache, and MLX
launches it through ``mx.fast.precompiled_cuda_kernel``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flashmoe import user_cache

TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.int32: "int",
    mx.uint32: "unsigned",
    mx.int64: "long long",
    mx.uint64: "unsigned long long",
}
_HEADER = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")  # MLX has loaded one of them


class Kernel:
    """A kernel whose arguments are its inputs, its outputs and then its scalars. Called as MLX's kernels are.

    Args:
        name: of the kernel; a C identifier.
        inputs, outputs: the names of the arrays.
        source: the body.
        header: what stands before the kernel.
        scalars: the names of the integers that follow the arrays.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        header: str = "",
        scalars: Sequence[str] = (),
    ):
        self._name = name
        self._inputs = inputs
        self._outputs = outputs
        self._source = source
        self._header = header
        self._scalars = scalars
        self._compiled: dict[Any, bytes] = {}

    def __call__(
        self,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, int]] = (),
        scalars: Sequence[int] = (),
        **options: Any,
    ) -> list[mx.array]:
        """The outputs, lazily. ``template``: integer constants of the body; ``options``: of MLX's launch.

        Raises:
            RuntimeError: the kernel does not compile, with the compiler's log.
            FileNotFoundError: CUDA's compiler or its headers are missing.
        """
        types = (tuple(a.dtype for a in inputs), tuple(output_dtypes), tuple(template))
        compiled = self._compiled.get(types)
        if compiled is None:
            compiled = self._compiled[types] = build(self.text(*types))
        launched: list[mx.array] = mx.fast.precompiled_cuda_kernel(
            name=self._name,
            compiled_source=compiled,
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=scalars,
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
            **options,
        )
        return launched

    def text(
        self, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype], template: Sequence[tuple[str, int]]
    ) -> str:
        """The whole text for arrays of these dtypes."""
        parameters = [
            *(f"const {TYPES[dtype]}* {name}" for name, dtype in zip(self._inputs, inputs, strict=True)),
            *(f"{TYPES[dtype]}* {name}" for name, dtype in zip(self._outputs, outputs, strict=True)),
            *(f"int {name}" for name in self._scalars),
        ]
        constants = "".join(f"constexpr int {name} = {value};\n" for name, value in template)
        return (
            f"{_HEADER}{self._header}\n"
            f'extern "C" __global__ void {self._name}({", ".join(parameters)}) {{\n{constants}{self._source}\n}}\n'
        )


def build(text: str) -> bytes:
    """The machine code of a text for the GPU at hand, from the user's cache if it was compiled before.

    Raises:
        RuntimeError: it does not compile; with the compiler's log.
    """
    architecture = _architecture()
    name = hashlib.sha256(f"{architecture} {_version()}\n{text}".encode()).hexdigest()[:32] + ".cubin"
    kept = user_cache.read("kernels", name)
    if kept is None:
        kept = compile(text, architecture)
        user_cache.write("kernels", name, kept)
    return kept


def compile(text: str, architecture: str) -> bytes:
    """The machine code of a text for an architecture such as sm_90a. Raises RuntimeError with the compiler's log."""
    lib, program = _library(), ctypes.c_void_p()
    options = [
        b"--device-as-default-execution-space",
        f"--gpu-architecture={architecture}".encode(),
        f"--include-path={_headers()}".encode(),
    ]
    _check(lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        array = (ctypes.c_char_p * len(options))(*options)
        if lib.nvrtcCompileProgram(program, len(options), array) != 0:
            log = _text(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program)
            raise RuntimeError(
                f"the kernel does not compile: {log.rstrip(bytes(1)).decode(errors='replace')}"
            )
        return _text(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code != 0:
        _library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {_library().nvrtcGetErrorString(code).decode()}")


@cache
def _library() -> Any:
    for name in (*_LIBRARIES, *_in_packages("lib", "libnvrtc.so.1?")):
        try:
            return ctypes.CDLL(str(name))
        except OSError:
            continue
    raise FileNotFoundError(
        f"CUDA's run-time compiler cannot be loaded: none of {', '.join(_LIBRARIES)} is found"
    )


@cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@cache
def _architecture() -> str:
    info = mx.device_info()
    major, minor = int(info["compute_capability_major"]), int(info["compute_capability_minor"])
    return f"sm_{major}{minor}" + "a" * (major >= 9)  # "a": all instructions of this very architecture


@cache
def _headers() -> Path:
    """The folder of CUDA's headers: where MLX looks for them, in the Python packages first."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for header in (
        *_in_packages("include", "cuda_bf16.h"),
        *(Path(home) / "include" / "cuda_bf16.h" for home in homes if home),
    ):
        if header.exists():
            return header.parent
    raise FileNotFoundError("CUDA's headers are not found: give the folder of a CUDA toolkit in CUDA_HOME")


def _in_packages(folder: str, pattern: str) -> list[Path]:
    """The files of NVIDIA's Python packages in ``folder`` that match."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [path for place in places or [] for path in sorted(Path(place).glob(f"*/{folder}/{pattern}"))]
