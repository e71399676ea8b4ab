"""Where messages come from: a line editor on a terminal, lines of standard input otherwise."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import clear_typeahead, get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys

from mlx_flashmoe import stdin

PROMPT: AnyFormattedText = [("bold", "> ")]


class Reader(Protocol):
    """A source of messages, used in a ``with`` statement.

    Attributes:
        interactive: a user is there, who can react to an error.
    """

    interactive: bool

    def __enter__(self) -> Reader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def read(self, default: str = "") -> str:
        """The next message, of which the user finds ``default`` typed already.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C.
        """
        ...

    def ask(self, question: str) -> bool:
        """The user's answer to a yes-or-no question; no where there is no user."""
        ...

    def drop_typed(self) -> None:
        """Forgets what was typed and not read yet."""
        ...

    def lend(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that may read from the terminal itself, as one that may do so during the chat."""
        ...


def message_reader(history: Path, commands: Sequence[str], note: Callable[[str], None]) -> Reader:
    """The source for this process.

    Args:
        note: is told of what does not work.
    """
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stdout.isatty():
        return Lines()
    if os.environ.get("TERM") == "dumb":
        return PromptedLines()
    return Editor(history, commands, note)


def _exit(number: int, *_: Any) -> None:
    """Ends the process as the signal would, by way of every ``finally``."""
    sys.exit(128 + number)


class Editor:
    """Enter sends; Alt-Enter, Ctrl-J and a backslash before Enter begin a new line. Pasted lines stay lines.

    Between two prompts, keys are not shown and Enter stays Enter, so that what is typed ahead is edited and sent as if
    it were typed at the prompts that follow.

    Args:
        history: the file with what was typed; only its owner may read it.
        commands: completed with the tab key.
        note: is told if there can be no such file.
    """

    interactive = True

    def __init__(self, history: Path, commands: Sequence[str], note: Callable[[str], None]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history, note),
            multiline=True,
            key_bindings=_keys(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            prompt_continuation="  ",
        )
        self._before: list[Any] | None = None

    def __enter__(self) -> Editor:
        # The default action would leave the terminal without echo.
        self._terminated = signal.signal(signal.SIGTERM, _exit)
        with suppress(termios.error):
            self._before = termios.tcgetattr(sys.stdin)
        self._wait_quietly()
        self._keep_typed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            self._session.output.disable_bracketed_paste()
            self._session.output.flush()
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)
        signal.signal(signal.SIGTERM, self._terminated)

    def read(self, default: str = "") -> str:
        try:
            return self._session.prompt(PROMPT, default=default)
        finally:
            self._wait_quietly()

    def ask(self, question: str) -> bool:
        # Text typed before the question was shown does not answer it.
        ahead = self._typed_ahead()
        once: PromptSession[str] = PromptSession()
        try:
            return once.prompt(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False
        finally:
            store_typeahead(self._session.input, ahead + get_typeahead(self._session.input))
            self._wait_quietly()

    def drop_typed(self) -> None:
        clear_typeahead(self._session.input)
        with suppress(termios.error):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)

    def lend(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def as_before() -> Iterator[None]:
            if self._before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)
            try:
                yield
            finally:
                self._wait_quietly()
                self._keep_typed()

        return as_before()(call)  # keeps the signature, by which its arguments are checked

    def _wait_quietly(self) -> None:
        """Sets the terminal as it is between two prompts."""
        if self._before is None:
            return
        quiet = [*self._before[:6], list(self._before[6])]
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
        self._session.output.enable_bracketed_paste()
        self._session.output.flush()

    def _keep_typed(self) -> None:
        """Keeps what was typed while the terminal was as others have it: there Enter is Ctrl-J."""
        keys = [KeyPress(Keys.ControlM, "\r") if k.key == Keys.ControlJ else k for k in self._typed_ahead()]
        store_typeahead(self._session.input, keys)

    def _typed_ahead(self) -> list[KeyPress]:
        """Takes the keys that were pressed and not read yet."""
        keys = get_typeahead(self._session.input)
        while more := self._session.input.read_keys():
            keys += more
        return keys + self._session.input.flush_keys()


class _SavedHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a disk that is full must not end the chat
            super().store_string(string)


def _history(file: Path, note: Callable[[str], None]) -> History:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as e:
        note(f"{file}: {e.strerror}; messages of this chat are not there to be recalled in the next")
        return InMemoryHistory()
    return _SavedHistory(str(file))


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
    """Each line is a message; one that ends in a backslash continues in the next. Nothing can be asked."""

    interactive = False

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def read(self, default: str = "") -> str:
        message = ""
        while line := stdin.read_line():
            line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return message + line
            message += line[:-1] + "\n"
        if not message:
            raise EOFError
        return message

    def ask(self, question: str) -> bool:
        return False

    def drop_typed(self) -> None:
        pass

    def lend(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return call


class PromptedLines(Lines):
    """Lines that a user types on a terminal that can do nothing but show them."""

    interactive = True

    def read(self, default: str = "") -> str:
        if default:
            print(f"not sent: {default}")
        print("> ", end="", flush=True)
        return super().read()

    def ask(self, question: str) -> bool:
        print(f"{question} [y/N] ", end="", flush=True)
        return stdin.read_line().strip().lower() in ("y", "yes")
