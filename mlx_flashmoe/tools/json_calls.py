"""Reads a call whose arguments are a JSON object. It ends where the object ends, so strings may hold any mark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_flashmoe.schema import read_json
from mlx_flashmoe.tools.arguments import ArgumentWriter
from mlx_flashmoe.tools.events import Cut, Reading, Text
from mlx_flashmoe.tools.finder import Opening, Reader
from mlx_flashmoe.tools.json_pieces import JsonPieces, Token
from mlx_flashmoe.tools.marks import Pattern

_ARGUMENTS = ("arguments", "parameters")


class JsonForm:
    """Calls with JSON arguments.

    Args:
        openings: the text before the object, and its brace. A field "name" is the function's name; without one,
            the object is ``{"name": …, "arguments": {…}}``.
        endings: marks that follow the object, in order; each may be missing.
        certain: no prose has these marks, because they are tokens of their own: a call is one anywhere.
        bare: an object that begins so at the start of a line is a call as well, if the first ending follows it.
    """

    def __init__(
        self,
        openings: Sequence[Pattern],
        endings: Sequence[str],
        bare: Pattern | None = None,
        certain: bool = False,
    ) -> None:
        self._openings, self._endings, self._bare, self._certain = openings, endings, bare, certain

    def openings(self) -> Sequence[Opening]:
        bare = [Opening(self._bare, bare=True)] if self._bare else []
        return [*(Opening(pattern) for pattern in self._openings), *bare]

    def reader(self, schemas: Mapping[str, Any], alone: bool, fenced: bool) -> Reader:
        openings = [re.compile(pattern.full()) for pattern in self._openings]
        again = str(self._openings[0].parts[0])
        return JsonReader(openings, again, self._endings, schemas, self._certain or (alone and not fenced))


class JsonReader:
    """Reads one call.

    Args:
        again: what another call begins with; it is no text of a sentence.
        sure: it stands in no sentence and in no code fence, so it may be shown while it is written.
    """

    def __init__(
        self,
        openings: Sequence[re.Pattern[str]],
        again: str,
        endings: Sequence[str],
        schemas: Mapping[str, Any],
        sure: bool,
    ) -> None:
        self.rest: str | None = None
        self._openings, self._again, self._endings = openings, again, endings
        self._schemas, self._sure = schemas, sure
        self._lead: str | None = None  # what stands before the object
        self._raw: list[str] = []  # the object, and what may follow it
        self._length = 0  # of it
        self._pieces = JsonPieces()
        self._stream: _Stream | None = None

    @property
    def begun(self) -> bool:
        return self._stream is not None and self._stream.begun

    def feed(self, text: str) -> list[Reading]:
        if self._lead is None:
            # The finder has seen the opening, so the first text has all of it.
            opening = next((m for o in self._openings if (m := o.match(text))), None)
            self._lead = text[: opening.end() - 1] if opening else ""
            text = text[len(self._lead) :]
            name = (opening.groupdict().get("name") or "").strip() if opening else ""
            self._sure = self._sure and opening is not None
            self.begin(self._lead, name)
        return self._read(text, last=False)

    def begin(self, lead: str, name: str) -> None:
        """The object follows ``lead``. ``name``: the function's, "" if the object has it."""
        self._lead, self._header = lead, name
        self._stream = _Stream(self._schemas, name)

    def finish(self) -> list[Reading]:
        events = self._read("", last=True)
        return events + self._no_call() if self.rest is None else events

    def _read(self, text: str, last: bool) -> list[Reading]:
        assert self._stream is not None
        self._raw.append(text)
        self._length += len(text)
        events: list[Reading] = []
        if not self._pieces.over:
            tokens = self._pieces.feed(text, last)
            if self._sure:
                events = self._stream.feed(tokens, text)
            if self._pieces.failed or self._stream.failed:
                return events + self._no_call()
        return events + self._end(last) if self._pieces.over else events

    def _end(self, last: bool) -> list[Reading]:
        """The object is whole: reads the marks after it."""
        assert self._stream is not None and self._lead is not None
        raw = "".join(self._raw)
        end, first = self._pieces.place, None
        for ending in self._endings:
            rest = raw[end:].lstrip()
            if rest.startswith(ending):
                end = len(raw) - len(rest) + len(ending)
                first = first or ending
            elif ending.startswith(rest) and not last:
                return []  # the mark may come yet
            elif rest and ending.startswith(rest):
                end = len(raw)  # the answer was cut within it
        if not self._lead and first != self._endings[0]:
            return self._no_call()
        if not self._sure and self._lead:
            after, line_end, _ = raw[end:].partition("\n")
            after, again = after.strip(), self._again
            if after and not after.startswith(again):
                waits = again.startswith(after) and not line_end and not last
                return [] if waits else self._no_call()  # it stands in a sentence
            if not after and not line_end and not last:
                return []
        whole = self._lead + raw[:end]
        if self._stream.begun:
            events = self._stream.writer.end(whole)
        else:
            call = _whole_call(raw[: self._pieces.place], self._header, self._schemas)
            if call is None:
                return self._no_call()
            name, arguments = call
            writer = ArgumentWriter(name)
            events = writer.start()
            for key, value in arguments.items():
                events += writer.value(key, value)
            events += writer.end(whole)
        self.rest = raw[end:]
        return events

    def _no_call(self) -> list[Reading]:
        raw, lead = "".join(self._raw), self._lead or ""
        if self.begun:
            self.rest = raw[self._pieces.place :]
            return [Cut(lead + raw[: self._pieces.place])]
        # The opening is text. A call may stand in what follows it.
        if lead:
            self.rest = raw
            return [Text(lead)]
        self.rest = raw[1:]
        return [Text(raw[:1])]


