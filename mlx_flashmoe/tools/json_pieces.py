"""JSON objects read while they are written: where one ends, and its members' strings piece by piece."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from mlx_flashmoe.schema import read_json

_SPACE = " \t\r\n"
_ATOM = re.compile(r"[-+.0-9a-zA-Z]+")
_PLAIN = re.compile(r'[^"\\]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_HIGH = re.compile(r"\\u[dD][89abAB]")
_DEEPEST = 500
_CLOSES = {"{": "}", "[": "]"}

Expected = Literal["key", "key or end", "colon", "value", "value or end", "comma or end", "over"]


@dataclass(frozen=True)
class Token:
    """A step through an object.

    Attributes:
        kind: "{", "[", "}" or "]"; "key"; "string", a piece of a string value, and "/string", its end; "atom", a number
            or a word.
        depth: brackets that are open; an opening one counts itself, and a closing one, too.
        start, end: place in all the text that was fed.
        text: of a key or a piece, decoded; of an atom as it is.
    """

    kind: str
    depth: int
    start: int
    end: int
    text: str = ""


class JsonPieces:
    """Reads one object.

    Attributes:
        over: the object is whole; ``place`` is its end.
        failed: it is not JSON.
        place: how far the text has been read.
    """

    def __init__(self) -> None:
        self.over = self.failed = False
        self.place = 0
        self._text = ""
        self._base = 0  # place of the text's beginning
        self._open: list[str] = []
        self._expected: Expected = "value"
        self._in_string: Literal["", "key", "value"] = ""
        self._key: list[str] = []

    def feed(self, text: str, last: bool = False) -> list[Token]:
        """Steps that one more piece of text settles. It is read up to the object's end, if it has it."""
        self._text = self._text[self.place - self._base :] + text
        self._base = self.place
        tokens: list[Token] = []
        while not self.over and not self.failed:
            token = self._string() if self._in_string else self._step(last)
            if token is None:
                break
            if token.kind:
                tokens.append(token)
        return tokens

    def _step(self, last: bool) -> Token | None:
        at = self.place - self._base
        while at < len(self._text) and self._text[at] in _SPACE:
            at += 1
        self.place = self._base + at
        if at == len(self._text):
            return None
        char, expected = self._text[at], self._expected
        if char == '"' and expected in ("key", "key or end", "value", "value or end"):
            self._in_string = "key" if "key" in expected else "value"
            self._key = []
            if not self._open:
                return self._fail()
            self.place += 1
            return Token("", len(self._open), self.place - 1, self.place)
        if char in _CLOSES and expected in ("value", "value or end"):
            if len(self._open) >= _DEEPEST or (not self._open and char != "{"):
                return self._fail()
            self._open.append(char)
            self._expected = "key or end" if char == "{" else "value or end"
            return self._one(char, len(self._open))
        if self._open and char == _CLOSES[self._open[-1]] and expected.endswith("or end"):
            self._open.pop()
            self._after_value()
            return self._one(char, len(self._open) + 1)
        if char == ":" and expected == "colon":
            self._expected = "value"
            return self._one("", 0)
        if char == "," and expected == "comma or end":
            self._expected = "key" if self._open[-1] == "{" else "value"
            return self._one("", 0)
        atom = _ATOM.match(self._text, at)
        if atom is None or expected not in ("value", "value or end") or not self._open:
            return self._fail()
        if atom.end() == len(self._text) and not last:
            return None
        try:
            read_json(atom[0])
        except ValueError:
            return self._fail()
        self._after_value()
        start, self.place = self.place, self._base + atom.end()
        return Token("atom", len(self._open), start, self.place, atom[0])

    def _one(self, kind: str, depth: int) -> Token:
        self.place += 1
        return Token(kind, depth, self.place - 1, self.place)

    def _fail(self) -> Token | None:
        self.failed = True
        return None

    def _after_value(self) -> None:
        self._expected = "comma or end" if self._open else "over"
        self.over = not self._open

    def _string(self) -> Token | None:
        """A piece of the string, as much as there is, or its end."""
        at = begin = self.place - self._base
        text = self._text
        while True:
            plain = _PLAIN.match(text, at)
            at = plain.end() if plain else at
            if at == len(text) or text[at] == '"':
                break
            escape = _ESCAPE.match(text, at)
            if escape is None:
                if len(text) - at >= 6 or not re.fullmatch(r"\\(?:u[0-9a-fA-F]{0,3})?", text[at:]):
                    return self._fail()
                break
            # Two escapes may spell one character.
            if _HIGH.match(text, at) and len(text) - escape.end() < 6 and '"' not in text[escape.end() :]:
                break
            at = escape.end()
            if _HIGH.match(escape[0]) and (pair := _ESCAPE.match(text, at)) and pair[0][1] == "u":
                at = pair.end()
        if at > begin:
            start, self.place = self.place, self._base + at
            piece = json.loads(f'"{text[begin:at]}"', strict=False)
            if self._in_string == "key":
                self._key.append(piece)
                return Token("", 0, start, self.place)
            return Token("string", len(self._open), start, self.place, piece)
        if at == len(text) or text[at] != '"':
            return None
        self.place += 1
        if self._in_string == "key":
            self._in_string, self._expected = "", "colon"
            return Token("key", len(self._open), self.place - 1, self.place, "".join(self._key))
        self._in_string = ""
        self._after_value()
        return Token("/string", len(self._open), self.place - 1, self.place)
