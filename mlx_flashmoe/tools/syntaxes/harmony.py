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
        self._call: JsonReader | None = None

    @property
    def in_call(self) -> bool:
        return self._call is not None

    def feed(self, text: str) -> list[Reading]:
        return self._read(self._held + text, last=False)

    def finish(self) -> list[Reading]:
        return self._read(self._held, last=True)

    def _read(self, text: str, last: bool) -> list[Reading]:
        events: list[Reading] = []
        self._held = ""
        while True:
            if self._call is not None:
                # Its arguments are JSON, and their strings may hold any mark.
                events += self._call.feed(text)
                events += self._call.finish() if last and self._call.rest is None else []
                if self._call.rest is None:
                    return events
                text, self._call = self._call.rest, None
            found = _ANY.search(text)
            end = len(text) if last else _BEGINNING(text)
            if found is None or found.start() > end:
                self._held = text[end:]
                return events + self._content(text[:end])
            events += self._content(text[: found.start()])
            text = text[found.end() :]
            self._take(found[0])

    def _take(self, found: str) -> None:
        """A mark."""
        if found == _MESSAGE:
            self._begin("".join(self._header or ()))
        elif found in _ENDS:
            self._part, self._header = Text, None
        else:
            self._header = [*(self._header or ()), found]

    def _begin(self, header: str) -> None:
        """A message begins."""
        self._header = None
        recipient = _RECIPIENT.search(header)
        name = recipient[1] if recipient else ""
        channel = header.partition(_CHANNEL)[2].split(maxsplit=1)
        self._part = Thinking if channel[:1] == ["analysis"] else Text
        if name in self._schemas:
            self._call = JsonReader([], "", [], self._schemas, True)
            self._call.begin(header + _MESSAGE, name)

    def _content(self, text: str) -> list[Reading]:
        if self._header is not None:
            self._header.append(text)
            return []
        return [self._part(text)] if text else []


HARMONY = Syntax(
    "harmony",
    marks=_MARKS,
    forms=(),
    json=Wrapping(f"{_CHANNEL}commentary to=functions.", f" {_CONSTRAIN}json{_MESSAGE}", "", between=""),
    reader=HarmonyReader,
    several=False,
)