def _whole_call(raw: str, header: str, schemas: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a whole object, or None. ``header``: the name, if it stands before the object."""
    try:
        call = read_json(raw)
        if header:
            return header, call
        name = call.get("name")
        arguments: Any = next((call[key] for key in _ARGUMENTS if call.get(key) is not None), {})
        if isinstance(arguments, str):  # JSON within JSON, as the OpenAI API has it
            arguments = read_json(arguments)
    except ValueError:
        return None
    known = isinstance(name, str) and name in schemas
    return (name, arguments) if known and isinstance(arguments, dict) else None


class _Stream:
    """Shows the arguments while they are written, where the function's name comes before them.

    Attributes:
        begun: a call has begun.
        failed: it cannot be a call.
    """

    def __init__(self, schemas: Mapping[str, Any], header: str) -> None:
        self.begun = self.failed = False
        self.writer = ArgumentWriter(header)
        self._schemas = schemas
        self._depth = 1 if header else 2  # of the arguments' members
        self._outer = "arguments" if header else ""  # the outer object's member that is being read
        self._name: str | None = header or None
        self._keys: list[str] = []  # of the arguments so far; the last one is being read
        self._new = True  # it was not given before
        self._string: list[str] = []
        self._source, self._base = "", 0  # text from a nested value's beginning on, and its place
        self._nested = -1

    def feed(self, tokens: list[Token], text: str) -> list[Reading]:
        """Steps, and the text that they come from (its end may wait for more)."""
        self._source += text
        events: list[Reading] = []
        for token in tokens:
            if not self.failed:
                events += self._argument(token) if self.begun else self._before(token)
        # A step may reach back a little into earlier text: an escape, a number.
        keep = self._nested if self._nested >= 0 else self._base + len(self._source) - 16
        drop = max(0, keep - self._base)
        self._source, self._base = self._source[drop:], self._base + drop
        return events

    def _before(self, token: Token) -> list[Reading]:
        """A step before the arguments' object."""
        if token.kind == "{" and token.depth == self._depth and self._outer in _ARGUMENTS and self._name:
            self.begun, self.writer = True, ArgumentWriter(self._name)
            return self.writer.start()
        if token.depth != 1:
            return []
        if token.kind == "key":
            self._outer, self._string = token.text, []
        elif token.kind == "string":
            self._string.append(token.text)
        elif token.kind == "/string" and self._outer == "name":
            self._name = "".join(self._string)
            self.failed = self._name not in self._schemas
        return []

    def _argument(self, token: Token) -> list[Reading]:
        """A step within the arguments' object, or after it."""
        if self._outer not in _ARGUMENTS or token.depth < self._depth:
            self._outer = ""  # only the first arguments count
            return []
        if token.kind == "}" and token.depth == self._depth:
            self._outer = ""
        elif token.depth > self._depth + 1 or (token.depth > self._depth and token.kind not in "{}[]"):
            pass
        elif token.kind == "key":
            self._new, self._string = token.text not in self._keys, []
            self._keys.append(token.text)
        elif token.kind in "{[":
            self._nested = token.start
        elif token.kind in "}]":
            raw, self._nested = self._source[self._nested - self._base : token.end - self._base], -1
            return self._value(raw)
        elif token.kind == "atom":
            return self._value(token.text)
        elif self._new and token.kind == "string":
            self._string.append("")
            return self.writer.piece(self._keys[-1], token.text)
        elif self._new and token.kind == "/string":
            empty = [] if self._string else self.writer.piece(self._keys[-1], "")
            return empty + self.writer.end_string()
        return []

    def _value(self, raw: str) -> list[Reading]:
        try:
            return self.writer.value(self._keys[-1], read_json(raw)) if self._new else []
        except ValueError:
            self.failed = True
            return []
