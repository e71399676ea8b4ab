"""The parts of an answer: thinking, text and calls, in the order in which the model writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Thinking:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The model has begun a call of the function ``name``."""

    name: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of the arguments' JSON text. The pieces joined are ``json.dumps(arguments, ensure_ascii=False)``."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The end of a call, which is now whole.

    Attributes:
        name: of the function, one of those that were offered.
        arguments: JSON values by parameter; the model may name parameters that the schema has not.
        text: the call as the model wrote it.
    """

    name: str
    arguments: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Cut:
    """The text of a call that has begun and cannot end any more. Only the readers know of it, no user of a parser."""

    text: str


Piece = Thinking | Text | ToolCall
Event = Piece | CallStart | CallDelta
Reading = Event | Cut
Tool = Mapping[str, Any]
"""``{"type": "function", "function": {"name": …, "parameters": JSON schema}}``, or only the inner object."""


def pieces(events: Iterable[Event]) -> list[Piece]:
    """Thinking, text and whole calls, for a user to whom a call that is being written means nothing."""
    return [event for event in events if not isinstance(event, CallStart | CallDelta)]


def parameter_schemas(tools: Iterable[Tool]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of the functions' parameters, by function name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}
