"""Decode on CUDA: the GPU waits, inside a kernel, for the host to say where a layer's experts are.

Launching a layer takes a host longer than a GPU takes to compute it. So the next layer is launched before this
one's experts are known: a kernel of one block writes the router's choice to pinned memory and spins until the host
has answered with slots. While the GPU computes a layer, the host launches the one after it.

Host and GPU see writes to pinned memory while a kernel runs; Metal promises that of no memory, hence ``Decode``.

A kernel that spins must be answered whatever happens. The host is in ``_serve`` soon after every launch; where it is
held up (MLX waiting for the GPU inside a launch, a kernel being compiled, an exception between two layers), a thread
of its own answers. An answer that nobody wants any more is slot 0: its kernels compute nonsense that nobody reads.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.experts import cuda
from mlx_flashmoe.experts.ahead import ReadAhead
from mlx_flashmoe.experts.arena import SlotArena
from mlx_flashmoe.experts.decode import Decode

MOST = 64  # ids of a layer, guesses included
AHEAD = 1  # layers launched and not yet served while the next is built
PATIENCE = 0.02  # seconds after which a layer that is not served is served by the thread


class Exchange:
    """Questions and answers in pinned memory, for each layer's row [MOST] of each.

    An entry is an int64: in its upper half the number of the turn, counted for each row, in its lower half an id or
    a slot. So an entry is new or old as a whole, and needs no order among writes.

    Args:
        rows: layers with experts.
    """

    def __init__(self, rows: int):
        self._pinned = cuda.Runtime().pinned(8 * (2 * MOST * rows + 1))
        words = np.frombuffer(self._pinned.view, dtype=np.int64)
        words[:] = 0
        both = words[:-1].reshape(rows, 2, MOST)
        self._asked, self._answers, self._given_up = both[:, 0], both[:, 1], words[-1:]
        first = self._pinned.address
        given_up = first + 8 * 2 * MOST * rows
        self._rows = [cuda.address_array(first + 8 * 2 * MOST * row, given_up) for row in range(rows)]
        self._turn = [1] * rows
        # A kernel still spinning when nobody is left to answer would keep the process from ending.
        weakref.finalize(self, _give_up, self._given_up)

    def ask(self, row: int, ids: mx.array, likely: mx.array | None) -> mx.array:
        """The slots of ``ids`` [1, K], which this launches a question for once computed: int32 [1, K], lazily.

        Args:
            likely: more ids to bring to the host with them, or None.
        """
        count, more = ids.size, likely.size if likely is not None else 0
        (slots,) = _kernel()(
            inputs=[ids, ids if likely is None else likely, self._rows[row]],
            template=[("K", count), ("L", more), ("MOST", MOST)],
            grid=(count + more, 1, 1),
            threadgroup=(count + more, 1, 1),
            output_shapes=[ids.shape],
            output_dtypes=[mx.int32],
        )
        return slots

    def asked(self, row: int, count: int) -> np.ndarray | None:
        """The ids of this turn, the likely ones behind; None while they have not come."""
        entries = self._asked[row, :count].copy()
        return entries.astype(np.int32) if (entries >> 32 == self._turn[row]).all() else None

    def answer(self, row: int, slots: np.ndarray) -> None:
        """Lets the GPU go on. What it will read must be in place."""
        self._answers[row, : len(slots)] = self._turn[row] << 32 | slots.astype(np.int64)
        self._turn[row] += 1

    def give_up(self) -> None:
        """Questions launched so far, and until ``go_on``, are answered with slot 0."""
        _give_up(self._given_up)

    def go_on(self) -> None:
        """After ``give_up``: waits for the GPU, and starts anew. From the thread that launches."""
        mx.synchronize()
        self._turn = [int(entry >> 32) + 1 for entry in self._asked[:, 0]]
        self._given_up[0] = 0


def _give_up(flag: np.ndarray) -> None:
    flag[0] = 1


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="flashmoe_exchange",
        input_names=["ids", "likely", "at"],
        output_names=["slots"],
        source="""
