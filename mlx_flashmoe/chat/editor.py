"""Where messages come from: a line editor on a terminal, lines of standard input otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT: AnyFormattedText = [("bold", "> ")]


class Reader(Protocol):
    """A source of messages."""

    interactive: bool

    def read(self, default: str = "") -> str:
        """The next message. Raises EOFError after the last, KeyboardInterrupt for Ctrl-C."""
        ...

    def ask(self, question: str) -> bool: ...


def message_reader(history: Path, commands: Sequence[str]) -> Reader:
    """The source for this process."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return Editor(history, commands)
    return Lines()


class Editor:
    """Enter sends; Alt-Enter, Ctrl-J and a backslash before Enter begin a new line. Pasted lines stay lines.

    Args:
        history: the file with what was typed; only its owner may read it.
        commands: completed with the tab key.
    """

    interactive = True

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(history, os.O_WRONLY | os.O_CREAT, 0o600))
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(history)),
            multiline=True,
            key_bindings=_keys(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            prompt_continuation="  ",
        )

    def read(self, default: str = "") -> str:
        return self._session.prompt(PROMPT, default=default)

    def ask(self, question: str) -> bool:
        once: PromptSession[str] = PromptSession()
        try:
            return once.prompt(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class Lines:
    """Each line is a message; one that ends in a backslash goes on in the next. Nothing can be asked."""

    interactive = False

    def read(self, default: str = "") -> str:
        message = ""
        while line := sys.stdin.readline():
            line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return message + line
            message += line[:-1] + "\n"
        if not message:
            raise EOFError
        return message

    def ask(self, question: str) -> bool:
        return False
