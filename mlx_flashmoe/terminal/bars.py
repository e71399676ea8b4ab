"""Progress bars of what a user waits for: loading a model, reading a prompt."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from mlx_flashmoe.terminal.region import Region, without_trailing_blanks


class Bar:
    """A progress bar, drawn ten times per second by a thread; nothing for what is over within ``delay`` seconds.

    Args:
        columns: of Rich's progress display.
        console: nothing is drawn where it is no terminal.
        delay: seconds from the first count to the first drawing.
    """

    EVERY = 0.1

    def __init__(self, *columns: ProgressColumn, console: Console, delay: float) -> None:
        self._console, self._delay = console, delay
        # Never started, because Rich erases as many rows as it drew: it only says what to draw.
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task: TaskID | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, done: int, total: int) -> None:
        """Counts ``done`` of ``total``. The bar is gone when all is done."""
        if self._task is None:
            self._task = self._progress.add_task("", total=total)
            if self._console.is_terminal and not self._console.is_dumb_terminal:
                self._thread = threading.Thread(target=self._draw, daemon=True)
                self._thread.start()
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Takes the bar away. May be called more than once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _draw(self) -> None:
        if self._ended.wait(self._delay):
            return
        region = Region(self._console)
        while True:
            lines = self._console.render_lines(self._progress.get_renderable(), pad=False)
            region.draw([without_trailing_blanks(line) for line in lines])
            if self._ended.wait(self.EVERY):
                break
        region.clear()


def prompt_bar(console: Console | None = None, delay: float = 1.0) -> Bar:
    """A bar for a prompt that is being read: call it with (tokens done, tokens in all)."""
    return Bar(
        SpinnerColumn(),
        TextColumn("Reading the prompt"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        delay=delay,
    )


def loading_bar(console: Console | None = None, delay: float = 0.5) -> Bar:
    """A bar for a model that is being loaded: call it with (bytes done, bytes in all)."""
    return Bar(
        SpinnerColumn(),
        TextColumn("Loading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console or Console(stderr=True),
        delay=delay,
    )
