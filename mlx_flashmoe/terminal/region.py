"""The bottom of a terminal, drawn again and again: the unfinished part of an answer, a progress bar."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

from rich.cells import get_character_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.segment import ControlType, Segment

Rendered = list[Segment]
"""One line."""


class Lines:
    """Lines already rendered. ``whole``: the last one ends with a line break, too."""

    def __init__(self, lines: list[Rendered], whole: bool = True) -> None:
        self._lines, self._whole = lines, whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, line in enumerate(self._lines, 1):
            yield from line
            if self._whole or number < len(self._lines):
                yield Segment.line()


class Region:
    """Lines that are replaced as a whole, also after the window has changed its width.

    Most terminals break the lines that they show anew when their window gets narrower, so that more rows have to be
    erased than were drawn. xterm and the Linux console cut them instead.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: list[Rendered] = []
        self._hides_cursor = False
        self._reflows = "XTERM_VERSION" not in os.environ and os.environ.get("TERM") != "linux"

    def draw(self, lines: list[Rendered], above: list[Rendered] | None = None) -> None:
        """Replaces the lines; ``above`` is printed for good, before them."""
        with _lock, self._console:  # one write to the terminal: nothing flickers
            if not self._hides_cursor:
                self._console.show_cursor(False)
                self._hides_cursor = True
            self._erase()
            if above:
                self._console.print(Lines(above))
            if lines:
                self._console.print(Lines(lines, whole=False), end="", soft_wrap=True)
            self._lines = lines
            (_regions.add if lines else _regions.discard)(self)

    def clear(self, last: list[Rendered] | None = None) -> None:
        """Takes the lines away; ``last`` is printed in their place, for good."""
        with _lock, self._console:
            self._erase()
            _regions.discard(self)
            if self._hides_cursor:
                self._console.show_cursor(True)
                self._hides_cursor = False
            if last:
                self._console.print(Lines(last))

    def _erase(self) -> None:
        """Erases the lines; the cursor, which stood at the end of the last one, is where the first one began."""
        if not self._lines:
            return
        width = self._console.width if self._reflows else 10**9
        rows = min(self._console.height, sum(rows_of(_text(line), width) for line in self._lines))
        row = [(ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)]
        up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)]
        self._console.control(Control(*row, *up * (rows - 1)))  # type: ignore[arg-type]
        self._lines = []


_lock = threading.RLock()
_regions: weakref.WeakSet[Region] = weakref.WeakSet()
"""Those that are drawn now."""


def print_above(print_it: Callable[[], None]) -> None:
    """Has something printed for good while regions may be drawn, also from another thread: above them."""
    with _lock:
        drawn = [(region, region._lines) for region in _regions]
        for region, _ in drawn:
            region.draw([])
        print_it()
        for region, lines in drawn:
            region.draw(lines)


def _text(line: Rendered) -> str:
    return "".join(segment.text for segment in line)


def rows_of(line: str, width: int) -> int:
    """Rows that a line takes in a terminal ``width`` cells wide."""
    rows, column = 1, 0
    for character in line:
        cells = get_character_cell_size(character)
        if column + cells > width:
            rows, column = rows + 1, 0
        column += cells
    return rows


def without_trailing_blanks(line: Rendered) -> Rendered:
    """A line without the blanks at its end that show nothing: they get in the way when code is copied."""
    line = list(line)
    while line:
        text, style, control = line[-1]
        if control or (style is not None and (style.bgcolor or style.underline or style.reverse)):
            break
        if stripped := text.rstrip(" "):
            line[-1] = Segment(stripped, style)
            break
        line.pop()
    return line
