"""Progress of measurements: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import time
from itertools import count

from rich.console import Console
from screen import Screen

from mlx_flashmoe.progress import Steps


def test_a_pipe_gets_a_line_every_ten_seconds() -> None:
    out, seconds = io.StringIO(), count()
    with Steps(
        "perplexity", 100, "tokens", Console(file=out, soft_wrap=True), lambda: float(next(seconds))
    ) as steps:
        for _ in range(50):
            steps.advance(2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "perplexity: 20 of 100 tokens · 40 s left"
    assert len(lines) == 5 and all(" of 100 tokens" in line for line in lines)


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind() -> None:
    screen, seen = Screen(), ""
    with Steps("answers", 3, "questions", screen.console) as steps:
        steps.advance()
        deadline = time.monotonic() + 5
        while "1/3 questions" not in (seen := screen.text) and time.monotonic() < deadline:
            time.sleep(0.01)
        screen.resize(40)
        steps.advance()
    assert "answers" in seen and "1/3 questions" in seen
    assert screen.text == "" and screen.cursor
