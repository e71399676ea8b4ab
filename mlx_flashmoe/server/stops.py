"""Stop sequences: where an answer ends because the client said so."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_flashmoe.thinking import overlap
from mlx_flashmoe.tools import Event, Text


class StopFinder:
    """Looks for the first of some sequences in an answer's text. Thinking and calls are not looked at."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = [s for s in sequences if s]
        self._held = ""  # text that may be the beginning of a sequence

    def feed(self, events: list[Event], last: bool = False) -> tuple[list[Event], str | None]:
        """What can be shown of some events, and the sequence that was met, if one was.

        Args:
            last: there will be no more.
        """
        shown: list[Event] = []
        for event in events:
            if not isinstance(event, Text):
                shown += [*self._release(), event]
                continue
            text, self._held = self._held + event.text, ""
            met = [(text.index(s), s) for s in self._sequences if s in text]
            if met:
                place, sequence = min(met)
                return [*shown, *([Text(text[:place])] if place else [])], sequence
            keep = max((overlap(text, s) for s in self._sequences), default=0)
            self._held = text[len(text) - keep :]
            if keep < len(text):
                shown.append(Text(text[: len(text) - keep]))
        return shown + (self._release() if last else []), None

    def _release(self) -> list[Event]:
        text, self._held = self._held, ""
        return [Text(text)] if text else []
