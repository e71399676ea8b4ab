"""StreamedExperts: the routed experts of one layer, wherever they are.

One token (decode) goes through ``expert_ffn``; several go expert by expert through ``expert_rows``. Which of
the two is decided by the number of tokens alone, never by what is resident, so residency cannot change a bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashmoe import kernels
from mlx_flashmoe.errors import ReadError
from mlx_flashmoe.experts import cuda
from mlx_flashmoe.experts.ahead import ReadAhead
from mlx_flashmoe.experts.arena import SlotArena
from mlx_flashmoe.experts.cuda import HostCopy

# Experts a wave has at most: enough to keep the disk busy, few enough that neither the first wave's reading
# nor the last wave's computing, which nothing overlaps, weighs much.
MAX_WAVE = 64


def waves(arena: SlotArena, layer: int, experts: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Brings ``experts`` (ascending) into the arena in turn, each read at most once.

    Yields:
        (first, last, slots): experts[first:last] are in place, in ``slots``. They stay until the next item is
        asked for; what was built on them must be given to ``arena.used`` before that. Reading of the next
        wave goes on meanwhile.
    """
    row = arena.row_of[layer]
    size = max(1, min(MAX_WAVE, arena.capacity // 3))
    bounds = [(i, min(i + size, len(experts))) for i in range(0, len(experts), size)]
    fetch = arena.fetch(layer, experts[: bounds[0][1]])
    try:
        for i, (first, last) in enumerate(bounds):
            fetch.wait()
            slots = arena.slot_of[row, experts[first:last]]
            if i + 1 < len(bounds):
                start, stop = bounds[i + 1]
                # Residents of later waves are spared while there is room: each saves a read.
                later = arena.slot_of[row, experts[stop:]]
                room = arena.capacity - (last - first) - (stop - start)
                keep = np.concatenate([slots, later[later >= 0][:room]])
                fetch = arena.fetch(layer, experts[start:stop], keep)
            yield first, last, slots
    finally:
        with contextlib.suppress(ReadError):
            fetch.wait()


class StreamedExperts(nn.Module):
    """Callable as (x, ids, weights) -> y; holds no parameters.

    Args:
        arena: the arena all layers share.
        layer: this layer's number.
        ahead: reads of the following layer's likely experts, shared by all layers; None for none.
    """

    def __init__(self, arena: SlotArena, layer: int, ahead: ReadAhead | None = None):
        super().__init__()
        self._arena = arena
        self._layer = layer
        self._ahead = ahead
        self._is_first = layer == arena.store.layers[0]
        # In the slab every slot has the same size, whatever the layer's own blobs need.
        self._layout = replace(arena.store.layout(layer), blob_size=arena.slot_bytes)
        self._row = arena.row_of[layer]
        self._device_slots = mx.array(arena.slot_of[self._row])
        self._device_version = -1
        self._to_host = HostCopy() if cuda.is_current() else np.asarray

    def wants_guess(self, tokens: int) -> bool:
        """Whether a call with so many tokens would make use of ``likely``."""
        return tokens == 1 and self._ahead is not None and self._ahead.on and not self._arena.resident

    def __call__(
        self, x: mx.array, ids: mx.array, weights: mx.array, likely: mx.array | None = None
    ) -> mx.array:
        """The weighted sum of each token's experts.

        Args:
            x: [..., D] activations.
            ids: integer [..., K], distinct within a token.
            weights: [..., K] routing weights.
            likely: integer [..., K], a guess at the next layer's ids; it changes speed and nothing else.

        Returns:
            [..., D] in x's dtype.

        Raises:
            ReadError: an expert could not be read. The module can be called again.
        """
        shape, top_k = x.shape, ids.shape[-1]
        x, ids = x.reshape(-1, shape[-1]), ids.reshape(-1, top_k)
        weights = weights.reshape(-1, top_k).astype(mx.float32)
        one_token = x.shape[0] == 1
        if one_token and self._arena.resident:
            y = kernels.expert_ffn(x, self._arena.slab, self._slots_on_device()[ids], weights, self._layout)
        elif one_token:
            y = self._decode(x, ids, weights, likely)
        else:
            y = self._prefill(x, self._on_host(ids), weights)
        return y.reshape(shape)

    def _on_host(self, ids: mx.array) -> np.ndarray:
        started = time.perf_counter()
        host = self._to_host(ids.astype(mx.int32))
        self._arena.routing_seconds += time.perf_counter() - started
        return host

    def _slots_on_device(self) -> mx.array:
        """[experts] -> slot, brought to the device again only when it has changed."""
        version = int(self._arena.version[self._row])
        if version != self._device_version:
            self._device_slots = mx.array(self._arena.slot_of[self._row])
            self._device_version = version
        return self._device_slots

    def _decode(self, x: mx.array, ids: mx.array, weights: mx.array, likely: mx.array | None) -> mx.array:
        arena, ahead = self._arena, self._ahead
        if ahead is not None and self._is_first:
            ahead.begin_token()
        if likely is not None:
            ids = mx.concatenate([ids, likely.reshape(1, -1)])
        experts = self._on_host(ids)  # the layer's one synchronisation
        if ahead is not None:
            ahead.stop()
        if not arena.touch(self._layer, experts[0]):
            arena.fetch(self._layer, experts[0]).wait()
        slots = arena.slot_of[self._row][experts[0]]
        if ahead is not None and likely is not None:
            ahead.start(self._layer + 1, experts[1], slots)
        y = kernels.expert_ffn(x, arena.slab, self._slots_on_device()[ids[:1]], weights, self._layout)
        arena.used(slots, y)
        return y

    def _prefill(self, x: mx.array, ids: np.ndarray, weights: mx.array) -> mx.array:
        """Every expert of the chunk is read at most once, in file order, in waves.

        A wave fills one half of the arena while the other half's wave is computed. Rows are sorted by expert,
        so a wave is a range of rows; the sum over a token's experts is taken at the end, in the order the
        router gave them, so that it does not depend on where waves begin.
        """
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead.interrupt_timing()
        tokens, top_k = ids.shape
        flat = ids.reshape(-1)
        order = np.argsort(flat, kind="stable")
        experts, starts = np.unique(flat[order], return_index=True)
        stops = np.append(starts[1:], flat.size)
        self._arena.touch(self._layer, experts)

        pairs = mx.zeros((flat.size, x.shape[1]), dtype=x.dtype)
        for first, last, slots in waves(self._arena, self._layer, experts):
            begin, end = int(starts[first]), int(stops[last - 1])
            rows = order[begin:end]
            row_slots = np.repeat(slots, stops[first:last] - starts[first:last])
            y = kernels.expert_rows(
                x[mx.array(rows // top_k)], self._arena.slab, mx.array(row_slots), self._layout
            )
            self._arena.used(slots, y)
            pairs[begin:end] = y
            mx.async_eval(pairs)

        place = np.empty((tokens, top_k), dtype=np.int32)
        place.reshape(-1)[order] = np.arange(flat.size, dtype=np.int32)
        y = mx.zeros(x.shape, dtype=mx.float32)
        for k in range(top_k):
            y = y + weights[:, k : k + 1] * pairs[mx.array(place[:, k])].astype(mx.float32)
        return y.astype(x.dtype)
