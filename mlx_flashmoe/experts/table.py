"""SlotTable: which slot holds which expert.

Where host and device share memory, the device looks slots up in the table itself, and does so when a graph is
computed, not when it is built: a layer can then be built on before it is known where its experts will be.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_flashmoe.experts import cuda


class SlotTable:
    """int32 [rows, experts], -1 where an expert is not resident.

    Attributes:
        host: the table itself.
        shared: lookups read what the table holds when they are computed; otherwise, when they are built.
    """

    def __init__(self, rows: int, experts: int):
        self.shared = not cuda.is_current()
        self._array = mx.full((rows, experts), -1, dtype=mx.int32)
        mx.eval(self._array)
        alias = np.asarray(self._array)  # writable
        self.host = alias if self.shared else alias.copy()

    def lookup(self, row: int, ids: mx.array) -> mx.array:
        """The slots of a row's experts, ids' shape. Lazy.

        -1 becomes 0, so that not even a result that nobody will use reads outside the slab.
        """
        table = self._array[row] if self.shared else mx.array(self.host[row])
        return mx.maximum(table[ids], 0)
