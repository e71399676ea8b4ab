"""Progress of long measurements, on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from mlx_flashmoe.sizes import show_duration
from mlx_flashmoe.terminal.bars import Bar


class Steps:
    """Counts steps of one kind.

    Args:
        what: is done, for example "perplexity".
        unit: of the steps, plural.
    """

    EVERY = 10.0  # seconds between lines

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._what, self._total, self._unit = what, total, unit
        self._clock = clock
        self._began = self._printed = clock()
        self._done = 0
        self._bar: Bar | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Bar(
                TextColumn(what),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeRemainingColumn(compact=True),
                console=self._console,
                delay=0,
            )

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar(0, self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, steps: int = 1) -> None:
        """So many more are done."""
        self._done += steps
        if self._bar is not None:
            self._bar(self._done, self._total)
            return
        now = self._clock()
        if now - self._printed < self.EVERY:
            return
        self._printed = now
        left = (now - self._began) / self._done * (self._total - self._done)
        self._console.print(
            f"{self._what}: {self._done:,} of {self._total:,} {self._unit} · {show_duration(left)} left"
        )
