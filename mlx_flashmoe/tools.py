"""Tool calls in what a model says, found as it says it.

Two forms are read, both between ``<tool_call>`` and ``</tool_call>``. In the one that Qwen3.5 is trained on values
are plain text, and get their types from the tool's JSON schema:

    <function=get_weather>
    <parameter=place>
    Zürich
    </parameter>
    </function>

The other is a JSON object: ``{"name": "get_weather", "arguments": {"place": "Zürich"}}``.

What looks like a call and is none stays text: nothing that a model says is lost but the blank lines before a part
of the answer and the whitespace after it, which belong to the form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_flashmoe.schema import property_schema, read_json, typed_value, value_types
from mlx_flashmoe.thinking import ThinkingSplitter, overlap

CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
FUNCTION = "<function="


@dataclass(frozen=True)
class Thinking:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call.

    Attributes:
        name: of the function; the model may name one that it was not offered.
        arguments: JSON values by parameter.
        text: the call as the model wrote it.
    """

    name: str
    arguments: dict[str, Any]
    text: str


Event = Thinking | Text | ToolCall
Tool = Mapping[str, Any]
"""``{"type": "function", "function": {"name": …, "parameters": JSON schema}}``, or only the inner object."""


def parse_answer(text: str, tools: Iterable[Tool] | None = None, thinking: bool = False) -> list[Event]:
    """The parts of a whole answer, in order; see :class:`AnswerParser`."""
    parser = AnswerParser(tools, thinking)
    return parser.feed(text) + parser.finish()


class AnswerParser:
    """Tells thinking, text and calls of one answer apart, as its text comes in pieces of any size.

    Args:
        tools: what the model may call. Without any, nothing is a call.
        thinking: the prompt has opened a thinking part (``tokenizer.opens_thinking``).
    """

    def __init__(self, tools: Iterable[Tool] | None = None, thinking: bool = False) -> None:
        self._schemas = parameter_schemas(tools or ())
        self._splitter = ThinkingSplitter(thinking)
        self._call = ""  # what may become a call
        self._part: type[Thinking] | type[Text] | None = None
        self._begun = False  # the part has shown something
        self._space = ""  # whitespace that counts if the part goes on

    @property
    def in_call(self) -> bool:
        """A call is being written: nothing of it comes before its end."""
        return self._call.startswith(CALL_START)

    def feed(self, text: str) -> list[Event]:
        """What one more piece of text settles. Text may come in several events."""
        return [
            event for thinking, piece in self._splitter.feed(text) for event in self._split(thinking, piece)
        ]

    def finish(self) -> list[Event]:
        """What was held back when the answer ends. A call that lacks only ``</tool_call>``, or part of it, counts."""
        events = [
            event for thinking, piece in self._splitter.finish() for event in self._split(thinking, piece)
        ]
        events += self._call_or_text(self._call)
        self._call = ""
        return events

    def _split(self, thinking: bool, piece: str) -> list[Event]:
        if thinking or not self._schemas:
            return self._show(Thinking if thinking else Text, piece)
        events: list[Event] = []
        text, self._call = self._call + piece, ""
        while text:
            before, start, after = text.partition(CALL_START)
            if not start:
                keep = len(text) - overlap(text, CALL_START)
                self._call = text[keep:]
                return events + self._show(Text, text[:keep])
            events += self._show(Text, before)
            if not _can_be_call(after):
                events += self._show(Text, CALL_START)
                text = after
                continue
            body, end, text = after.partition(CALL_END)
            if not end:
                self._call = CALL_START + body
                break
            events += self._call_or_text(CALL_START + body + CALL_END)
        return events

    def _call_or_text(self, text: str) -> list[Event]:
        call = None
        if text.startswith(CALL_START):
            end = len(text) - overlap(text, CALL_END)
            call = _parse_call(text[len(CALL_START) : end].strip(), self._schemas)
        if call is None:
            return self._show(Text, text)
        # Text may follow, and is then the same part: it keeps its distance from the text before the call.
        self._part, self._begun, self._space = Text, True, ""
        return [ToolCall(*call, text)]

    def _show(self, part: type[Thinking] | type[Text], piece: str) -> list[Event]:
        if part is not self._part:
            self._part, self._begun, self._space = part, False, ""
        text = self._space + piece
        if not self._begun:
            text = text.lstrip("\r\n")
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return [part(shown)] if shown else []


def parameter_schemas(tools: Iterable[Tool]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of the functions' parameters, by function name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def _can_be_call(text: str) -> bool:
    """Whether what follows ``<tool_call>`` can still become a call."""
    begun = text.lstrip()
    return begun.startswith(("{", FUNCTION)) or FUNCTION.startswith(begun)


def _parse_call(body: str, schemas: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of what stands between ``<tool_call>`` and ``</tool_call>``, or None."""
    call = _parse_json(body) if body.startswith("{") else _parse_tags(body, schemas)
    if call is None:
        return None
    # Escapes can spell half a character, which no encoding has.
    whole = json.dumps(call, ensure_ascii=False).encode("utf-8", "replace")
    name, arguments = json.loads(whole)
    return name, arguments


# A value may itself hold </parameter>: it ends where the next parameter or the end of the call follows.
_FUNCTION_TAG = re.compile(r"<function=([^<>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER_TAG = re.compile(r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)


def _parse_tags(body: str, schemas: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    function = _FUNCTION_TAG.fullmatch(body)
    if function is None:
        return None
    name, inside = function[1].strip(), function[2].rstrip()
    schema = schemas.get(name, {})
    arguments, place = {}, 0
    while place < len(inside):
        parameter = _PARAMETER_TAG.match(inside, place)
        if parameter is None:
            return None
        key = parameter[1].strip()
        value = parameter[2].removeprefix("\n").removesuffix("\n")
        arguments[key] = typed_value(value, value_types(property_schema(schema, key), schema))
        place = parameter.end()
    return name, arguments


def _parse_json(body: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = read_json(body)
    except ValueError:
        return None
    name, arguments = call.get("name"), call.get("arguments")
    if isinstance(arguments, str):  # JSON within JSON, as the OpenAI API has it
        try:
            arguments = read_json(arguments)
        except ValueError:
            return None
    if arguments is None:
        arguments = {}
    return (name, arguments) if name and isinstance(name, str) and isinstance(arguments, dict) else None
