"""A terminal to draw on."""

from __future__ import annotations

import re

from rich.console import Console

CODES = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|\x1b\]8;[^\x1b]*\x1b\\")


class Screen:
    """A terminal: applies what Rich writes, and fails on what a real one could not undo."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.width, self.height = width, height
        self.console = Console(
            file=self, force_terminal=True, width=width, height=height, highlight=False, legacy_windows=False
        )
        self.rows, self.row, self.column = [""], 0, 0
        self.continued = [False]  # rows that the next one is a continuation of: their line was too long
        self.writes = 0
        self.cursor = True

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        self.writes += 1
        while text:
            code = CODES.match(text)
            if code:
                if code[2]:  # and not a link
                    self._control(code[1], code[2])
                text = text[code.end() :]
                continue
            plain = re.match(r"[^\x1b\r\n]|\n|\r", text)
            assert plain, f"not understood: {text[:20]!r}"
            text = text[plain.end() :]
            if plain[0] == "\n":
                self._down()
            elif plain[0] == "\r":
                self.column = 0
            else:
                if self.column == self.width:
                    self.continued[self.row] = True
                    self._down()
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + plain[0] + line[self.column + 1 :]
                self.column += 1

    def resize(self, width: int) -> None:
        """As tmux and most terminals do it: lines that do not fit are broken, and put together when they fit again."""
        lines: list[str] = []
        joins = False
        for number, (row, continued) in enumerate(zip(self.rows, self.continued)):
            if not joins:
                lines.append("")
            if number == self.row:
                line, offset = len(lines) - 1, len(lines[-1]) + self.column
            lines[-1] += row
            joins = continued
        self.rows, self.continued = [], []
        for number, text in enumerate(lines):
            if number == line:
                self.row = len(self.rows) + max(0, offset - 1) // width
                self.column = offset - width * (max(0, offset - 1) // width)
            pieces = [text[i : i + width] for i in range(0, len(text), width)] or [""]
            self.rows += pieces
            self.continued += [True] * (len(pieces) - 1) + [False]
        self.width = self.console.width = width

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append("")
            self.continued.append(False)

    def _control(self, argument: str, kind: str) -> None:
        if kind == "A":
            self.row -= int(argument or 1)
            assert self.row >= max(0, len(self.rows) - self.height), "the cursor cannot leave the screen"
        elif kind == "K":
            assert argument == "2"
            self.rows[self.row] = ""
            self.continued[self.row] = False
        elif argument == "?25":
            self.cursor = kind == "h"
        else:
            assert kind == "m", f"not understood: {argument}{kind}"

    @property
    def text(self) -> str:
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n")
