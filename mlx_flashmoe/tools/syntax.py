"""A syntax: how one family of models writes calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_flashmoe.tools.events import Reading
from mlx_flashmoe.tools.finder import CallFinder, Form, Opening, Reader
from mlx_flashmoe.tools.marks import TagMarks
from mlx_flashmoe.tools.tags import TagReader


class TagForm:
    """Calls in tags around plain text."""

    def __init__(self, marks: TagMarks) -> None:
        self.marks = marks

    def openings(self) -> Sequence[Opening]:
        whole, *bare = self.marks.openings
        return [Opening(whole), *(Opening(pattern, bare=True) for pattern in bare)]

    def reader(self, schemas: Mapping[str, Any], alone: bool, fenced: bool) -> Reader:
        return TagReader(self.marks, schemas, alone, fenced)


class AnswerReader(Protocol):
    """Reads an answer whose thinking is told apart by other means than ``<think>``."""

    @property
    def in_call(self) -> bool: ...

    def feed(self, text: str) -> list[Reading]: ...

    def finish(self) -> list[Reading]: ...


@dataclass(frozen=True)
class Wrapping:
    """The marks of forced calls: text around the name and the arguments, which are JSON.

    Attributes:
        start, end: around all calls; between: two of them.
        before_name, after_name, after_call: of each call. If ``before_name`` is None, the object that follows
            ``start`` is ``{"name": …, "arguments": {…}}``.
    """

    before_name: str | None
    after_name: str
    after_call: str
    start: str = ""
    end: str = ""
    between: str = "\n"


@dataclass(frozen=True)
class Syntax:
    """How calls are written.

    Attributes:
        name: of the syntax.
        marks: its marks that a vocabulary may have as special tokens, which must be seen in the text all the same.
        forms: the ways to write a call that are read.
        json: how a call with JSON arguments is written; every schema can be kept to in it.
        tags: the marks of the form in plain text that the models were trained on, if it is one of the forms.
        reader: reads whole answers, where channels tell thinking from text.
        several: an answer may have more than one call.
    """

    name: str
    marks: tuple[str, ...]
    forms: tuple[Form, ...]
    json: Wrapping
    tags: TagMarks | None = None
    reader: Callable[[Mapping[str, Any]], AnswerReader] | None = None
    several: bool = True

    def finder(self, schemas: Mapping[str, Any]) -> CallFinder:
        return CallFinder(self.forms, schemas)
