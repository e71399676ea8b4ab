"""What a discrete CUDA GPU needs to get bytes in and small results out without MLX's managed memory.

MLX hands a device array to the host by moving it to managed memory, whose pages then fault to and fro; for the
few bytes of a router's choice that costs more than the choice. Pinned memory, which both sides see, does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_flashmoe.errors import MemoryPlanError
from mlx_flashmoe.kernels.nvrtc import Kernel


def is_current() -> bool:
    """Whether the current device is a CUDA GPU."""
    return bool(mx.default_device() == mx.gpu) and not mx.metal.is_available()


def device_address(array: mx.array) -> int:
    """Where kernels see ``array``: asked of a kernel, because asking MLX for it moves it to managed memory."""
    kernel = Kernel(
        "flashmoe_address",
        ["slab"],
        ["address"],
        "if (threadIdx.x == 0) address[0] = reinterpret_cast<unsigned long long>(slab);",
    )
    (address,) = kernel(
        inputs=[array],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.uint64],
    )
    return int(np.asarray(address)[0])


class HostCopy:
    """Brings small integer arrays to the host, through pinned memory. One at a time.

    Args:
        most: elements an array has at most; larger ones go MLX's own way.
    """

    def __init__(self, most: int = 4096):
        self._most = most
        self._pinned = Runtime().pinned(4 * most)
        self._host = np.frombuffer(self._pinned.view, dtype=np.int32)
        self._address = address_array(self._pinned.address)

    def __call__(self, array: mx.array) -> Callable[[], np.ndarray]:
        """Starts computing an array of 32-bit integers; the result waits for it and gives its values.

        No other may be started before that.
        """
        if array.size > self._most:
            mx.async_eval(array)
            return lambda: np.asarray(array).astype(np.int32)
        (done,) = _export_kernel()(
            inputs=[array, self._address],
            template=[("N", array.size)],
            grid=(array.size, 1, 1),
            threadgroup=(min(array.size, 256), 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )
        mx.async_eval(done)

        def values() -> np.ndarray:
            mx.eval(done)
            return self._host[: array.size].reshape(array.shape).copy()

        return values


def address_array(address: int) -> mx.array:
    """uint64 [1], in the device's own memory: how a kernel is told of memory that is not an MLX array."""
    array = mx.array([address], dtype=mx.uint64) + mx.array([0], dtype=mx.uint64)
    mx.eval(array)
    return array


@cache
def _export_kernel() -> Kernel:
    return Kernel(
        "flashmoe_export",
        ["values", "address"],
        ["done"],
        """
const int i = blockIdx.x * blockDim.x + threadIdx.x;
if (i < N) reinterpret_cast<int*>(address[0])[i] = values[i];
if (i == 0) done[0] = 1;
""",
    )


class Pinned:
    """Page-locked host memory, freed with the object."""

    def __init__(self, runtime: Runtime, address: int, nbytes: int):
        self._runtime = runtime
        self.address = address
        self.view = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")

    def __del__(self) -> None:
        self._runtime.free(self.address)


class Runtime:
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

    def pinned(self, nbytes: int) -> Pinned:
        address = ctypes.c_void_p()
        self._check(
            self._lib.cudaMallocHost(ctypes.byref(address), ctypes.c_size_t(nbytes)), "pinning memory"
        )
        return Pinned(self, cast(int, address.value), nbytes)

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
