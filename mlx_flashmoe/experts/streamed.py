"""StreamedExperts: the routed experts of one layer, wherever they are.

One token (decode) goes through ``expert_ffn``; several go expert by expert through ``expert_rows``. Which of
the two is decided by the number of tokens alone, never by what is resident, so residency cannot change a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashmoe import kernels
from mlx_flashmoe.errors import ReadError
from mlx_flashmoe.experts.arena import SlotArena
from mlx_flashmoe.experts.decode import Decode
from mlx_flashmoe.experts.store import ExpertStore
from mlx_flashmoe.kernels.reference import Activation
from mlx_flashmoe.layout import BlobLayout

# Experts a wave has at most: enough to keep the disk busy, few enough that neither the first wave's reading
# nor the last wave's computing, which nothing overlaps, weighs much.
MAX_WAVE = 64
# Rows computed at once are as many as there are tokens, and at least this: kernels want some.
LEAST_PIECE = 512


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


def pieces(bounds: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cuts runs of rows, run i being rows [bounds[i], bounds[i + 1]), into pieces of whole runs.

    Yields:
        (first, last): runs[first:last] are a piece; they have at most ``most`` rows, or are one run.
    """
    first = 0
    for i in range(1, len(bounds)):
        if i == len(bounds) - 1 or bounds[i + 1] - bounds[first] > most:
            yield first, i
            first = i


