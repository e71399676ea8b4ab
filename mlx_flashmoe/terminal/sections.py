"""The parts of an answer: its thinking, and Markdown."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Protocol

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from mlx_flashmoe.sizes import show_duration
from mlx_flashmoe.terminal.region import Lines

ROWS = 6
"""Rows that are drawn again and again, in general."""


class Section(Protocol):
    """A part of an answer.

    Attributes:
        heading: printed once, before the part.
        spaced: whether finished blocks stand apart by a blank line.
    """

    heading: RenderableType | None
    spaced: bool

    def rows(self, text: str) -> int:
        """Rows at the end of the rendered text that may still change, or are few enough to be drawn again."""
        ...

    def split(self, text: str) -> tuple[RenderableType | None, str]:
        """The part of the text that can no longer change, rendered, and the rest of the text."""
        ...

    def render(self, text: str) -> RenderableType: ...

    def finish(self, text: str) -> RenderableType:
        """Like ``render``, for good."""
        ...


class ThinkingSection:
    """The model's thinking before its answer: plain text, dim and indented under a heading."""

    heading: RenderableType | None = Text("Thinking", style="dim bold")
    spaced = False

    def rows(self, text: str) -> int:
        return ROWS

    def split(self, text: str) -> tuple[RenderableType | None, str]:
        # Line breaks at the end wait for what follows: at the end of the part they are dropped.
        cut = text.rstrip("\n").rfind("\n")
        return (None, text) if cut < 0 else (self._dim(text[:cut]), text[cut + 1 :])

    def render(self, text: str) -> RenderableType:
        text = text.rstrip("\n")
        return self._dim(text) if text else Lines([])

    finish = render

    def _dim(self, text: str) -> RenderableType:
        return Padding(Text(text, style="dim"), (0, 0, 0, 2))


class FoldedThinkingSection(ThinkingSection):
    """Thinking of which the last lines are seen as they come, and only how long it took when it is over."""

    LINES = ROWS - 1

    heading: RenderableType | None = None

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def split(self, text: str) -> tuple[RenderableType | None, str]:
        return None, text

    def render(self, text: str) -> RenderableType:
        return _LastLines(text.rstrip("\n"), self.LINES)

    def finish(self, text: str) -> RenderableType:
        seconds = max(1.0, time.perf_counter() - self._start)
        return Text(f"Thought for {show_duration(seconds)} (/think shows it)", style="dim")


class _LastLines:
    """The end of a text, dim and indented under the heading of a thinking part."""

    def __init__(self, text: str, count: int) -> None:
        self._text, self._count = text, count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = max(1, min(self._count, console.height - 3))
        # Each redraw wraps only the end of the text. It begins at the start of a line, so that the lines do not jump.
        start = self._text.rfind("\n", 0, max(0, len(self._text) - count * options.max_width)) + 1
        body = Padding(Text(self._text[start:], style="dim"), (0, 0, 0, 2))
        yield ThinkingSection.heading or ""
        yield Lines(console.render_lines(body, options, pad=False)[-count:])


class MarkdownSection:
    """The answer itself."""

    heading: RenderableType | None = None
    spaced = True

    # HTML is shown as the text it is: Rich leaves it out.
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])

    def rows(self, text: str) -> int:
        # A table's columns get wider as its rows come; of other blocks the beginning stays as it is.
        return 10**9 if re.search(r"^ *\|", text, re.MULTILINE) else ROWS

    def split(self, text: str) -> tuple[RenderableType | None, str]:
        tokens = self.parser.parse(text)
        starts = [i for i, t in enumerate(tokens) if t.level == 0 and t.nesting >= 0 and t.map]
        if len(starts) < 2:
            return None, text
        last = tokens[starts[-1]].map
        assert last is not None
        lines = text.split("\n")
        rest = lines[last[0] :]
        # The first line of a block may still turn out to continue the block before: "#" becomes "#hashtag".
        if len(rest) < 2:
            return None, text
        return _Markdown(tokens[: starts[-1]]), "\n".join(rest)

    def render(self, text: str) -> RenderableType:
        return _Markdown(self.parser.parse(text))

    finish = render


class _CodeBlock(CodeBlock):
    """Code in the terminal's own colours, indented, without a box: easy to read on any background and to copy."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        syntax = Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")
        yield Padding(syntax, (0, 0, 0, 2))


class _Heading(Heading):
    """A heading that stays at the left margin."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Table(TableElement):
    """A table without blank lines of its own above and below."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                table.show_edge = False
            yield table


class _Markdown(Markdown):
    """Rich's Markdown from parsed tokens. A line break in the source is one on the screen."""

    elements = {  # noqa: RUF012 - as in the base class
        **Markdown.elements,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "heading_open": _Heading,
        "table_open": _Table,
    }

    def __init__(self, tokens: Iterable[Token]) -> None:
        super().__init__("")
        self.parsed = list(tokens)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
