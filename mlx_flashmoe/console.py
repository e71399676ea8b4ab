"""Everything drawn on a terminal, and what stands in for it where output is not one.

An answer on a terminal is Markdown, rendered as it comes; in a pipe it is exactly the generated text. Figures,
progress, notes and errors go to stderr, except that a terminal shows the figures below the answer.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from mlx_flashmoe.sizes import show_duration, show_size
from mlx_flashmoe.thinking import ThinkingSplitter

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
    Console(stderr=True, soft_wrap=soft_wrap).print(line)


def digits(number: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def figures(
    response: GenerationResponse, bytes_read: int, hits: int, misses: int, width: int | None = None
) -> str:
    """One line about a generation: tokens and rates, expert bytes read and hit rate, peak memory.

    Args:
        bytes_read, hits, misses: expert reads of this generation.
        width: use a shorter wording where the line would be longer than this.
    """
    prompt, answer = response.prompt_tokens, response.generation_tokens
    prompt_tps = digits(response.prompt_tps)
    read = show_size(bytes_read)
    peak = show_size(1e9 * response.peak_memory)
    # The first token belongs to the prompt's time, so that one token alone has no rate.
    tps = digits(response.generation_tps) if answer > 1 else None
    hit = f", {100 * hits / (hits + misses):.0f}% hits" if hits + misses else ""
    line = (
        f"prompt {prompt} tokens, {prompt_tps} tok/s · "
        f"generation {answer} tokens{f', {tps} tok/s' if tps else ''} · "
        f"experts read {read}{hit} · peak memory {peak}"
    )
    if width is not None and len(line) > width:
        line = (
            f"prompt {prompt} at {prompt_tps}/s · answer {answer}{f' at {tps}/s' if tps else ''} · "
            f"read {read}{hit} · peak {peak}"
        )
    if width is not None and len(line) > width:
        line = (
            f"{prompt} + {answer} tokens at {prompt_tps}{f' and {tps}' if tps else ''}/s · "
            f"read {read}{hit} · peak {peak}"
        )
    return line


# An answer as it comes


class AnswerView(Protocol):
    """Shows one answer. ``feed`` takes its pieces of text; ``close`` finishes, also when interrupted."""

    def feed(self, text: str) -> None: ...

    def close(self) -> None: ...

    def show_figures(self, response: GenerationResponse, bytes_read: int, hits: int, misses: int) -> None: ...


def answer_view(thinking: bool = False) -> AnswerView:
    """The view for this process's standard output.

    Args:
        thinking: the prompt has opened a thinking part, so that the answer begins inside it.
    """
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalAnswer(console, thinking)
    return PlainAnswer(sys.stdout, sys.stderr)


class PlainAnswer:
    """The generated text and nothing else on one stream, as it comes; figures on the other."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._last = "\n"

    def feed(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()
            self._last = text[-1]

    def close(self) -> None:
        # Both streams may end up in one place; the text itself gets nothing added.
        if self._last != "\n":
            self._err.write("\n")

    def show_figures(self, response: GenerationResponse, bytes_read: int, hits: int, misses: int) -> None:
        self._err.write(figures(response, bytes_read, hits, misses) + "\n")
        self._err.flush()


class TerminalAnswer:
    """Draws an answer: a thinking part set apart and dim, then Markdown.

    Blocks that can no longer change are printed for good and scroll away; only the unfinished one is drawn
    again and again. A block that outgrows the screen is printed from its top, line by line. So the cost of a
    redraw is that of one block, and redraws are spaced so that drawing takes at most a fifth of the time.
    """

    FRAME = 1 / 15  # seconds between redraws, at least
    SHARE = 5

    def __init__(
        self,
        console: Console,
        thinking: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        fold: bool = False,
    ) -> None:
        """
        Args:
            thinking: the answer begins inside a thinking part; see :meth:`feed`.
            fold: of a thinking part only the last lines are seen, and one line when it is over.
        """
        self._console = console
        self._clock = clock
        self._splitter = ThinkingSplitter(thinking)
        self._thinking_kind = FoldedThinkingSection if fold else ThinkingSection
        self._section: Section | None = None
        self._tail = ""  # text of the current section that is not printed for good
        self._scrolled = 0  # lines of the tail's rendering that have left the screen
        self._below = False  # whether the tail stands below finished blocks of its section
        self._due = 0.0
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def feed(self, text: str) -> None:
        for thinking, piece in self._splitter.feed(text):
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
            self._live.start()
        self._tail += piece

    def _draw(self) -> None:
        if self._section is None:
            return
        start = self._clock()
        finished, self._tail = self._section.split(self._tail)
        with self._console:  # one write to the terminal: nothing flickers
            if finished is not None:
                self._print(self._lines(finished)[self._scrolled :])
                self._scrolled, self._below = 0, True
            lines = self._lines(self._section.render(self._tail))
            # One row is left free, because the cursor may stand on it.
            excess = len(lines) - self._scrolled - max(1, self._console.height - 1)
            if excess > 0:
                self._print(lines[self._scrolled : self._scrolled + excess])
                self._scrolled += excess
            self._live.update(Lines(lines[self._scrolled :]), refresh=True)
        now = self._clock()
        self._due = now + max(self.FRAME, self.SHARE * (now - start))

    def _end_section(self) -> None:
        if self._section is None:
            return
        lines = self._lines(self._section.finish(self._tail))[self._scrolled :]
        with self._console:
            self._live.update(Lines([]), refresh=True)
            self._live.stop()
            self._print(lines)
        self._section, self._tail, self._scrolled, self._below = None, "", 0, False

    def _lines(self, renderable: RenderableType) -> list[list[Segment]]:
        """The renderable's lines, with the blank one that sets it apart from what was printed before."""
        assert self._section is not None
        lines = [_strip(line) for line in self._console.render_lines(renderable, pad=False)]
        if not self._section.spaced:
            return lines
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            del lines[0]
        return [[], *lines] if lines and self._below else lines

    def _print(self, lines: list[list[Segment]]) -> None:
        if lines:
            self._console.print(Lines(lines))


class Lines:
    """Lines already rendered."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            yield from line
            yield Segment.line()


def _strip(line: list[Segment]) -> list[Segment]:
    """Without trailing blanks that show nothing: they get in the way when code is copied from a terminal."""
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


class Section(Protocol):
    """A part of an answer.

    Attributes:
        heading: printed once, before the part.
        spaced: whether finished blocks stand apart by a blank line.
    """

    heading: RenderableType | None
    spaced: bool

    def split(self, text: str) -> tuple[RenderableType | None, str]:
        """What of the text can no longer change, rendered, and the rest of the text."""
        ...

    def render(self, text: str) -> RenderableType: ...

    def finish(self, text: str) -> RenderableType:
        """Like ``render``, for good."""
        ...


class ThinkingSection:
    """What the model thinks before it answers: plain text, dim and indented under a heading."""

    heading: RenderableType | None = Text("Thinking", style="dim bold")
    spaced = False

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

    LINES = 6

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
        # Only so much is broken into lines again with every redraw; from the start of a line, lest it jumps about.
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


# Progress


class PromptProgress:
    """A bar while a long prompt is read; nothing at all for one that takes less than ``delay`` seconds.

    Call it with (tokens done, tokens in all). It is gone when the last token is done.
    """

    def __init__(self, console: Console | None = None, delay: float = 1.0) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("Reading the prompt"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("")
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._timer = threading.Timer(delay, self._start)
            self._timer.daemon = True
            self._timer.start()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)
        if done == total:
            self.close()

    def _start(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._progress.start()

    def close(self) -> None:
        """Takes the bar away. May be called more than once."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
                self._progress.stop()


class _Bar(Progress):
    """A bar that leaves room for the ^C of a terminal, which in the next line would keep the bar from being erased."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield _Narrower(self.make_tasks_table(self.tasks), len("^C"))


class _Narrower:
    """A renderable in a line that has so many columns less."""

    def __init__(self, inner: RenderableType, columns: int) -> None:
        self._inner, self._columns = inner, columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Constrain(self._inner, options.max_width - self._columns)


class ConversionProgress:
    """A conversion's progress in bytes: a bar on a terminal, else a line every few seconds, on stderr."""

    EVERY = 5.0  # seconds between lines

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._clock = clock
        self._first: tuple[float, int] | None = None  # when counting began, and the bytes already done then
        self._total = 0
        self._printed = clock()
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
            )

    def __enter__(self) -> ConversionProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str) -> None:
        """A remark, above the bar: in one line, which a terminal breaks between words."""
        self._console.print(Text(printable(line)), style="dim", soft_wrap=not self._console.is_terminal)

    def progress(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` bytes; ``what`` is being worked on."""
        if self._first is None or total != self._total:
            self._first, self._total = (self._clock(), done), total
        if self._bar is not None:
            if not self._bar.tasks:
                self._bar.add_task(what, total=total, completed=done)
            self._bar.update(self._bar.tasks[0].id, completed=done, total=total, description=what)
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
