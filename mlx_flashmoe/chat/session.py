"""A conversation on disk: JSON Lines, one message a line, as the chat template is given them.

{"role": "user", "content": "How far is the moon?"}
{"role": "assistant", "content": "About 384,000 km.", "reasoning_content": "The mean distance …"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.tokenizer import Message

ROLES = ("system", "user", "assistant", "tool")


def data_directory() -> Path:
    """Where conversations and what was typed are kept."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "mlx-flashmoe"


def _folder() -> Path:
    return data_directory() / "sessions"


def saved_files() -> list[Path]:
    """Files of the conversations that were saved under their own names, the one saved last first."""
    return sorted(_folder().glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


class Session:
    """Messages, and the file that has them.

    Args:
        path: where ``save`` writes; nowhere if None.
        messages: so far.

    Attributes:
        messages: the conversation. Change it as you like, then ``save``.
    """

    def __init__(self, path: Path | None = None, messages: list[Message] | None = None):
        self.path = path
        self.messages = messages or []

    @classmethod
    def new(cls) -> Session:
        """An empty one, whose file will be named by the time of day."""
        return cls(_folder() / f"{datetime.now():%Y-%m-%d-%H%M%S-%f}.jsonl")

    @classmethod
    def begin(cls, note: Callable[[str], None]) -> Session:
        """As ``new``, or, with a note, one that is not saved, if there can be no folder for its file."""
        try:
            _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            note(f"{_folder()}: {e.strerror}; this conversation is not saved, /save FILE writes it")
            return cls()
        return cls.new()

    @classmethod
    def load(cls, path: Path) -> Session:
        """Raises RequestError: the file cannot be read, or a line of it is not a message."""
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise RequestError(f"{path}: cannot be read as a conversation: {reason}") from None
        messages = []
        for number, line in enumerate(lines if lines != [""] else [], 1):
            try:
                message = json.loads(line)
                if message["role"] not in ROLES or not isinstance(message["content"], str):
                    raise ValueError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise RequestError(
                    f"{path}: line {number} is not a message; a line is a JSON object with a role and content"
                ) from None
            messages.append(message)
        return cls(path, messages)

    @classmethod
    def latest(cls) -> Session:
        """The conversation that was last saved under its own name. Raises RequestError if there is none."""
        files = saved_files()
        if not files:
            raise RequestError(f"{_folder()}: there is no conversation to resume yet")
        return cls.load(files[0])

    @property
    def system(self) -> str | None:
        """The system message."""
        if self.messages and self.messages[0]["role"] == "system":
            return str(self.messages[0]["content"])
        return None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def take_back(self) -> str:
        """Removes the user's last message and all that came after it; returns its text.

        Raises:
            RequestError: there is none.
        """
        place = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=-1)
        if place < 0:
            raise RequestError("there is no message to take back")
        text = str(self.messages[place]["content"])
        del self.messages[place:]
        self.save()
        return text

    def save(self) -> None:
        """Writes the file anew, whole or not at all. Raises RequestError if it cannot be written."""
        if self.path is not None:
            self.write(self.path)

    def write(self, path: Path) -> None:
        """Writes the messages to a file that only its owner may read."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="replace") as f:
                f.writelines(json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages)
            os.replace(part, path)
        except OSError as e:
            with suppress(OSError):
                part.unlink()
            raise RequestError(f"{path}: the conversation cannot be saved: {e.strerror}") from None
