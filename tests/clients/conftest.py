"""For the tests with real clients: a server of their own, a home of their own, and a table of what was seen."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients.harness import HERE, PUBLISHED, SEEN, Served, start

# Beginnings of the variables that clients read their settings from.
CLIENTS = (
    "ANTHROPIC_",
    "CLAUDE",
    "CODEX_",
    "OPENAI_",
    "OPENCODE_",
    "QWEN_",
    "AIDER_",
    "LLM_",
    "OLLAMA_",
    "XDG_",
)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """The real server with the scripted agent. FLASHMOE_RECORD keeps the requests of all tests in a folder."""
    kept = os.environ.get("FLASHMOE_RECORD")
    record = Path(kept, tmp_path.name) if kept else tmp_path / "requests"
    command = [sys.executable, str(HERE / "serve_agent.py"), "--record", str(record)]
    if PUBLISHED.exists():
        command += ["--template", str(PUBLISHED)]
    yield from start(command, record, tmp_path / "server.log")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory; settings and keys of the user's own clients are out of reach."""
    for name in list(os.environ):
        if name.startswith(CLIENTS):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def word() -> str:
    """A code word that stands nowhere but in the file."""
    return f"heron-{secrets.randbelow(10**6)}"


@pytest.fixture
def notes(tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the code word, in an empty project that is the current directory."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    path = project / "notes.txt"
    path.write_text(f"The code word is {word}.\n")
    return path


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for client, version, what in SEEN:
        terminalreporter.write_line(f"{client} {version}: {what}")
