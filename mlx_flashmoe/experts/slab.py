"""The memory behind the arena: where a reading thread puts bytes so that kernels find them in a slot.

On unified memory (Metal, and the CPU) that is the slab's own memory, and nothing is ever copied. A discrete
CUDA GPU has memory of its own: MLX's managed memory would fault pages to and fro, stale contents included, so
there each reading thread reads into pinned memory and copies from it over the bus, while other threads read.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, Protocol, cast

import mlx.core as mx

from mlx_flashmoe.errors import MemoryPlanError


class Slab(Protocol):
    """uint32 [slots, words] that kernels read, and the way into it.

    ``begin`` gives a reading thread memory for bytes [start, stop) of a slot; ``finish``, called by the same
    thread when they are there, returns once kernels launched from now on see them.
    """

    array: mx.array

    def begin(self, slot: int, start: int, stop: int) -> memoryview: ...

    def finish(self, slot: int, start: int, stop: int) -> None: ...


class UnifiedSlab:
    """Host and device share the memory: bytes are read where they are used."""

    def __init__(self, slots: int, slot_bytes: int):
        self.array = mx.zeros((slots, slot_bytes // 4), dtype=mx.uint32)
        mx.eval(self.array)
        self._slot_bytes = slot_bytes
        # An alias, not a copy: mlx exposes an evaluated array's memory, writable.
        self._memory = memoryview(cast(Any, self.array)).cast("B")

    def begin(self, slot: int, start: int, stop: int) -> memoryview:
        first = slot * self._slot_bytes
        return self._memory[first + start : first + stop]

    def finish(self, slot: int, start: int, stop: int) -> None:
        pass


class CudaSlab:
    """Device memory, filled through pinned memory, one buffer and one stream for each reading thread."""

    def __init__(self, slots: int, slot_bytes: int):
        self.array = mx.zeros((slots, slot_bytes // 4), dtype=mx.uint32)
        mx.eval(self.array)
        mx.synchronize()
        self._slot_bytes = slot_bytes
        self._cuda = _Cuda()
        self._address = _device_address(self.array)
        self._thread = threading.local()

    def begin(self, slot: int, start: int, stop: int) -> memoryview:
        if not hasattr(self._thread, "staging"):
            self._thread.staging = self._cuda.pinned(self._slot_bytes)
            self._thread.stream = self._cuda.stream()
        return self._thread.staging.view[: stop - start]

    def finish(self, slot: int, start: int, stop: int) -> None:
        to = self._address + slot * self._slot_bytes + start
        self._cuda.copy(to, self._thread.staging.address, stop - start, self._thread.stream)


def make_slab(slots: int, slot_bytes: int) -> Slab:
    """A slab in the memory of the current device."""
    if mx.default_device() == mx.gpu and not mx.metal.is_available():
        return CudaSlab(slots, slot_bytes)
    return UnifiedSlab(slots, slot_bytes)


def _device_address(array: mx.array) -> int:
    """Where kernels see ``array``: asked of a kernel, because asking MLX for it moves it to managed memory."""
    kernel: Any = mx.fast.cuda_kernel(
        name="flashmoe_address",
        input_names=["slab"],
        output_names=["address"],
        source="if (threadIdx.x == 0) address[0] = reinterpret_cast<unsigned long long>(slab);",
    )
    (address,) = kernel(
        inputs=[array],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.uint64],
    )
    return int(address.item())


class _Pinned:
    """Page-locked host memory, freed with the object."""

    def __init__(self, cuda: _Cuda, address: int, nbytes: int):
        self._cuda = cuda
        self.address = address
        self.view = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")

    def __del__(self) -> None:
        self._cuda.free(self.address)


class _Cuda:
    """The few calls of the CUDA runtime that are needed, from the library MLX itself has loaded."""

    def __init__(self) -> None:
        self._lib: Any = None
        for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
            try:
                self._lib = ctypes.CDLL(name)
                break
            except OSError:
                continue
        if self._lib is None:
            raise MemoryPlanError("the CUDA runtime (libcudart) cannot be loaded")

    def _check(self, code: int, what: str) -> None:
        if code != 0:
            raise MemoryPlanError(f"CUDA: {what} failed with error {code}")

    def pinned(self, nbytes: int) -> _Pinned:
        address = ctypes.c_void_p()
        self._check(
            self._lib.cudaMallocHost(ctypes.byref(address), ctypes.c_size_t(nbytes)), "pinning memory"
        )
        return _Pinned(self, cast(int, address.value), nbytes)

    def free(self, address: int) -> None:
        self._lib.cudaFreeHost(ctypes.c_void_p(address))

    def stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        non_blocking = 1
        code = self._lib.cudaStreamCreateWithFlags(ctypes.byref(stream), ctypes.c_uint(non_blocking))
        self._check(code, "making a stream")
        return stream

    def copy(self, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
        """Host to device; returns when it is over."""
        host_to_device = 1
        code = self._lib.cudaMemcpyAsync(
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_int(host_to_device),
            stream,
        )
        self._check(code or self._lib.cudaStreamSynchronize(stream), "copying to the device")
