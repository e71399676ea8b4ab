"""aider has no tools: it puts files into its prompt, and edits them by what the answer says."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import agent
from clients.harness import Served, documented, python, python_version, run, seen

pytestmark = pytest.mark.clients

# No questions, no news, and nothing that a terminal would need.
QUIET = [
    "--yes-always",
    "--no-show-model-warnings",
    "--analytics-disable",
    "--no-check-update",
    "--no-pretty",
]


def test_answers_continues_and_edits(served: Served, home: Path, notes: Path, word: str) -> None:
    (home / ".gitconfig").write_text("[user]\nname = t\nemail = t@localhost\n")
    run(["git", "init", "--quiet"])
    settings = documented("aider", served)
    aider = [python("aider"), "-m", "aider", *QUIET]

    first = run([*aider, "--message", agent.READ.format("notes.txt"), "notes.txt"], settings)
    assert f"The code word is {word}." in first
    known = served.metric("cached_tokens_total")
    again = run([*aider, "--restore-chat-history", "--message", agent.AGAIN, "notes.txt"], settings)
    assert f"the code word was {word}" in again
    known = served.metric("cached_tokens_total") - known
    assert known > 0
    run([*aider, "--message", agent.REPLACE.format("notes.txt", "otter-7"), "notes.txt"], settings)
    assert notes.read_text() == "The code word is otter-7.\n"
    assert run(["git", "log", "--format=%s", "-1"]).strip() == "Change the code word"
    served.check_statuses()
    version = python_version("aider", "aider-chat")
    seen("aider", version, f"file read, edited, committed; {known} tokens of turn 2 known")
