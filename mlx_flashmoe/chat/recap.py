"""A conversation in few words."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_flashmoe.tokenizer import Message

TURNS = 2
"""Turns that a recap shows."""

LONGEST = 300
"""Characters of a message that a recap shows."""


def one_line(text: str, longest: int) -> str:
    """A text in one line, cut to ``longest`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 2].rstrip() + " …"


def first_words(messages: Sequence[Message], longest: int) -> str:
    """The beginning of the user's first message; "" if there is none."""
    return next((one_line(m["content"], longest) for m in messages if m["role"] == "user"), "")


def last_turns(messages: Sequence[Message]) -> list[Message]:
    """The last turns, in messages of one short line: the user's, and the model's without thinking and calls."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    turns = messages[starts[-TURNS] :] if len(starts) >= TURNS else messages
    return [
        {"role": m["role"], "content": one_line(m["content"], LONGEST)}
        for m in turns
        if m["role"] in ("user", "assistant") and m["content"].strip()
    ]
