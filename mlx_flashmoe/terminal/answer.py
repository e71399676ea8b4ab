"""An answer as it comes: drawn as Markdown on a terminal, plain text in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from mlx_flashmoe.console import figures, printable
from mlx_flashmoe.terminal.region import Region, Rendered, without_trailing_blanks
from mlx_flashmoe.terminal.sections import FoldedThinkingSection, MarkdownSection, Section, ThinkingSection
from mlx_flashmoe.thinking import ThinkingSplitter

if TYPE_CHECKING:
    from mlx_flashmoe.generate import GenerationResponse


class AnswerView(Protocol):
    """Shows one answer. ``feed`` takes its pieces of text; ``close`` finishes, also when interrupted.

    Attributes:
        thinking: the answer has not left its thinking part yet.
    """

    thinking: bool

    def feed(self, text: str, token: int | None = None) -> None:
        """``token``: the id of the token that the text comes from."""
        ...

    def close(self) -> None: ...

    def show_figures(self, response: GenerationResponse, bytes_read: int, hits: int, misses: int) -> None: ...


def answer_view(thinking: bool = False, end_id: int | None = None, verbatim: bool = False) -> AnswerView:
    """The view for this process's standard output.

    Args:
        thinking: the prompt has opened a thinking part, so that the answer begins inside it.
        end_id: the token that ends it, see ``ThinkingSplitter``.
        verbatim: in a pipe, print the thinking too, between its tags.
    """
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalAnswer(console, thinking, end_id)
    return PlainAnswer(sys.stdout, sys.stderr, thinking, end_id, verbatim)


class PlainAnswer:
    """The answer and nothing else on one stream, as it comes, with a line break at its end; figures on the other.

    Args:
        thinking, end_id, verbatim: see :func:`answer_view`.
    """

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        thinking: bool = False,
        end_id: int | None = None,
        verbatim: bool = False,
    ) -> None:
        self.thinking = thinking
        self._out, self._err = out, err
        self._verbatim = verbatim
        self._splitter = ThinkingSplitter(thinking, end_id)
        self._thought = thinking  # no visible text came after the thinking part yet
        self._last = "\n"
        if verbatim and thinking:
            self._write("<think>\n")

    def feed(self, text: str, token: int | None = None) -> None:
        if self._verbatim:
            self._write(text)
        self._take(self._splitter.feed(text, token))

    def close(self) -> None:
        self._take(self._splitter.finish())
        if self._last != "\n":
            self._write("\n")

    def show_figures(self, response: GenerationResponse, bytes_read: int, hits: int, misses: int) -> None:
        self._err.write(figures(response, bytes_read, hits, misses) + "\n")
        self._err.flush()

    def _take(self, pieces: Iterable[tuple[bool, str]]) -> None:
        for thinking, piece in pieces:
            self.thinking = thinking
            if thinking:
                self._thought = True
            elif not self._verbatim:
                if self._thought:
                    piece = piece.lstrip("\n")  # the blank line that parts the answer from the thinking
                    self._thought = not piece
                self._write(piece)

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()
            self._last = text[-1]


class TerminalAnswer:
    """Draws an answer: a thinking part set apart and dim, then Markdown.

    Blocks that can no longer change are printed for good and scroll away; only the end of the unfinished one is
    drawn again and again. What is above that end is printed for good, too: only rows on the screen can be erased,
    and a window that gets narrower breaks lines and pushes rows off the screen. So the cost of a redraw is that of
    one block, and redraws are spaced so that drawing takes at most a fifth of the time.
    """

    FRAME = 1 / 15  # seconds between redraws, at least
    SHARE = 5

    def __init__(
        self,
        console: Console,
        thinking: bool = False,
        end_id: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        fold: bool = False,
    ) -> None:
        """
        Args:
            thinking, end_id: see :func:`answer_view`.
            fold: of a thinking part only the last lines are seen, and one line when it is over.
        """
        self.thinking = thinking
        self._console = console
        self._clock = clock
        self._splitter = ThinkingSplitter(thinking, end_id)
        self._thinking_kind = FoldedThinkingSection if fold else ThinkingSection
        self._section: Section | None = None
        self._tail = ""  # text of the current section that is not printed for good
        self._printed = 0  # letters of the tail's rendering that have left the screen
        self._below = False  # whether the tail stands below finished blocks of its section
        self._due = 0.0
        self._region = Region(console)

    def feed(self, text: str, token: int | None = None) -> None:
        for thinking, piece in self._splitter.feed(text, token):
            self.show(thinking, piece)

    def show(self, thinking: bool, piece: str) -> None:
        """Like ``feed``, for a piece that is known to be thinking or not."""
        self._append(thinking, printable(piece))
        if self._clock() >= self._due:
            self._draw()

    def close(self) -> None:
        for thinking, piece in self._splitter.finish():
            self._append(thinking, printable(piece))
        self._end_section()

    def show_figures(self, response: GenerationResponse, bytes_read: int, hits: int, misses: int) -> None:
        line = figures(response, bytes_read, hits, misses, self._console.width)
        self._console.print()
        self._console.print(Text(line, style="dim"))

    def _append(self, thinking: bool, piece: str) -> None:
        self.thinking = thinking
        kind = self._thinking_kind if thinking else MarkdownSection
        if self._section is None or type(self._section) is not kind:
            piece = piece.lstrip("\n")
            if not piece.strip():
                return  # a part begins with its first visible text
            between = self._section is not None
            self._end_section()
            self._section = kind()
            if between:
                self._console.print()
            if self._section.heading is not None:
                self._console.print(self._section.heading)
        self._tail += piece

    def _draw(self) -> None:
        if self._section is None:
            return
        start = self._clock()
        finished, self._tail = self._section.split(self._tail)
        above: list[Rendered] = []
        if finished is not None:
            above = self._unprinted(self._lines(finished))
            self._printed, self._below = 0, True
        lines = self._unprinted(self._lines(self._section.render(self._tail)))
        # One row is left free, because the cursor may stand on it.
        most = min(self._section.rows(self._tail), max(1, self._console.height - 1))
        excess = max(0, len(lines) - most)
        self._printed += sum(map(_letters, lines[:excess]))
        self._region.draw(lines[excess:], above + lines[:excess])
        now = self._clock()
        self._due = now + max(self.FRAME, self.SHARE * (now - start))

    def _end_section(self) -> None:
        if self._section is None:
            return
        self._region.clear(self._unprinted(self._lines(self._section.finish(self._tail))))
        self._section, self._tail, self._printed, self._below = None, "", 0, False

    def _unprinted(self, lines: list[Rendered]) -> list[Rendered]:
        """The part of the tail's lines that is not printed for good. The window may have had another width then."""
        printed = self._printed
        for number, line in enumerate(lines):
            if printed < _letters(line):
                return [_without(line, printed), *lines[number + 1 :]]
            printed -= _letters(line)
        return []

    def _lines(self, renderable: RenderableType) -> list[Rendered]:
        """The renderable's lines, with the blank one that sets it apart from what was printed before."""
        assert self._section is not None
        lines = [without_trailing_blanks(line) for line in self._console.render_lines(renderable, pad=False)]
        if not self._section.spaced:
            return lines
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            del lines[0]
        return [[], *lines] if lines and self._below else lines


def _letters(line: Rendered) -> int:
    """Characters of a line that are the same however wide the window is; at least 1, so that blank lines count."""
    return max(1, sum(len(segment.text) - segment.text.count(" ") for segment in line))


def _without(line: Rendered, letters: int) -> Rendered:
    """A line from the word after its first ``letters`` on."""
    if not letters:
        return line
    rest: Rendered = []
    for text, style, control in line:
        while letters and text:
            letters -= text[0] != " "
            text = text[1:]
        if not letters:
            rest.append(Segment(text if rest else text.lstrip(" "), style, control))
    return rest