def one_a_token(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Every token's first row, then every token's second, and so on; ``tokens`` is the token of each row."""
    order = np.argsort(tokens, kind="stable").astype(np.int32)
    _, starts, counts = np.unique(tokens[order], return_index=True, return_counts=True)
    for nth in range(counts.max()):
        yield order[starts[counts > nth] + nth]


def slot_layout(store: ExpertStore, layer: int) -> BlobLayout:
    """The layout of a layer's experts in the slab, where every slot has the size of the largest blob."""
    return _sized(store.layout(layer), store.slot_bytes)


@cache
def _sized(layout: BlobLayout, blob_size: int) -> BlobLayout:
    """One object for equal layouts: lookups by it then compare nothing."""
    return replace(layout, blob_size=blob_size)


class StreamedExperts(nn.Module):
    """Callable as (x, ids, weights) -> y; holds no parameters.

    Args:
        decode: the model's, shared by all its layers.
        layer: this layer's number.
    """

    def __init__(self, decode: Decode, layer: int):
        super().__init__()
        self._decode = decode
        self._arena = decode.arena
        self._layer = layer
        self._row = self._arena.row_of[layer]
        self._layout = slot_layout(self._arena.store, layer)

    def wants_guess(self, tokens: int) -> bool:
        """Whether a call with so many tokens would make use of ``likely``."""
        ahead = self._decode.ahead
        return tokens == 1 and ahead is not None and ahead.on and not self._arena.resident

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
            [..., D] in x's dtype. For a single token, to be evaluated only once the model's last layer has been
            called (see ``Decode``).

        Raises:
            ReadError: an expert could not be read. The module can be called again.
        """
        shape, top_k = x.shape, ids.shape[-1]
        x, ids = x.reshape(-1, shape[-1]), ids.reshape(-1, top_k)
        weights = weights.reshape(-1, top_k).astype(mx.float32)
        if self._decode.on_routing is not None:
            self._decode.on_routing(self._layer, ids)

        def one_token() -> mx.array:
            slots = self._arena.table.lookup(self._row, ids)
            return kernels.expert_ffn(x, self._arena.slab, slots, weights, self._layout)

        if x.shape[0] > 1:
            y = self._prefill(x, ids, weights)
        elif self._arena.resident:
            y = one_token()
        else:
            y = self._decode.step(self._layer, ids, likely, one_token)
        return y.reshape(shape)

    def _prefill(self, x: mx.array, routed: mx.array, weights: mx.array) -> mx.array:
        """A token's experts are added up one by one in file order, so that the sum does not depend on where waves
        begin, and only one piece's rows are held at a time."""
        top_k = routed.shape[-1]
        shares = weights.reshape(-1)
        y = mx.zeros(x.shape, dtype=mx.float32)
        use: int | None = None
        for rows, out, slots in self._computed(x, routed, None):
            for chosen in one_a_token(rows // top_k):
                share = shares[mx.array(rows[chosen]), None]
                y = y.at[mx.array(rows[chosen] // top_k)].add(
                    share * out[mx.array(chosen)].astype(mx.float32)
                )
            if not self._arena.resident:  # or nothing is ever given up
                use = self._arena.used(slots, y, use)
            mx.async_eval(y)
        return y.astype(x.dtype)

    def _computed(
        self, x: mx.array, routed: mx.array, activation: Activation
    ) -> Iterator[tuple[np.ndarray, mx.array, np.ndarray]]:
        """The experts' outputs for many tokens. Every expert is read at most once, in file order, in waves.

        A wave is read while the one before it is computed. Rows, one for each expert of a token, are sorted by
        expert, so a wave is a range of rows.

        Args:
            x: [N, D].
            routed: integer [N, K].

        Yields:
            (rows, outputs, slots): row r is expert r % K of token r // K; outputs [R, D] of these rows, from the
            experts in these slots. What is built on them must be given to ``arena.used`` before the next is asked for.
        """
        self._decode.abandon()
        if self._decode.ahead is not None:
            self._decode.ahead.stop()
            self._decode.ahead.interrupt_timing()
        ids = self._decode.to_host(routed)
        self._arena.all_computed()  # the ids come from all of it; a prompt's outputs are large
        tokens, top_k = ids.shape
        flat = ids.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(
            np.int32
        )  # as all indices: MLX has fewer kernels to compile
        experts, starts = np.unique(flat[order], return_index=True)
        bounds = np.append(starts, flat.size)
        self._arena.touch(self._layer, experts)
        for first, last, slots in waves(self._arena, self._layer, experts):
            for a, b in pieces(bounds[first : last + 1], max(tokens, LEAST_PIECE)):
                rows = order[bounds[first + a] : bounds[first + b]]
                row_slots = np.repeat(slots[a:b], np.diff(bounds[first + a : first + b + 1]))
                out = kernels.expert_rows(
                    x[mx.array(rows // top_k)],
                    self._arena.slab,
                    mx.array(row_slots),
                    self._layout,
                    activation,
                )
                yield rows, out, slots[a:b]
        if self._decode.on_prefill_layer is not None:
            self._decode.on_prefill_layer(self._row + 1, len(self._arena.row_of))


class StreamedOutputs(StreamedExperts):
    """Callable as (x, ids) -> y [..., K, D]: every chosen expert's own output, as others' modules want it.

    Args:
        activation: None for SwiGLU; else what is between the matrices, see ``kernels.expert_outputs``.
    """

    def __init__(self, decode: Decode, layer: int, activation: Activation):
        super().__init__(decode, layer)
        self._activation = activation

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:  # type: ignore[override]
        """The outputs of each token's experts.

        Args:
            x: [..., D] activations.
            ids: integer [..., K]; an expert may be in it more than once.

        Returns:
            [..., K, D] in x's dtype. For a single token, to be evaluated only once the model's last layer has been
            called (see ``Decode``).

        Raises:
            ReadError: an expert could not be read. The module can be called again.
        """
        shape = (*ids.shape, x.shape[-1])
        x, ids = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
        if self._decode.on_routing is not None:
            self._decode.on_routing(self._layer, ids)

        def one_token() -> mx.array:
            slots = self._arena.table.lookup(self._row, ids)
            return kernels.expert_outputs(x, self._arena.slab, slots, self._layout, self._activation)

        if x.shape[0] > 1:
            y = self._all_rows(x, ids)
        elif self._arena.resident:
            y = one_token()
        else:
            y = self._decode.step(self._layer, ids, None, one_token)
        return y.reshape(shape)

    def _all_rows(self, x: mx.array, routed: mx.array) -> mx.array:
        """The outputs of many tokens, [N, K, D]."""
        rows: list[np.ndarray] = []
        outputs: list[mx.array] = []
        for some, out, slots in self._computed(x, routed, self._activation):
            rows.append(some)
            outputs.append(out.astype(x.dtype))
            if not self._arena.resident:
                self._arena.used(slots, outputs[-1])
            mx.async_eval(outputs[-1])
        places = np.argsort(np.concatenate(rows)).astype(np.int32)
        return mx.concatenate(outputs)[mx.array(places)].reshape(*routed.shape, -1)
