"""Progress of measurements: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import re
from itertools import count

from rich.console import Console

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
    out = io.StringIO()
    with Steps("answers", 3, "questions", Console(file=out, force_terminal=True, width=80)) as steps:
        steps.advance()
        steps.advance(2)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert "answers" in drawn and "3/3 questions" in drawn
    assert out.getvalue().endswith("\x1b[2K")
