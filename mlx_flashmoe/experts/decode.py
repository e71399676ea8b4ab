"""Decode: a layer's choice of experts comes to the host one layer late, while the next layer is being built.

A layer's experts can be built on before they are known or read, because their slots are looked up when the
graph is computed. So on a GPU the wait for a layer's ids, the reading of what is missing, and only then the
computing of what was built, happen when the *next* layer has its own ids ready to ask for: building a layer
costs no GPU time. On the CPU, whose kernels compute at once, nothing is deferred.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashmoe.experts import cuda
from mlx_flashmoe.experts.ahead import ReadAhead
from mlx_flashmoe.experts.arena import SlotArena


@dataclass
class _Choice:
    """A layer's ids on their way to the host: [1, K], or [2, K] with a guess at the next layer's below."""

    layer: int
    ids: Callable[[], np.ndarray]
    output: mx.array | None = None


class Decode:
    """The decode steps of one model; its layers share it.

    Args:
        arena: the model's.
        ahead: reads of the following layer's likely experts; None for none.
        may_defer: nothing of a token is evaluated before its last layer is built.

    Attributes:
        on_prefill_layer: called as a prompt goes through, with (layers whose experts are read, layers).
        on_routing: called with (layer, ids [tokens, K]) whenever a layer's experts are asked for.
    """

    def __init__(self, arena: SlotArena, ahead: ReadAhead | None = None, may_defer: bool = True):
        self.arena = arena
        self.ahead = ahead
        self.deferred = bool(may_defer and mx.default_device() == mx.gpu)
        self._to_host = cuda.HostCopy() if cuda.is_current() else host_view
        self._pending: _Choice | None = None
        self.on_prefill_layer: Callable[[int, int], None] | None = None
        self.on_routing: Callable[[int, mx.array], None] | None = None

    def step(
        self, layer: int, ids: mx.array, likely: mx.array | None, build: Callable[[], mx.array]
    ) -> mx.array:
        """One token's experts in one layer.

        Args:
            ids: integer [1, K].
            likely: a guess at the next layer's ids, or None.
            build: builds the layer's output, looking slots up in ``arena.table``.

        Returns:
            what ``build`` returned. It must not be evaluated before ``settle``, except by the last layer's step
            having returned, which leaves nothing pending.

        Raises:
            ReadError: an expert, of this layer or of the one before, could not be read.
        """
        layers = self.arena.store.layers
        if layer == layers[0]:
            self.abandon()
            if self.ahead is not None:
                self.ahead.begin_token()
        self.settle()
        if likely is not None:
            ids = mx.concatenate([ids, likely.reshape(1, -1)])
        choice = _Choice(layer, self._to_host(ids))
        if self.deferred and layer != layers[-1]:
            choice.output = build()
            self._pending = choice
            return choice.output
        slots = self._bring(choice)
        output = build()
        self.arena.used(slots, output)
        return output

    def settle(self) -> None:
        """Waits for the pending choice and reads its experts: afterwards its output may be evaluated."""
        choice, self._pending = self._pending, None
        if choice is not None:
            assert choice.output is not None
            self.arena.used(self._bring(choice), choice.output)

    def abandon(self) -> None:
        """A new call begins: a choice still pending is that of a call that was interrupted."""
        self._pending = None

    def to_host(self, ids: mx.array) -> np.ndarray:
        """An integer array's values, evaluated; the time it takes is counted as routing."""
        return self._timed(self._to_host(ids))

    def _timed(self, ids: Callable[[], np.ndarray]) -> np.ndarray:
        started = time.perf_counter()
        host = ids()  # the layer's one synchronisation
        self.arena.routing_seconds += time.perf_counter() - started
        return host

    def _bring(self, choice: _Choice) -> np.ndarray:
        """Makes a choice's experts resident; their slots."""
        arena, ahead = self.arena, self.ahead
        ids = self._timed(choice.ids)
        if ahead is not None:
            ahead.stop()
        experts = np.unique(ids[0])  # some routers choose one twice, for experts that compute nothing
        fetch = arena.fetch(choice.layer, experts)
        # While the disks are busy: no expert of this choice can be evicted in between.
        arena.touch(choice.layer, experts)
        fetch.wait()
        slots = arena.slot_of[arena.row_of[choice.layer]][experts]
        if ahead is not None and len(ids) > 1:
            ahead.start(choice.layer + 1, ids[1], slots)
        return slots


def host_view(array: mx.array) -> Callable[[], np.ndarray]:
    """``cuda.HostCopy`` where host and device share memory: starts computing; the result waits for the values."""
    mx.async_eval(array)
    return lambda: np.asarray(array)
