"""Finds calls in the text of an answer, and tells them from prose that quotes one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_flashmoe.tools.events import Reading, Text
from mlx_flashmoe.tools.marks import Beginnings, Pattern


class Reader(Protocol):
    """Reads one call. ``rest`` is the text it has left over, once it needs no more."""

    rest: str | None

    def feed(self, text: str) -> list[Reading]: ...

    def finish(self) -> list[Reading]: ...


class Form(Protocol):
    """A way to write calls."""

    def openings(self) -> Sequence[Opening]: ...

    def reader(self, schemas: Mapping[str, Any], alone: bool, fenced: bool) -> Reader:
        """A reader for a call that seems to begin. It is fed the text from the opening on."""
        ...


_FIRST = 512  # characters that a reader is fed first
_LINE = 80  # characters of a line that are looked at: is it blank, is it a fence?


@dataclass(frozen=True)
class Opening:
    """A mark that a call begins with. ``bare``: only at the start of a line; elsewhere it may stand for itself."""

    pattern: Pattern
    bare: bool = False


class CallFinder:
    """Tells text and calls apart.

    Args:
        forms: the ways to write calls that are read.
        schemas: of the offered functions' parameters, by name. Other names are no calls.
    """

    def __init__(self, forms: Sequence[Form], schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        self._openings = [(opening, form) for form in forms for opening in form.openings()]
        patterns = [opening.pattern for opening, _ in self._openings]
        self._any = re.compile("|".join(f"(?P<k{i}>{p.full(str(i))})" for i, p in enumerate(patterns)))
        self._beginning = Beginnings(patterns)
        self._reader: Reader | None = None
        self._held = ""
        self._line = ""  # what stands on the line so far
        self._fence = False

    @property
    def in_call(self) -> bool:
        return self._reader is not None

    def feed(self, text: str) -> list[Reading]:
        return self._read(text, last=False)

    def finish(self) -> list[Reading]:
        return self._read("", last=True)

    def _read(self, text: str, last: bool) -> list[Reading]:
        events: list[Reading] = []
        text, self._held, place = self._held + text, "", 0
        end = len(text) if last else self._beginning(text)
        while True:
            if self._reader is None:
                place = self._search(text, place, max(place, end), events)
                if self._reader is None:
                    self._held = text[place:]
                    return events
            # In small pieces first: most of what looks like a call and is none is found out soon.
            size = _FIRST
            while self._reader.rest is None and place < len(text):
                events += self._follow_all(self._reader.feed(text[place : place + size]))
                place, size = min(place + size, len(text)), 2 * size
            if last and self._reader.rest is None:
                events += self._follow_all(self._reader.finish())
            rest = self._reader.rest
            if rest is None:
                return events
            self._reader = None
            if len(rest) <= place:
                place -= len(rest)
            else:
                text, place = rest + text[place:], 0
                end = len(text) if last else self._beginning(text)

    def _search(self, text: str, place: int, end: int, events: list[Reading]) -> int:
        """Looks for a call in text[place:end]. Returns the place where it begins; ``end`` if there is none."""
        begin = place
        while True:
            found = self._any.search(text, place)
            if found is None or found.start() >= end:
                self._follow(text[place:end])
                break
            start = found.start()
            which = next(i for i in range(len(self._openings)) if found[f"k{i}"] is not None)
            opening, form = self._openings[which]
            self._follow(text[place:start])
            name = found.groupdict().get(f"name{which}")
            alone = not self._line.strip()
            if (alone or not opening.bare) and (name is None or name.strip() in self._schemas):
                self._reader = form.reader(self._schemas, alone, self._fence)
                end = start
                break
            self._follow(text[start : start + 1])
            place = start + 1
        if end > begin:
            events.append(Text(text[begin:end]))
        return end

    def _follow_all(self, events: list[Reading]) -> list[Reading]:
        for event in events:
            if isinstance(event, Text):
                self._follow(event.text)
            else:
                self._line = ""
        return events

    def _follow(self, text: str) -> None:
        """Text that is no call: follows its lines and its code fences."""
        lines = (self._line + text).split("\n")
        for line in lines[:-1]:
            if line.lstrip().startswith("```"):
                self._fence = not self._fence
        self._line = lines[-1][:_LINE]
