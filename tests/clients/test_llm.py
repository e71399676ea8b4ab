"""llm, a program on the command line, calls a function that it is given and continues a conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import agent
from clients.harness import INSTALLED, Served, documented, python_version, run, seen

pytestmark = pytest.mark.clients

FUNCTION = '''
def read_file(path: str) -> str:
    """Reads a file."""
    with open(path) as file:
        return file.read()
'''


def test_calls_a_function_and_continues(served: Served, home: Path, notes: Path, word: str) -> None:
    path = f"export PATH={INSTALLED}/packages/bin:$PATH"
    assert "flashmoe" in run(["llm", "models"], f"{path}\n{documented('llm', served)}")
    asked = ["llm", "--model", "flashmoe", "--functions", FUNCTION]
    assert word in run([*asked, agent.READ.format(notes)], path)
    known = served.metric("cached_tokens_total")
    assert word in run([*asked, "--continue", agent.AGAIN], path)
    known = served.metric("cached_tokens_total") - known
    assert known > 0
    served.check_statuses()
    seen("llm", python_version("packages", "llm"), f"/v1/chat/completions; {known} tokens of turn 2 known")
