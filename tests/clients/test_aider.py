"""aider has no tools: it puts files into its prompt, and edits them by what the answer says."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import agent
from clients.harness import Served, python, python_version, run, seen

pytestmark = pytest.mark.clients


def test_answers_goes_on_and_edits(served: Served, home: Path, notes: Path, word: str) -> None:
    run(["git", "init", "--quiet"])
    run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--allow-empty", "-qm", "Begin"])
    aider = [python("aider"), "-m", "aider", "--model", "openai/scripted"]
    aider += ["--openai-api-base", f"{served.url}/v1", "--openai-api-key", "none"]
    # No questions, no news, and nothing that a terminal would need.
    aider += ["--yes-always", "--no-show-model-warnings", "--analytics-disable", "--no-check-update", "--no-pretty"]

    assert f"The code word is {word}." in run([*aider, "--message", agent.READ.format("notes.txt"), "notes.txt"])
    known = served.metric("cached_tokens_total")
    again = run([*aider, "--restore-chat-history", "--message", agent.AGAIN, "notes.txt"])
    assert f"the code word was {word}" in again
    known = served.metric("cached_tokens_total") - known
    assert known > 0
    run([*aider, "--message", agent.REPLACE.format("notes.txt", "otter-7"), "notes.txt"])
    assert notes.read_text() == "The code word is otter-7.\n"
    assert run(["git", "log", "--format=%s", "-1"]).strip() == "Change the code word"
    served.check_statuses()
    seen("aider", python_version("aider", "aider-chat"), f"file read, edited, committed; of turn 2 {known} tokens known")
