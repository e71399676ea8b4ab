"""Views of a conversation: on a terminal drawn with Rich, in a pipe plain text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text as Line

from mlx_flashmoe.chat.conversation import Figures, View
from mlx_flashmoe.chat.recap import last_turns
from mlx_flashmoe.chat.session import Session
from mlx_flashmoe.console import digits, print_error, printable
from mlx_flashmoe.sizes import counted, show_size
from mlx_flashmoe.terminal.answer import TerminalAnswer
from mlx_flashmoe.terminal.bars import Bar, prompt_bar
from mlx_flashmoe.terminal.region import Lines, print_above
from mlx_flashmoe.tools import Piece, Text, Thinking, ToolCall

RESULT_LINES = 8
"""Lines of a tool's result that are shown; the model gets all of it."""

# Marks that make a terminal show text in another order than it has: what is shown is what is run.
_REORDERING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C], 0xFFFD)


def chat_view() -> TerminalView | PlainView:
    """The view for this process's standard output."""
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalView(console)
    return PlainView(sys.stdout, sys.stderr)


def figures_line(figures: Figures, width: int | None = None) -> str:
    """One line of figures of an answer; shorter where it would be wider than ``width`` cells."""
    response = figures.response
    count = response.generation_tokens
    new = response.prompt_tokens - response.cached_tokens
    rate = f", {digits(response.generation_tps)} tok/s" if count > 1 else ""
    routed = figures.hits + figures.misses
    most = f" of {figures.context_length}" if figures.context_length is not None else ""
    parts = [
        f"{counted(count, 'token')}{rate}",
        f"prompt {new} new of {response.prompt_tokens}",
        *([f"{100 * figures.hits / routed:.0f}% hits"] if routed else []),
        f"read {show_size(figures.bytes_read)}",
        f"context {figures.context}{most}",
    ]
    line = " · ".join(parts)
    if width is not None and len(line) > width:
        line = " · ".join(part for part in parts if not part.startswith("prompt"))
    return line


class TerminalView(View):
    """Answers as Markdown, thinking folded when it is over, calls in panels."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._answer: TerminalAnswer | None = None
        self._progress: Bar | None = None
        self._writing: Status | None = None
        self._apart = True  # nothing stands right above that should be set apart

    def prompt_progress(self, done: int, total: int) -> None:
        if self._progress is None and done < total:
            self._progress = prompt_bar()
        if self._progress is not None:
            self._progress(done, total)

    def show(self, event: Piece) -> None:
        self._end_writing()
        if isinstance(event, ToolCall):
            return
        if self._answer is None:
            self._answer = TerminalAnswer(self.console, fold=True)
            self._apart = False
        self._answer.show(isinstance(event, Thinking), event.text)

    def writing_call(self) -> None:
        if self._writing is None:
            self._end_text()
            self._writing = Status(Line("calling a tool", style="dim"), console=self.console)
            self._writing.start()

    def end_answer(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        self._end_writing()
        self._end_text()

    def call(self, call: ToolCall) -> None:
        self._set_apart()
        lines = Line("" if call.arguments else "no arguments", style="" if call.arguments else "dim")
        for name, value in call.arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text = printable(text).translate(_REORDERING)
            lines.append(f"{'' if not lines else chr(10)}{printable(name)}: ", "dim")
            lines.append(text if "\n" not in text else "\n" + text)
        title = Line(printable(call.name), style="bold")
        self.console.print(Panel(lines, title=title, title_align="left", border_style="dim", expand=False))

    def result(self, text: str) -> None:
        shown = Padding(Line(printable(text).rstrip("\n"), style="dim"), (0, 0, 0, 2))
        lines = self.console.render_lines(shown, pad=False)
        more = len(lines) - RESULT_LINES
        self.console.print(Lines(lines if more <= 1 else lines[:RESULT_LINES]))
        if more > 1:
            self.console.print(Line(f"  … {more} more lines", style="dim"))
        self._apart = False

    def figures(self, figures: Figures) -> None:
        self._set_apart()
        self.console.print(Line(figures_line(figures, self.console.width), style="dim"))
        self.console.print()
        self._apart = True

    def recap(self, session: Session) -> None:
        """Where a conversation was left."""
        self.note(f"{session.path}: {counted(len(session.messages), 'message')}")
        for message in last_turns(session.messages):
            mine = message["role"] == "user"
            text = printable(message["content"])
            self.console.print(Line(f"> {text}", style="bold") if mine else Line(text, style="dim"))
        self.console.print()

    def note(self, text: str) -> None:
        print_above(lambda: self.console.print(Line(printable(text), style="dim")))

    def error(self, text: str) -> None:
        print_error(text)

    def thinking(self, text: str) -> None:
        """A thinking part in full."""
        self.console.print(Padding(Line(printable(text).strip("\n"), style="dim"), (0, 0, 0, 2)))

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        for left, right in rows:
            table.add_row(Line(printable(left)), Line(printable(right), style="dim"))
        self.console.print(Padding(table, (0, 0, 0, 2)))

    def _set_apart(self) -> None:
        if not self._apart:
            self.console.print()
            self._apart = True

    def _end_text(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _end_writing(self) -> None:
        if self._writing is not None:
            self._writing.stop()
            self._writing = None


class PlainView(View):
    """Answers and nothing else on one stream, as they come; everything else on the other."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._last = "\n"

    def prompt_progress(self, done: int, total: int) -> None:
        pass

    def show(self, event: Piece) -> None:
        if isinstance(event, Text):
            self._out.write(event.text)
            self._out.flush()
            self._last = event.text[-1]

    def writing_call(self) -> None:
        pass

    def end_answer(self) -> None:
        if self._last != "\n":
            self._out.write("\n")
            self._out.flush()
            self._last = "\n"

    def call(self, call: ToolCall) -> None:
        self.note(f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}")

    def result(self, text: str) -> None:
        self.note(text)

    def figures(self, figures: Figures) -> None:
        self.note(figures_line(figures))

    def recap(self, session: Session) -> None:
        self.note(f"{session.path}: {counted(len(session.messages), 'message')}")

    def note(self, text: str) -> None:
        print(text, file=self._err, flush=True)

    def error(self, text: str) -> None:
        print_error(text)

    def thinking(self, text: str) -> None:
        self.note(text.strip("\n"))

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        for left, right in rows:
            self.note(f"{left}: {right}")
