"""Where an answer thinks and where it answers."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_flashmoe.tokenizer import THINK_END, THINK_START


class ThinkingSplitter:
    """Tells the thinking part of an answer from the rest, as the text comes.

    A thinking part stands at the very beginning: opened by ``<think>`` there, or by the prompt already.
    """

    def __init__(self, thinking: bool) -> None:
        self._thinking = thinking
        self._start = not thinking  # at the beginning, where <think> may come
        self._held = ""  # what may be the beginning of a tag

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yields (in thinking, text) for what is settled."""
        text = self._held + text
        self._held = ""
        if self._start:
            begun = text.lstrip()
            if begun.startswith(THINK_START):
                self._start, self._thinking = False, True
                text = begun[len(THINK_START) :]
            elif THINK_START.startswith(begun):
                self._held = text
                return
            else:
                self._start = False
        if self._thinking:
            before, tag, after = text.partition(THINK_END)
            if not tag:
                keep = overlap(text, THINK_END)
                self._held = text[len(text) - keep :]
                before = text[: len(text) - keep]
            if before:
                yield True, before
            if not tag:
                return
            self._thinking = False
            text = after
        if text:
            yield False, text

    def finish(self) -> Iterator[tuple[bool, str]]:
        """Yields what was held back."""
        if self._held:
            yield self._thinking, self._held
            self._held = ""


def overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of ``tag`` that ``text`` ends with."""
    return next((n for n in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:n])), 0)
