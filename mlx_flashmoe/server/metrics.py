"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any


class Metrics:
    """Counts of a server. Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._left_out: Counter[str] = Counter()
        self._answers = 0
        self._seconds = 0.0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0

    def requested(self, path: str, status: int) -> None:
        """A request was answered with an HTTP status."""
        with self._lock:
            self._requests[path, status] += 1

    def left_out(self, kinds: Counter[str]) -> None:
        """Tools that a request offered and that were left out, by kind."""
        with self._lock:
            self._left_out += kinds

    def answered(self, prompt: int, cached: int, generated: int, seconds: float) -> None:
        """The model is done with a request: tokens of its prompt, of these known before, tokens generated."""
        with self._lock:
            self._answers += 1
            self._seconds += seconds
            self._prompt_tokens += prompt
            self._cached_tokens += cached
            self._generated_tokens += generated

    @property
    def mean_seconds(self) -> float:
        """Of the model's time for a request; 0 before the first."""
        return self._seconds / max(1, self._answers)

    def text(self, stats: Any, waiting: int, busy: bool) -> str:
        """All of it.

        Args:
            stats: the model's (``StreamingModel.stats()``).
            waiting: requests in the queue.
            busy: one is being answered.
        """
        routed = stats.hits + stats.misses
        with self._lock:
            requests = [
                (f'{{path="{path}",status="{status}"}}', n)
                for (path, status), n in sorted(self._requests.items())
            ]
            tools = [(f'{{kind="{kind}"}}', n) for kind, n in sorted(self._left_out.items())]
            rows: list[tuple[str, str, str, Sequence[tuple[str, float]]]] = [
                ("requests_total", "counter", "HTTP requests by path and status", requests),
                ("tools_left_out_total", "counter", "Tools that were offered and left out, by kind", tools),
                ("answers_total", "counter", "Requests the model worked on", [("", self._answers)]),
                ("answer_seconds_total", "counter", "The model's time for them", [("", self._seconds)]),
                ("prompt_tokens_total", "counter", "Tokens of prompts", [("", self._prompt_tokens)]),
                ("cached_tokens_total", "counter", "Of these, kept from before", [("", self._cached_tokens)]),
                ("generated_tokens_total", "counter", "Tokens of answers", [("", self._generated_tokens)]),
                ("expert_hits_total", "counter", "Routed experts found in memory", [("", stats.hits)]),
                ("expert_misses_total", "counter", "Routed experts that were not", [("", stats.misses)]),
                ("expert_hit_rate", "gauge", "Share of hits", [("", stats.hits / routed if routed else 0.0)]),
                ("expert_read_bytes_total", "counter", "Bytes of experts read", [("", stats.bytes_read)]),
                ("queue_waiting", "gauge", "Requests that wait", [("", waiting)]),
                ("busy", "gauge", "1 while a request is answered", [("", int(busy))]),
            ]
        lines = []
        for name, kind, help_text, samples in rows:
            lines += [f"# HELP flashmoe_{name} {help_text}", f"# TYPE flashmoe_{name} {kind}"]
            lines += [f"flashmoe_{name}{labels} {value}" for labels, value in samples]
        return "\n".join(lines) + "\n"
