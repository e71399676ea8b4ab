"""Where an answer thinks and where it answers."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_flashmoe.tokenizer import THINK_END, THINK_START


class ThinkingSplitter:
    """Tells the thinking part of an answer from the rest, as the text comes.

    A thinking part stands at the very beginning: opened by ``<think>`` there, or by the prompt already.

    Args:
        thinking: the prompt has opened it.
        end_id: the token that ends it. Where ``feed`` is given tokens, ``</think>`` in other tokens is text.
    """

    def __init__(self, thinking: bool, end_id: int | None = None) -> None:
        self._thinking = thinking
        self._end_id = end_id
        self._shown_late = False  # the token that ended thinking has not been seen in the text yet
        self._start = not thinking  # at the beginning, where <think> may come
        self._held = ""  # what may be the beginning of a tag

    def feed(self, text: str, token: int | None = None) -> Iterator[tuple[bool, str]]:
        """Yields (in thinking, text) for what is settled. ``token``: the id of the token the text comes from."""
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
        if self._thinking and self._end_id is not None and token is not None:
            yield from self._by_token(text, token)
            return
        if self._shown_late and text:
            # The decoder shows the token late, if it shows it at all.
            if THINK_END.startswith(text):
                self._held = text
                return
            self._shown_late, text = False, text.removeprefix(THINK_END)
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

    def _by_token(self, text: str, token: int) -> Iterator[tuple[bool, str]]:
        if token != self._end_id:
            if text:
                yield True, text
            return
        before, tag, after = text.rpartition(THINK_END)
        self._thinking, self._shown_late = False, not tag
        if before or not tag:
            yield True, before if tag else after
        if tag and after:
            yield False, after

    def finish(self) -> Iterator[tuple[bool, str]]:
        """Yields what was held back."""
        if self._held:
            yield self._thinking, self._held
            self._held = ""


def overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of ``tag`` that ``text`` ends with."""
    return next((n for n in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:n])), 0)
