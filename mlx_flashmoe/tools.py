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

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
        arguments[key] = _typed(value, _types(_property(schema, key, schema), schema))
        place = parameter.end()
    return name, arguments


def _parse_json(body: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = _read_json(body)
    except ValueError:
        return None
    name, arguments = call.get("name"), call.get("arguments")
    if isinstance(arguments, str):  # JSON within JSON, as the OpenAI API has it
        try:
            arguments = _read_json(arguments)
        except ValueError:
            return None
    if arguments is None:
        arguments = {}
    return (name, arguments) if name and isinstance(name, str) and isinstance(arguments, dict) else None


# Types of values


def _property(schema: Any, key: str, root: Any) -> Any:
    """The schema of one property of an object's schema; None if it says nothing about it."""
    for part in _alternatives(schema, root):
        properties = part.get("properties")
        if isinstance(properties, dict) and key in properties:
            return properties[key]
    return None


def _alternatives(schema: Any, root: Any) -> list[dict[str, Any]]:
    """A schema and those it is made of: what ``$ref`` within ``root``, ``anyOf``, ``oneOf`` and ``allOf`` name."""
    parts: dict[int, dict[str, Any]] = {}
    todo = [schema]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict) or id(part) in parts:
            continue
        parts[id(part)] = part
        for key in ("anyOf", "oneOf", "allOf"):
            inner = part.get(key)
            todo += inner if isinstance(inner, list) else ()
        ref = part.get("$ref")
        if isinstance(ref, str) and ref.startswith("#"):
            target = root
            for step in ref.split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                target = target.get(step) if isinstance(target, dict) else None
            todo.append(target)
    return list(parts.values())


# What people write by hand for JSON's own names.
_ALIASES = {"int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array"}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}


def _types(schema: Any, root: Any) -> set[str]:
    """Names of the JSON types a schema allows; none if it does not say."""
    types: set[str] = set()
    for part in _alternatives(schema, root):
        named = part.get("type")
        types |= {
            _ALIASES.get(t, t) for t in (named if isinstance(named, list) else [named]) if isinstance(t, str)
        }
        listed = part.get("enum")
        for value in [
            *(listed if isinstance(listed, list) else ()),
            *([part["const"]] if "const" in part else ()),
        ]:
            types |= {"string"} if isinstance(value, str) else {t for t in _PYTHON_TYPES if _is(value, t)}
    return types


def _typed(text: str, types: set[str]) -> Any:
    """A parameter's text as a value of one of the types; text stays text where it cannot be one."""
    if not types:
        return None if text.strip().lower() == "null" else text
    if types == {"string"}:
        return text
    try:
        value = _read_value(text)
    except ValueError:
        return text
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        value = int(value)
    # A wrong type is given as it is, for whoever checks the call to complain of; a string takes anything.
    if isinstance(value, str) or ("string" in types and not any(_is(value, t) for t in types)):
        return text
    return value


def _is(value: Any, json_type: str) -> bool:
    if isinstance(value, bool) and json_type != "boolean":
        return False
    return isinstance(value, _PYTHON_TYPES.get(json_type, ()))


_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _read_value(text: str) -> Any:
    """A value written as JSON or as Python would write it. ValueError if it is neither."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return _read_json(text)
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler has remarks on some strings
            value = ast.literal_eval(text)
        # Through JSON, which has no tuples and no keys but strings.
        return json.loads(json.dumps(value, allow_nan=False))
    except (SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise ValueError(str(e)) from None


def _read_json(text: str) -> Any:
    """JSON, but line breaks may stand in strings. ValueError for what has no place in JSON, infinity included."""

    def finite(number: str) -> float:
        value = float(number)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"{number} is too large")
        return value

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, strict=False, parse_float=finite, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
