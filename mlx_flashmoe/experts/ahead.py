"""Reading the next layer's likely experts while this layer computes, as long as that pays.

The guess is the next layer's own router applied to this layer's residual; others measured it 70 to 89% right.
A wrong guess costs disk time and a slot, so whether it pays depends on the machine: tokens with and without
are timed against each other, and the faster way is kept for a while.
"""

from __future__ import annotations

import time

import numpy as np

from mlx_flashmoe.experts.arena import Fetch, SlotArena

TRIAL = 12  # tokens of each kind in a comparison
KEEP = 240  # tokens its outcome is kept for


class PaysOff:
    """Decides, token by token, whether to read ahead: alternating trials, then the faster way for a while.

    Medians are compared, so that one slow token decides nothing.
    """

    def __init__(self) -> None:
        self.on = True
        self._left = 2 * TRIAL
        self._trying = True
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def token_took(self, seconds: float) -> None:
        """The last token's time, taken in the way ``on`` said; ``on`` now says how to take the next."""
        if self._trying:
            self._seconds[self.on].append(seconds)
        self._left -= 1
        if self._left > 0:
            if self._trying:
                self.on = not self.on
            return
        self._trying = not self._trying
        if self._trying:
            self._seconds = {True: [], False: []}
            self._left = 2 * TRIAL
        else:
            self.on = float(np.median(self._seconds[True])) < float(np.median(self._seconds[False]))
            self._left = KEEP


class ReadAhead:
    """Speculative reads of one model: at most one layer's at a time, demand always first.

    Args:
        arena: the model's.
        decision: whether to; one that always or never does, in tests.
    """

    def __init__(self, arena: SlotArena, decision: PaysOff | None = None):
        self._arena = arena
        self._decision = decision or PaysOff()
        self._fetch: Fetch | None = None
        self._started: float | None = None

    @property
    def on(self) -> bool:
        return self._decision.on

    def begin_token(self) -> None:
        """A decode step begins: times the one before it."""
        now = time.perf_counter()
        if self._started is not None:
            self._decision.token_took(now - self._started)
        self._started = now

    def interrupt_timing(self) -> None:
        """Something other than decoding happens: the next token's interval must not be counted."""
        self._started = None

    def start(self, layer: int, experts: np.ndarray, keep: np.ndarray) -> None:
        """Begins reading those of ``experts`` (of ``layer``) that are missing, without touching slots ``keep``."""
        room = self._arena.capacity - len(keep)
        self._fetch = self._arena.fetch(layer, experts[:room], keep)

    def stop(self) -> None:
        """Demand comes: finishes what is being read, gives up the rest."""
        if self._fetch is not None:
            self._fetch.cut_short()
            self._fetch = None
