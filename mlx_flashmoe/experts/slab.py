"""The memory behind the arena: where a reading thread puts bytes so that kernels find them in a slot.

On unified memory (Metal, and the CPU) that is the slab's own memory, and nothing is ever copied. A discrete
CUDA GPU has memory of its own: MLX's managed memory would fault pages to and fro, stale contents included, so
there each reading thread reads into pinned memory and copies from it over the bus, while other threads read.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from mlx_flashmoe.errors import MemoryPlanError
from mlx_flashmoe.experts import cuda
from mlx_flashmoe.layout import PAGE

MOST_ELEMENTS = 2**31  # of a dimension of an MLX array, less one


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
        words = slot_bytes // 4
        if mx.default_device() != mx.cpu:  # a Metal buffer begins at a page by itself
            whole = array = mx.zeros((slots, words), dtype=mx.uint32)
            mx.eval(whole)
        else:
            whole, array = _aligned(slots, words)
        self.array = array
        self._first = _address(array) - _address(whole)
        self._stride = slot_bytes if whole.ndim == 1 else 4 * whole.shape[1]
        # An alias, not a copy: mlx exposes an evaluated array's memory, writable.
        self._memory = memoryview(cast(Any, whole)).cast("B")

    def begin(self, slot: int, start: int, stop: int) -> memoryview:
        first = self._first + slot * self._stride
        return self._memory[first + start : first + stop]

    def finish(self, slot: int, start: int, stop: int) -> None:
        pass


def _aligned(slots: int, words: int) -> tuple[mx.array, mx.array]:
    """Zeros uint32 [slots, words] in which every slot of whole pages begins at a page; the array they lie in first.

    MLX's arrays on a CPU are aligned to 8 bytes only: reading into them runs at two thirds of the speed, and direct
    reads fail.
    """
    spare = PAGE // 4
    flat = slots * words + spare < MOST_ELEMENTS
    # One dimension has its limit: where the slots would go beyond it each has a spare page of its own.
    whole = mx.zeros((slots * words + spare,) if flat else (slots, words + spare), dtype=mx.uint32)
    mx.eval(whole)
    skip = -_address(whole) % PAGE // 4
    array = (
        whole[skip : skip + slots * words].reshape(slots, words) if flat else whole[:, skip : skip + words]
    )
    mx.eval(array)
    if _address(array) != _address(whole) + 4 * skip:
        raise MemoryPlanError("[UnifiedSlab] MLX has copied a slice that should share its array's memory")
    return whole, array


def _address(array: mx.array) -> int:
    return int(np.asarray(array).ctypes.data)


class CudaSlab:
    """Device memory, filled through pinned memory, one buffer and one stream for each reading thread."""

    def __init__(self, slots: int, slot_bytes: int):
        self.array = mx.zeros((slots, slot_bytes // 4), dtype=mx.uint32)
        mx.eval(self.array)
        mx.synchronize()
        self._slot_bytes = slot_bytes
        self._cuda = cuda.Runtime()
        self._address = cuda.device_address(self.array)
        self._thread = threading.local()

    def begin(self, slot: int, start: int, stop: int) -> memoryview:
        if not hasattr(self._thread, "staging"):
            self._thread.staging = self._cuda.pinned(self._slot_bytes)
            self._thread.stream = self._cuda.stream()
        return self._thread.staging.view[: stop - start]

    def finish(self, slot: int, start: int, stop: int) -> None:
        to = self._address + slot * self._slot_bytes + start
        self._cuda.copy(to, self._thread.staging.address, stop - start, self._thread.stream)


class HostSlab:
    """Plain host memory, for experts that are read but not computed with."""

    def __init__(self, slots: int, slot_bytes: int):
        self.host = np.zeros((slots, slot_bytes // 4), dtype=np.uint32)
        self.array = mx.zeros((0,), dtype=mx.uint32)

    def begin(self, slot: int, start: int, stop: int) -> memoryview:
        return memoryview(self.host[slot]).cast("B")[start:stop]

    def finish(self, slot: int, start: int, stop: int) -> None:
        pass


def make_slab(slots: int, slot_bytes: int) -> Slab:
    """A slab in the memory of the current device."""
    if cuda.is_current():
        return CudaSlab(slots, slot_bytes)
    return UnifiedSlab(slots, slot_bytes)