const int i = threadIdx.x;
volatile long long* asked = reinterpret_cast<volatile long long*>(at[0]);
volatile long long* answers = asked + MOST;
volatile long long* given_up = reinterpret_cast<volatile long long*>(at[1]);
const long long turn = (asked[0] >> 32) + 1;
__syncthreads();
if (i < K + L) asked[i] = turn << 32 | (unsigned)(i < K ? ids[i] : likely[i - K]);
if (i < K) {
  long long answer = answers[i];
  while (answer >> 32 != turn && !*given_up) {
    __nanosleep(100);
    answer = answers[i];
  }
  slots[i] = answer >> 32 == turn ? (int)answer : 0;
}
""",
    )


class ExchangeDecode(Decode):
    """``Decode`` by way of an ``Exchange``.

    A layer's ids come only when all earlier layers have been computed, because they are computed from those. So
    when they are here, no slot is in use but those of layers not yet computed, which is one: its own.
    """

    def __init__(self, arena: SlotArena, ahead: ReadAhead | None = None):
        super().__init__(arena, ahead)
        self._exchange = Exchange(len(arena.row_of))
        self._open: deque[tuple[int, int, int]] = (
            deque()
        )  # layers launched and not served: layer, ids, likely ids
        self._serving = threading.RLock()
        self._failure: BaseException | None = None
        self._busy = threading.Event()
        threading.Thread(
            target=_watch, args=(weakref.ref(self), self._busy), name="expert-watch", daemon=True
        ).start()

    def step(
        self, layer: int, ids: mx.array, likely: mx.array | None, build: Callable[[mx.array], mx.array]
    ) -> mx.array:
        arena = self.arena
        self.begin(layer)
        slots = self._exchange.ask(arena.row_of[layer], ids, likely)
        output = build(slots)
        # Noted before it is launched, so that the thread knows of it whatever happens here.
        self._open.append((layer, ids.size, likely.size if likely is not None else 0))
        if not self._busy.is_set():
            self._busy.set()
        mx.async_eval(slots)
        self._serve(0 if layer == arena.store.layers[-1] else AHEAD)
        return output

    def settle(self) -> None:
        self._serve(0)

    def abandon(self) -> None:
        with self._serving:
            self._failure = None
            if self._open:
                self._exchange.give_up()
                self._exchange.go_on()
                self._open.clear()

    def _serve(self, leave: int) -> None:
        """Answers the oldest questions, until ``leave`` are left. Raises ReadError."""
        try:
            with self._serving:
                if self._failure is not None:
                    raise self._failure
                while len(self._open) > leave:
                    self._answer(self._open[0])
                    self._open.popleft()
        except BaseException:
            self.abandon()
            raise

    def _answer(self, question: tuple[int, int, int]) -> None:
        layer, count, more = question
        row = self.arena.row_of[layer]

        def come() -> np.ndarray:
            while (ids := self._exchange.asked(row, count + more)) is None:
                time.sleep(0)  # lets reading threads have Python's lock
            return ids

        ids = self._timed(come)
        slots = self._bring(layer, ids[:count], ids[count:] if more else None)
        self._exchange.answer(row, slots)

    def serve_all(self) -> None:
        """By the thread: answers whatever is open, unless that is being done. A failure is left for the next call."""
        if not self._serving.acquire(blocking=False):
            return
        try:
            while self._open and self._failure is None:
                self._answer(self._open[0])
                self._open.popleft()
        except BaseException as e:
            self._failure = e
            self._exchange.give_up()
        finally:
            self._serving.release()


def _watch(of: weakref.ref[ExchangeDecode], busy: threading.Event) -> None:
    oldest = None
    while True:
        busy.wait(1.0)
        time.sleep(PATIENCE)
        decode = of()
        if decode is None:
            return
        if not decode._open:
            busy.clear()
            if not decode._open:
                oldest = None
                continue
        now = next(iter(decode._open), None)
        if now is not None and now is oldest:
            decode.serve_all()
        oldest = now
        del decode


def make_decode(arena: SlotArena, ahead: ReadAhead | None = None) -> Decode:
    """As the current device allows."""
    return ExchangeDecode(arena, ahead) if cuda.is_current() else Decode(arena, ahead)
