"""Thinking, text and calls of one answer, told apart as its text comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlx_flashmoe.thinking import ThinkingSplitter
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools.events import (
    Cut,
    Event,
    Piece,
    Reading,
    Text,
    Thinking,
    Tool,
    ToolCall,
    parameter_schemas,
)
from mlx_flashmoe.tools.finder import CallFinder
from mlx_flashmoe.tools.syntax import Syntax
from mlx_flashmoe.tools.syntaxes.qwen import QWEN


def parse_answer(
    text: str, tools: Iterable[Tool] | None = None, thinking: bool = False, syntax: Syntax = QWEN
) -> list[Piece]:
    """Thinking, text and calls of a whole answer, in order. A call that never ends is text, as it stands."""
    parser = _Parser(tools, thinking, syntax, cut_is_text=True)
    events = parser.feed(text) + parser.finish()
    return [event for event in events if isinstance(event, Thinking | Text | ToolCall)]


def answer_parser(tokenizer: Tokenizer, tools: Iterable[Tool] | None, prompt: Sequence[int]) -> AnswerParser:
    """The parser for the answer to a prompt, token ids: with the checkpoint's syntax and its token for ``</think>``."""
    return AnswerParser(
        tools, tokenizer.opens_thinking(prompt), tokenizer.tool_syntax, tokenizer.think_end_id
    )


class AnswerParser:
    """Tells thinking, text and calls of one answer apart, as its text comes in pieces of any size.

    Args:
        tools: what the model may call. Without any, nothing is a call.
        thinking: the prompt has opened a thinking part (``tokenizer.opens_thinking``).
        syntax: how the model writes calls (``tokenizer.tool_syntax``).
        think_end_id: the token that ends thinking. If it is given, and ``feed`` is given tokens, then ``</think>``
            in other tokens is text. Without it, the text decides.

    Attributes:
        unfinished: a call has begun, and did not end. After ``finish``, it never will.
        cut_text: the text of such calls, as the model wrote it.
    """

    def __init__(
        self,
        tools: Iterable[Tool] | None = None,
        thinking: bool = False,
        syntax: Syntax = QWEN,
        think_end_id: int | None = None,
    ) -> None:
        self._parser = _Parser(tools, thinking, syntax, think_end_id)
        self.unfinished = False
        self.cut_text = ""

    @property
    def in_call(self) -> bool:
        """A call is being written, as far as one can tell."""
        return self._parser.in_call

    def feed(self, text: str, token: int | None = None) -> list[Event]:
        """Returns the events that one more piece of text settles. ``token``: the id of the token that it comes from."""
        return self._events(self._parser.feed(text, token))

    def finish(self) -> list[Event]:
        """Returns the events that were held back, when the answer ends."""
        return self._events(self._parser.finish())

    def _events(self, readings: list[Reading]) -> list[Event]:
        for reading in readings:
            if isinstance(reading, Cut):
                self.unfinished = True
                self.cut_text += reading.text
        return [reading for reading in readings if not isinstance(reading, Cut)]


class _Parser:
    """Does the work, and reports calls that were cut."""

    def __init__(
        self,
        tools: Iterable[Tool] | None,
        thinking: bool,
        syntax: Syntax,
        think_end_id: int | None = None,
        cut_is_text: bool = False,
    ) -> None:
        self._cut_is_text = cut_is_text
        schemas = parameter_schemas(tools or ())
        self._reader = syntax.reader(schemas) if syntax.reader else None
        self._splitter = ThinkingSplitter(thinking, think_end_id)
        finds = bool(schemas) and self._reader is None
        self._finder = syntax.finder(schemas) if finds else None
        self._thought = _CallsInThinking(syntax.finder(schemas)) if finds else None
        self._part: type[Thinking] | type[Text] | None = None
        self._begun = False  # the part has shown something
        self._space = ""  # white space that counts if the part continues

    @property
    def in_call(self) -> bool:
        reader = self._reader or self._finder
        return reader is not None and reader.in_call

    def feed(self, text: str, token: int | None = None) -> list[Reading]:
        if self._reader is not None:
            return self._trim(self._reader.feed(text))
        return [event for part in self._splitter.feed(text, token) for event in self._split(*part)]

    def finish(self) -> list[Reading]:
        if self._reader is not None:
            return self._trim(self._reader.finish())
        events = [event for part in self._splitter.finish() for event in self._split(*part)]
        if self._thought is not None:
            events += self._trim(self._thought.finish())
        if self._finder is not None:
            events += self._trim(self._finder.finish())
        return events

    def _split(self, thinking: bool, piece: str) -> list[Reading]:
        if thinking:
            return self._trim(self._thought.feed(piece)) if self._thought else [*self.show(Thinking, piece)]
        events: list[Reading] = []
        if self._thought is not None:
            events, self._thought = self._trim(self._thought.end()), None
        return events + (self._trim(self._finder.feed(piece)) if self._finder else [*self.show(Text, piece)])

    def _trim(self, events: list[Reading]) -> list[Reading]:
        trimmed: list[Reading] = []
        for event in events:
            if isinstance(event, Cut) and self._cut_is_text:
                event = Text(event.text)
            if isinstance(event, Text | Thinking):
                trimmed += self.show(type(event), event.text)
                continue
            if isinstance(event, ToolCall):
                # Text may follow, and is then the same part: it keeps its distance from the text before the call.
                self._part, self._begun, self._space = Text, True, ""
            trimmed.append(event)
        return trimmed

    def show(self, part: type[Thinking] | type[Text], piece: str) -> list[Thinking | Text]:
        """A piece of a part, without the blank lines before the part and the white space after it."""
        if part is not self._part:
            self._part, self._begun, self._space = part, False, ""
        text = self._space + piece
        if not self._begun:
            text = text.lstrip("\r\n")
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return [part(shown)] if shown else []


class _CallsInThinking:
    """Thinking that never ends may end in calls. What looks like one, at the start of a line, is held till then."""

    def __init__(self, finder: CallFinder) -> None:
        self._finder = finder
        self._raw: list[str] = []  # all that is held, and what the finder made of it
        self._held: list[Reading] = []

    def feed(self, text: str) -> list[Reading]:
        self._raw.append(text)
        self._held += self._finder.feed(text)
        if not all(isinstance(event, Text) for event in self._held):
            return []
        shown = "".join(event.text for event in self._held if isinstance(event, Text))
        self._raw, self._held = ["".join(self._raw)[len(shown) :]], []
        return [Thinking(shown)] if shown else []

    def end(self) -> list[Reading]:
        """Thinking has ended: what was held is a part of it."""
        raw = "".join(self._raw)
        return [Thinking(raw)] if raw else []

    def finish(self) -> list[Reading]:
        """The answer has ended."""
        events = self._held + self._finder.finish()
        parts = [e for e in events if not isinstance(e, Text) or e.text.strip()]
        if not parts or not isinstance(parts[-1], ToolCall):
            return self.end()
        return [Thinking(e.text) if isinstance(e, Text | Cut) else e for e in events]
