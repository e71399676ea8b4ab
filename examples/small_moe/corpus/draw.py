"""Random material for one dialogue, on one side of the split between training and held-out.

Every name, word, number pair and tool that a dialogue is about is drawn here, and kept only if it falls on the
dialogue's side. The side is a checksum of the thing itself, so that the two sets are disjoint by construction,
whatever is drawn and however often.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

HELD_OUT_SHARE = 8  # one thing in so many is kept for the held-out set


def is_held_out(thing: object) -> bool:
    """Which side of the split a name, a word, or a problem belongs to."""
    return zlib.crc32(str(thing).lower().encode()) % HELD_OUT_SHARE == 0


@dataclass
class Dialogue:
    """Messages as a chat API takes them, the last of them the model's; tools, and whether it thinks first."""

    task: str
    messages: list[dict[str, Any]]
    thinking: bool = True
    tools: list[dict[str, Any]] = field(default_factory=list)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, thinking: str | Sequence[str] = "", calls: Sequence[dict] = ()) -> dict[str, Any]:
    """A message of the model; ``calls`` are of ``call``."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = thinking if isinstance(thinking, str) else "\n".join(thinking)
    if calls:
        message["tool_calls"] = list(calls)
    return message


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ONSETS = (
    "b bl br c ch cl d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk sl sp st t th tr v w y z".split()
)
VOWELS = "a a e e i i o o u ai ea ee io oa ou".split()
ENDS = ["", "", "", "l", "m", "n", "r", "s", "t", "k", "nd", "rn", "x"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ACCENTS = "éèüöäñåçøßžłőαβγδλπσωжийкляш日本語中文字水山☕★→€✓🙂🚀"


class Draw:
    """The random choices of a dialogue."""

    def __init__(self, seed: int | str, held_out: bool) -> None:
        self.random = random.Random(seed)
        self.held_out = held_out
        self.choice = self.random.choice
        self.randint = self.random.randint

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def mine(self, make: Callable[[], T]) -> T:
        """Draws until the thing is on this dialogue's side of the split."""
        while True:
            thing = make()
            if is_held_out(thing) == self.held_out:
                return thing

    def wording(self, thing: object, wordings: Sequence[str]) -> str:
        """One of several ways to say a thing, of which one is kept for the held-out set."""
        kept = wordings[zlib.crc32(str(thing).encode()) % len(wordings)]
        return kept if self.held_out else self.choice([w for w in wordings if w != kept])

    def some(self, make: Callable[[], T], count: int) -> list[T]:
        """``count`` different ones."""
        things: list[T] = []
        while len(things) < count:
            thing = make()
            if thing not in things:
                things.append(thing)
        return things

    def syllables(self, least: int = 2, most: int = 3) -> str:
        count = self.randint(least, most)
        return "".join(self.choice(ONSETS) + self.choice(VOWELS) for _ in range(count)) + self.choice(ENDS)

    def name(self) -> str:
        """A person's or a place's: Brioska."""
        return self.mine(self.syllables).capitalize()

    def word(self) -> str:
        """An invented word, or letters that are none: shoutel, xkqw."""
        if self.chance(0.2):
            return self.mine(lambda: "".join(self.random.choices(LETTERS, k=self.randint(3, 7))))
        return self.mine(self.syllables)

    def identifier(self) -> str:
        """As programs name things."""
        style = self.randint(0, 3)
        if style == 0:
            return self.word()
        if style == 1:
            return f"{self.word()}_{self.word()}"
        if style == 2:
            return self.word() + self.word().capitalize()
        return f"{self.word()}{self.randint(1, 99)}"

    def code(self) -> str:
        """A reference such as KX-204 or 7f3a9c."""
        style = self.randint(0, 2)
        if style == 0:
            return self.mine(
                lambda: "".join(self.random.choices(LETTERS, k=2)).upper() + f"-{self.randint(10, 9999)}"
            )
        if style == 1:
            return self.mine(
                lambda: "".join(self.random.choices("0123456789abcdef", k=5)) + self.choice("abcdf")
            )
        return self.mine(lambda: f"{self.choice(LETTERS).upper()}{self.randint(1, 99)}{self.choice(LETTERS)}")

    def phrase(self, least: int = 2, most: int = 4) -> str:
        """A few words: invented and common ones."""
        count = self.randint(least, most)
        return " ".join(self.word() if self.chance(0.5) else self.choice(COMMON) for _ in range(count))

    def unicode_phrase(self) -> str:
        """A phrase with characters outside ASCII."""
        letters = "".join(self.random.choices(ACCENTS, k=self.randint(1, 3)))
        return self.choice(
            [f"{self.word()} {letters}", f"{letters} {self.word()}", f"{self.word()}{letters} {self.word()}"]
        )

    def awkward_phrase(self) -> str:
        """A phrase that JSON has to escape: quotes and backslashes."""
        a, b, c = self.word(), self.word(), self.word()
        return self.choice(
            [f'{a} "{b}" {c}', f'"{a}" {b}', f"C:\\{a}\\{b}", f"\\{a} {b}", f'{a}="{b}\\{c}"', f"{a}\\n{b}"]
        )

    def number_pair(self, kind: str, make: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """Two numbers of a problem of that kind."""
        return self.mine(lambda: _Problem(kind, *make())).numbers


class _Problem:
    def __init__(self, kind: str, a: int, b: int) -> None:
        self.kind, self.numbers = kind, (a, b)

    def __str__(self) -> str:
        return f"{self.kind} {self.numbers[0]} {self.numbers[1]}"


COMMON = """the a new old red blue green small big first last north south west east near far long short early late
warm cold open closed light dark river garden bridge letter table window market music winter summer morning evening
paper water stone bread coffee train boat house street meeting report plan team note list room door road hill lake
for with and of at on in to from about after before please today tomorrow soon""".split()
