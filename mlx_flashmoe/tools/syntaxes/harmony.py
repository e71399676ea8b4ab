"""Harmony, the format of gpt-oss: messages in channels. ``analysis`` is thinking, the rest is the answer.

<|channel|>analysis<|message|>I should look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather
<|constrain|>json<|message|>{"place": "Zürich"}<|call|>
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_flashmoe.tools.events import Reading, Text, Thinking
from mlx_flashmoe.tools.json_calls import JsonReader
from mlx_flashmoe.tools.marks import Beginnings, mark
from mlx_flashmoe.tools.syntax import Syntax, Wrapping

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MARKS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_ANY = re.compile("|".join(map(re.escape, _MARKS)))
_BEGINNING = Beginnings([mark(text) for text in _MARKS])
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


class HarmonyReader:
    """Reads an answer, which begins after ``<|start|>assistant``. Text outside of messages is text of the answer."""

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        self._held = ""
        self._header: list[str] | None = None  # of the message that begins
        self._part: type[Text] | type[Thinking] = Text
        self._raw: list[str] = []  # the header of a call
        self._call: JsonReader | None = None
        self._message = False

    @property
    def in_call(self) -> bool:
        return self._call is not None

    def feed(self, text: str) -> list[Reading]:
        text = self._held + text
        end = _BEGINNING(text)
        events, place = [], 0
        while (found := _ANY.search(text, place)) and found.start() < end:
            events += self._content(text[place : found.start()]) + self._take(found[0])
            place = found.end()
        end = max(end, place)
        self._held = text[end:]
        return events + self._content(text[place:end])

    def finish(self) -> list[Reading]:
        held, self._held = self._held, ""
        if _ANY.fullmatch(held):
            return self._take(held) + self._end_call()
        return self._content(held) + self._end_call()

    def _take(self, found: str) -> list[Reading]:
        if found in (_START, _CHANNEL):
            events = self._end_call()
            if self._header is None:
                self._header, self._raw = [], []
            self._message = False
            self._header.append(" ")
            self._raw.append(found)
            return events
        if found == _MESSAGE:
            return self._begin("".join(self._header or ()))
        if found == _CONSTRAIN and self._header is not None:
            self._raw.append(found)
            self._header.append(" ")
            return []
        events = self._end_call(found)
        self._part, self._message, self._header = Text, False, None
        return events

    def _begin(self, header: str) -> list[Reading]:
        """A message begins."""
        self._header, self._message = None, True
        recipient = _RECIPIENT.search(header)
        name = recipient[1] if recipient else ""
        self._part = Thinking if "analysis" in header.split() else Text
        if name in self._schemas:
            self._call = JsonReader([], [], self._schemas, True)
            self._call.begin("".join(self._raw) + _MESSAGE, name)
        return []

    def _content(self, text: str) -> list[Reading]:
        if not text:
            return []
        if self._header is not None:
            self._header.append(text)
            self._raw.append(text)
            return []
        if self._call is None:
            return [self._part(text)]
        events = self._call.feed(text)
        return events + self._left_over()

    def _left_over(self) -> list[Reading]:
        """Text after the arguments, or after what were none."""
        if self._call is None or self._call.rest is None:
            return []
        rest, self._call = self._call.rest, None
        return [Text(rest)] if rest.strip() else []

    def _end_call(self, found: str = "") -> list[Reading]:
        if self._call is None:
            return []
        events = self._call.finish()
        return events + self._left_over()


HARMONY = Syntax(
    "harmony",
    marks=_MARKS,
    forms=(),
    json=Wrapping(f"{_CHANNEL}commentary to=functions.", f" {_CONSTRAIN}json{_MESSAGE}", "", between=""),
    reader=HarmonyReader,
    several=False,
)
