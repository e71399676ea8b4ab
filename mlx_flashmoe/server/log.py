"""The line that the server writes about each request."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from mlx_flashmoe.console import digits

if TYPE_CHECKING:
    from mlx_flashmoe.server.worker import Job

# Asked for again and again by programs that watch the server.
UNLOGGED = {"/health", "/metrics"}


def line(method: str, path: str, status: int, seconds: float, jobs: Sequence[Job]) -> str:
    """Time, status and duration of a request, and the figures of its answers.

    Args:
        jobs: the answers that the model worked on for it.
    """
    parts = [f"{datetime.now():%H:%M:%S} {status} {method} {path}"]
    if jobs:
        prompt, cached = sum(len(j.prompt) for j in jobs), sum(j.cached for j in jobs)
        parts.append(
            f"prompt {prompt:,}{f' ({cached:,} cached)' if cached else ''}"
            + _rate(prompt - cached, sum(j.prompt_seconds for j in jobs))
        )
        answer = sum(j.generated for j in jobs)
        parts.append(f"answer {answer:,}" + _rate(answer - len(jobs), sum(j.answer_seconds for j in jobs)))
        hits, misses = sum(j.hits for j in jobs), sum(j.misses for j in jobs)
        if hits + misses:
            parts.append(f"{100 * hits / (hits + misses):.0f}% hits")
        if any(job.given_up for job in jobs):
            parts.append("given up")
    return " · ".join([*parts, f"{seconds:.1f} s"])


def _rate(tokens: int, seconds: float) -> str:
    return f" at {digits(tokens / seconds)} per second" if tokens > 0 and seconds > 0 else ""
