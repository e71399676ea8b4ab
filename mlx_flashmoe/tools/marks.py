"""The marks of a syntax: what they look like, and whether text ends in the beginning of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SPACE = object()
"""Part of a mark: any white space."""
Kind = Literal["section", "function", "parameter", "/parameter", "/function", "/section"]
_LONGEST = 200  # characters of a name, and of white space in a mark
_TAIL = 600  # characters in which the beginning of a mark is looked for


@dataclass(frozen=True)
class Field:
    """Part of a mark: a name. ``chars`` is a regular expression's class, ``after`` what must follow, unread."""

    group: str = "name"
    chars: str = r"[^<>\n]"
    after: str = ""


Part = str | Field | object


@dataclass(frozen=True)
class Pattern:
    """A mark, made of its parts in order: literal text, names and white space."""

    parts: tuple[Part, ...]

    def full(self, suffix: str = "") -> str:
        out = ""
        for part in self.parts:
            if isinstance(part, str):
                out += re.escape(part)
            elif isinstance(part, Field):
                after = f"(?={part.after})" if part.after else ""
                out += f"(?P<{part.group}{suffix}>{part.chars}{{1,{_LONGEST}}}?){after}"
            else:
                out += rf"\s{{0,{_LONGEST}}}"
        return out

    def beginning(self) -> str:
        """Matches what can become the mark when more text comes: every beginning of it."""
        out = ""
        for part in reversed(self.parts):
            if isinstance(part, str):
                for char in reversed(part):
                    out = re.escape(char) + (f"(?:{out})?" if out else "")
            else:
                chars = part.chars if isinstance(part, Field) else r"\s"
                out = f"{chars}{{0,{_LONGEST}}}" + (f"(?:{out})?" if out else "")
        return out


def mark(*parts: Part) -> Pattern:
    return Pattern(parts)


class Beginnings:
    """Finds the beginning of a mark at the end of text."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._begins = re.compile("|".join(f"(?:{pattern.beginning()})" for pattern in patterns))
        firsts = {str(pattern.parts[0])[0] for pattern in patterns}
        self._first = re.compile("[" + re.escape("".join(sorted(firsts))) + "]")

    def __call__(self, text: str, start: int = 0) -> int:
        """Where the last characters begin that may become a mark; the text's length if there are none."""
        for first in self._first.finditer(text, max(start, len(text) - _TAIL)):
            if self._begins.fullmatch(text, first.start()):
                return first.start()
        return len(text)


@dataclass(frozen=True)
class Mark:
    """One mark in a text, from ``start`` to ``end``. ``name``: of the function or the parameter."""

    kind: Kind
    start: int
    end: int
    name: str = ""
    string: bool | None = None  # a parameter whose mark says that it is a string, or that it is JSON


class TagMarks:
    """The marks of a syntax in which a call is written in tags around plain text.

    Args:
        section, section_end: around one call, or around several if ``grouped``; None if the function's do it all.
        trim: a line break inside the parameter's marks, at both ends, belongs to the form.
    """

    def __init__(
        self,
        *,
        function: Pattern,
        function_end: str,
        parameter: Pattern,
        parameter_end: str,
        section: str | None = None,
        section_end: str | None = None,
        grouped: bool = False,
        trim: bool = True,
    ) -> None:
        self.section, self.section_end = section, section_end
        self.function, self.function_end = function, function_end
        self.parameter, self.parameter_end = parameter, parameter_end
        self.grouped, self.trim = grouped, trim
        kinds: list[tuple[Kind, Pattern]] = [
            ("function", function),
            ("parameter", parameter),
            ("/parameter", mark(parameter_end)),
            ("/function", mark(function_end)),
        ]
        if section is not None and section_end is not None:
            kinds += [("section", mark(section)), ("/section", mark(section_end))]
        self._kinds = {f"k{i}": kind for i, (kind, _) in enumerate(kinds)}
        self._any = re.compile("|".join(f"(?P<k{i}>{p.full(str(i))})" for i, (_, p) in enumerate(kinds)))
        self.beginning = Beginnings([pattern for _, pattern in kinds])

    def find(self, text: str, start: int, end: int) -> Mark | None:
        """The next mark within text[start:end]. Marks that reach beyond ``end`` are not found."""
        found = self._any.search(text, start)
        if found is None or found.start() >= end:
            return None
        group = next(name for name in self._kinds if found[name] is not None)
        named = found.groupdict()
        name = named.get(f"name{group[1:]}") or ""
        string = {"true": True, "false": False}.get(named.get(f"string{group[1:]}") or "")
        return Mark(self._kinds[group], found.start(), found.end(), name.strip(), string)

    @property
    def openings(self) -> list[Pattern]:
        """The marks that a call can begin with: its section's mark, and, by itself, at the start of a line."""
        if self.section is None:
            return [self.function]
        return [mark(self.section, SPACE, *self.function.parts), self.function]
