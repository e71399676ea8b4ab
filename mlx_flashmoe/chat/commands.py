"""What a line that begins with a slash does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mlx_flashmoe.chat.conversation import Conversation
from mlx_flashmoe.chat.session import Session
from mlx_flashmoe.chat.view import PlainView, TerminalView
from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.sizes import show_size

HELP = {
    "/help": "show this",
    "/clear": "begin a new conversation, with the same system message",
    "/system [TEXT]": "show the system message, or set it",
    "/save [FILE]": "say where the conversation is saved, or write a copy of it",
    "/load FILE": "go on with a saved conversation",
    "/tools": "list the tools that the model may call",
    "/think": "show what the model thought before its last answer",
    "/stats": "show figures of this conversation and of the model",
    "/quit": "leave; so does Ctrl-D",
}
NAMES = [usage.split()[0] for usage in HELP]


class Commands:
    """The commands of one chat.

    Attributes:
        done: the user has asked to leave.
    """

    def __init__(self, conversation: Conversation, view: TerminalView | PlainView) -> None:
        self.done = False
        self._conversation = conversation
        self._view = view
        self._run: dict[str, Callable[[str], None]] = {name: getattr(self, name[1:]) for name in NAMES}

    @staticmethod
    def is_command(text: str) -> bool:
        """A slash and a word: a path is none."""
        return re.match(r"/\w+(\s|$)", text) is not None

    def run(self, text: str) -> None:
        """Raises RequestError: there is no such command, or it cannot be done."""
        name, _, argument = text.partition(" ")
        name = name.strip()
        if name not in self._run:
            raise RequestError(f"there is no command {name}; /help lists them")
        self._run[name](argument.strip())

    def help(self, _: str) -> None:
        self._view.table(HELP.items())
        self._view.note("")
        self._view.note("Alt-Enter, or a backslash before Enter, begins a new line. Ctrl-C stops an answer.")

    def clear(self, _: str) -> None:
        old = self._conversation.session
        self._conversation.session = Session.new() if old.path is not None else Session()
        self._conversation.session.system = old.system
        self._view.note("a new conversation")

    def system(self, text: str) -> None:
        session = self._conversation.session
        if text:
            session.system = text
            session.save()
        self._view.note(session.system or "there is no system message; /system TEXT sets one")

    def save(self, argument: str) -> None:
        session = self._conversation.session
        if argument:
            path = Path(argument).expanduser()
            if path.exists():
                raise RequestError(f"{path} exists already; give another name")
            session.write(path)
            self._view.note(f"{len(session.messages)} messages are in {path}")
        elif session.path is None:
            self._view.note("this conversation is not saved; /save FILE writes it")
        else:
            self._view.note(f"this conversation is saved in {session.path} as it goes on")

    def load(self, argument: str) -> None:
        if not argument:
            raise RequestError("which conversation? give a file: /load FILE")
        session = Session.load(Path(argument).expanduser())
        self._conversation.session = session
        self._view.note(f"{session.path}: {len(session.messages)} messages")

    def tools(self, _: str) -> None:
        functions = self._conversation.functions.values()
        if functions:
            self._view.table((f.name, f.description.split("\n")[0]) for f in functions)
        else:
            self._view.note("no tools; start with --tools FILE.py or --shell to give the model some")

    def think(self, _: str) -> None:
        if self._conversation.thinking:
            self._view.thinking(self._conversation.thinking)
        else:
            self._view.note("nothing was thought before the last answer")

    def stats(self, _: str) -> None:
        done = self._conversation.figures
        prompt = sum(f.response.prompt_tokens for f in done)
        kept = sum(f.response.cached_tokens for f in done)
        generated = sum(f.response.generation_tokens for f in done)
        seconds = sum(
            (f.response.generation_tokens - 1) / f.response.generation_tps
            for f in done
            if f.response.generation_tps
        )
        hits, misses = sum(f.hits for f in done), sum(f.misses for f in done)
        rate = f", {generated / seconds:.1f} tok/s" if seconds else ""
        rows = [
            ("messages", str(len(self._conversation.session.messages))),
            ("answers", f"{len(done)} of {generated} tokens{rate}"),
            ("prompts", f"{prompt} tokens, {kept} of them kept from before"),
        ]
        if hits + misses:
            rows.append(
                (
                    "experts",
                    f"{100 * hits / (hits + misses):.0f}% hits, {show_size(sum(f.bytes_read for f in done))} read",
                )
            )
        if done:
            rows.append(("peak memory", show_size(1e9 * done[-1].response.peak_memory)))
        rows.append(("memory", str(self._conversation.model.plan).removeprefix("memory: ")))
        self._view.table(rows)

    def quit(self, _: str) -> None:
        self.done = True
