"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from mlx_flashmoe.chat.conversation import Conversation
from mlx_flashmoe.chat.recap import first_words, one_line
from mlx_flashmoe.chat.session import Session, saved_files
from mlx_flashmoe.chat.view import PlainView, TerminalView
from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.sizes import counted, show_size

HELP = {
    "/help": "show this",
    "/clear": "begin a new conversation, with the same system message",
    "/retry": "send the last message again, for another answer",
    "/edit": "take the last message back into the editor, to change it",
    "/undo": "take the last message and its answer back",
    "/set [NAME VALUE]": "show the settings, or change one: /set temp 0.7",
    "/system [TEXT]": "show the system message, or set it",
    "/list": "list the saved conversations",
    "/load N or FILE": "continue a saved conversation",
    "/save [FILE]": "say where the conversation is saved, or write a copy of it",
    "/tools": "list the tools that the model may call",
    "/think": "show what the model thought before its last answer",
    "/stats": "show figures of this conversation and of the model",
    "/quit": "leave; so do /exit, /bye, /q and Ctrl-D",
}
ALIASES = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit"}
NAMES = [*(usage.split()[0] for usage in HELP), *ALIASES]

LISTED = 20
"""Saved conversations that /list shows."""


class Commands:
    """The commands of one chat.

    Attributes:
        done: the user has asked to leave.
        again: a message to send, "" if none; the caller sends and empties it.
        edited: a message for the editor, likewise.
    """

    def __init__(self, conversation: Conversation, view: TerminalView | PlainView) -> None:
        self.done = False
        self.again = self.edited = ""
        self._conversation = conversation
        self._view = view
        self._run: dict[str, Callable[[str], None]] = {
            name: getattr(self, ALIASES.get(name, name)[1:]) for name in NAMES
        }

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
            self._view.note(f"{counted(len(session.messages), 'message')} in {path}")
        elif session.path is None:
            self._view.note("this conversation is not saved; /save FILE writes it")
        else:
            self._view.note(f"this conversation is saved in {session.path} after each turn")

    def retry(self, _: str) -> None:
        self.again = self._conversation.session.take_back()

    def edit(self, _: str) -> None:
        self.edited = self._conversation.session.take_back()

    def undo(self, _: str) -> None:
        text = self._conversation.session.take_back()
        self._view.note(f"taken back, with what came of it: {one_line(text, 50)}")

    def set(self, argument: str) -> None:
        settings = self._conversation.settings
        if not argument:
            self._view.table(settings.rows())
            return
        name, _, value = argument.partition(" ")
        if not value.strip():
            raise RequestError(f"{name} to what? /set NAME VALUE changes a setting, /set lists them")
        settings.set(name, value.strip())
        if name == "think" and not self._conversation.can_switch_thinking:
            self._view.note("this changes nothing: the model's chat template has no enable_thinking")
        else:
            self._view.note(f"{name} is {value.strip()}")

    def list(self, _: str) -> None:
        rows = []
        for number, path in enumerate(saved_files()[:LISTED], 1):
            try:
                words = first_words(Session.load(path).messages, 50)
                when = datetime.fromtimestamp(path.stat().st_mtime)
            except (RequestError, OSError):  # another chat may have removed it, or it was edited by hand
                continue
            rows.append((f"{number}", f"{when:%Y-%m-%d %H:%M}  {words}"))
        if rows:
            self._view.table(rows)
            self._view.note("/load N continues one of them")
        else:
            self._view.note("no conversation is saved yet")

    def load(self, argument: str) -> None:
        if not argument:
            raise RequestError("which conversation? /list shows them: /load N, or /load FILE")
        path = Path(argument).expanduser()
        if argument.isdecimal() and not path.exists():
            files = saved_files()
            if not 1 <= int(argument) <= len(files):
                raise RequestError(f"there is no conversation {argument}; /list shows those that there are")
            path = files[int(argument) - 1]
        session = Session.load(path)
        self._conversation.session = session
        self._view.recap(session)

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
            ("answers", f"{len(done)} of {counted(generated, 'token')}{rate}"),
            ("prompts", f"{counted(prompt, 'token')}, {kept} of them kept from before"),
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
