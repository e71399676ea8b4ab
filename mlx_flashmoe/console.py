"""Lines of text for people: errors, notes, figures, and the progress of a conversion.

They go to stderr, except that a terminal shows the figures below the answer.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from mlx_flashmoe.sizes import counted, show_duration, show_size
from mlx_flashmoe.terminal.region import Region, Rendered, print_above

if TYPE_CHECKING:
    from mlx_flashmoe.generate import GenerationResponse

# Control characters other than newline and tab, drawn as their pictures: an answer must not steer the terminal.
_CONTROL = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}
_CONTROL |= {0x7F: 0x2421} | {c: 0xFFFD for c in range(0x80, 0xA0)}


def printable(text: str) -> str:
    """Text that cannot steer a terminal, in one that is drawn."""
    return text.translate(_CONTROL)


def print_error(message: str) -> None:
    """``error: …`` on stderr, in one line however long."""
    _print_line(f"error: {message}", "red", len("error:"))


def print_note(message: str) -> None:
    """A remark on stderr: in one line, which a terminal breaks between words."""
    _print_line(message, "dim", len(message), soft_wrap=not sys.stderr.isatty())


def _print_line(message: str, style: str, styled: int, soft_wrap: bool = True) -> None:
    line = Text(printable(" ".join(message.split("\n"))))
    line.stylize(style, 0, styled)
    print_above(lambda: Console(stderr=True, soft_wrap=soft_wrap).print(line))


def digits(number: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def figures(
    response: GenerationResponse, bytes_read: int, hits: int, misses: int, width: int | None = None
) -> str:
    """The figures of a generation: tokens and rates, expert bytes read and hit rate, peak memory.

    Args:
        bytes_read, hits, misses: expert reads of this generation.
        width: cells per line; one line if None.
    """
    prompt, answer = response.prompt_tokens, response.generation_tokens
    line = f"prompt {counted(prompt, 'token')} at {digits(response.prompt_tps)} per second, answer {answer:,}"
    # The first token belongs to the prompt's time, so that one token alone has no rate.
    if answer > 1:
        line += f" at {digits(response.generation_tps)}"
    hit = f", {100 * hits / (hits + misses):.0f}% hits" if hits + misses else ""
    read = f"experts read {show_size(bytes_read)}{hit}"
    return joined([line, read, f"peak memory {show_size(1e9 * response.peak_memory)}"], width)


def joined(parts: Sequence[str], width: int | None) -> str:
    """Parts with dots between them, in lines of at most ``width`` cells where a part is not longer itself."""
    lines: list[str] = []
    for part in parts:
        if lines and (width is None or len(lines[-1]) + 3 + len(part) <= width):
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


class ConversionProgress:
    """A conversion's progress in bytes: a bar on a terminal, else a line every few seconds, on stderr."""

    EVERY = 5.0  # seconds between lines
    FRAME = 0.1  # seconds between drawings of the bar, at least

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._clock = clock
        self._first: tuple[float, int] | None = None  # when counting began, and the bytes already done then
        self._total = 0
        self._printed = clock()
        self._bar: Progress | None = None
        self._region = Region(self._console)
        self._due = 0.0
        self._lock = threading.Lock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Never started: it only says what to draw.
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
                auto_refresh=False,
            )

    def __enter__(self) -> ConversionProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._region.clear(self._rendered())

    def note(self, line: str) -> None:
        """A remark, above the bar: in one line, which a terminal breaks between words."""
        with self._lock:
            self._region.clear()
            self._console.print(Text(printable(line)), style="dim", soft_wrap=not self._console.is_terminal)
            if self._bar is not None and self._bar.tasks:
                self._region.draw(self._rendered())

    def progress(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` bytes; ``what`` is being worked on."""
        if self._first is None or total != self._total:
            self._first, self._total = (self._clock(), done), total
        if self._bar is not None:
            with self._lock:
                if not self._bar.tasks:
                    self._bar.add_task(what, total=total, completed=done)
                self._bar.update(self._bar.tasks[0].id, completed=done, total=total, description=what)
                if self._clock() >= self._due:
                    self._region.draw(self._rendered())
                    self._due = self._clock() + self.FRAME
            return
        now = self._clock()
        if now - self._printed < self.EVERY and done != total:
            return
        self._printed = now
        began, already = self._first
        rate = (done - already) / (now - began) if now > began else 0.0
        line = f"{100 * done / total if total else 100:.0f}% · {show_size(done)} of {show_size(total)}"
        if rate > 0:
            line += f" · {show_size(rate)}/s · {show_duration((total - done) / rate)} left"
        self._console.print(Text(f"{line} · {what}"))

    def _rendered(self) -> list[Rendered]:
        if self._bar is None or not self._bar.tasks:
            return []
        # The terminal writes ^C after the bar: in the same line, so that it is erased with it.
        options = self._console.options.update(max_width=self._console.width - len("^C"))
        return self._console.render_lines(self._bar.get_renderable(), options, pad=False)
