"""SlotTable: which slot holds which expert, in memory that host and device both see.

The host writes it, and the device looks slots up when a graph is computed, not when it is built: so a layer can
be built on before it is known where its experts will be.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_flashmoe.experts import cuda
from mlx_flashmoe.kernels.nvrtc import Kernel


class SlotTable(Protocol):
    """int32 [rows, experts], -1 where an expert is not resident.

    ``host`` is the table itself. ``lookup`` gives the slots of a row's experts, in the shape of their ids, lazily:
    it reads what the table holds when it is computed. -1 becomes 0, so that not even a result that nobody will
    use reads outside the slab.
    """

    host: np.ndarray

    def lookup(self, row: int, ids: mx.array) -> mx.array: ...


class UnifiedTable:
    """In an MLX array: host and device share the memory."""

    def __init__(self, rows: int, experts: int):
        self._array = mx.full((rows, experts), -1, dtype=mx.int32)
        mx.eval(self._array)
        self.host = np.asarray(self._array)  # an alias, writable

    def lookup(self, row: int, ids: mx.array) -> mx.array:
        return mx.maximum(self._array[row][ids], 0)


class CudaTable:
    """In pinned memory, which kernels read over the bus: a few bytes a layer."""

    def __init__(self, rows: int, experts: int):
        self._pinned = cuda.Runtime().pinned(4 * rows * experts)
        self.host = np.frombuffer(self._pinned.view, dtype=np.int32).reshape(rows, experts)
        self.host[:] = -1
        self._rows = [cuda.address_array(self._pinned.address + 4 * row * experts) for row in range(rows)]

    def lookup(self, row: int, ids: mx.array) -> mx.array:
        (slots,) = _lookup_kernel()(
            inputs=[ids, self._rows[row]],
            template=[("N", ids.size)],
            grid=(ids.size, 1, 1),
            threadgroup=(min(ids.size, 256), 1, 1),
            output_shapes=[ids.shape],
            output_dtypes=[mx.int32],
        )
        return slots


@cache
def _lookup_kernel() -> Kernel:
    return Kernel(
        "flashmoe_lookup",
        ["ids", "row"],
        ["slots"],
        """
const int i = blockIdx.x * blockDim.x + threadIdx.x;
if (i < N) slots[i] = max(reinterpret_cast<const volatile int*>(row[0])[ids[i]], 0);
""",
    )


def make_table(rows: int, experts: int) -> SlotTable:
    """An empty table that the current device can look slots up in."""
    return CudaTable(rows, experts) if cuda.is_current() else UnifiedTable(rows, experts)
