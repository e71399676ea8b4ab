"""Warns while a model runs, if the system gets short of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from mlx_flashmoe.sizes import show_size
from mlx_flashmoe.system import PressureGauge, available_memory


class MemoryWatch:
    """Looks at the system's memory every few seconds; used in ``with`` statements, one after the other.

    Args:
        tell: is given one line each time that memory gets short, on a thread of its own.
    """

    EVERY = 5.0  # seconds
    CALM = 60.0  # seconds without shortage, after which the next one is told again

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._gauge = PressureGauge()
        self._short_at: float | None = None

    def __enter__(self) -> MemoryWatch:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # it may block on a pipe that has no reader

    def _watch(self) -> None:
        with suppress(OSError):  # figures or stderr are gone: no reason to end what is watched
            self.look()
            while not self._ended.wait(self.EVERY):
                self.look()

    def look(self) -> None:
        """Looks once."""
        pressure, now = self._gauge(), self._clock()
        if pressure == "normal":
            return
        told = self._short_at is not None and now - self._short_at < self.CALM
        self._short_at = now
        if not told:
            self._tell(
                f"warning: the system is {'very ' * (pressure == 'critical')}short of memory, "
                f"{show_size(available_memory())} are left: close other programs, or start again with less "
                "--expert-memory"
            )
