"""For the tests with real clients: a server of their own, a home of their own, and a table of what was seen."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
INSTALLED = REPOSITORY / ".clients"
PUBLISHED = REPOSITORY.parent / "shared" / "data" / "qwen3.5-397b-a17b" / "chat_template.jinja"

_SEEN: list[tuple[str, str, str]] = []


class Served:
    """A running server.

    Attributes:
        url: its address, without /v1.
    """

    def __init__(self, url: str, record: Path) -> None:
        self.url = url
        self._record = record

    def metric(self, name: str) -> int:
        """A counter of /metrics, without its prefix."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        (value,) = re.findall(rf"^flashmoe_{name} (\S+)$", text, re.MULTILINE)
        return int(float(value))

    def requests(self) -> list[dict[str, Any]]:
        """Every request so far with its answer, as ``record.py`` writes them."""
        return [json.loads(path.read_text()) for path in sorted(self._record.glob("*.json"))]

    def check_statuses(self) -> None:
        """No POST was refused."""
        refused = [
            (r["method"], r["path"], r["status"], r["answer"][:300])
            for r in self.requests()
            if r["method"] == "POST" and r["status"] != 200
        ]
        assert not refused


def start(command: list[str], record: Path, log: Path) -> Iterator[Served]:
    """A server as a process of its own, from the line in which it says its address to the end of the test."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if address := re.search(r"(http://\S+)/v1 answers", line):
                yield Served(address[1], record)
                return
        raise AssertionError(f"the server did not start: {log.read_text()}")
    finally:
        process.terminate()
        process.wait(timeout=20)


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
        if name.startswith(("ANTHROPIC_", "CLAUDE", "CODEX_", "OPENAI_", "OPENCODE_", "QWEN_", "AIDER_", "XDG_")):
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


def python(environment: str) -> str:
    """The interpreter of one of the environments that ``make clients`` sets up."""
    path = INSTALLED / environment / "bin" / "python"
    assert path.exists(), f"{path} is missing: make clients sets it up"
    return str(path)


def program(name: str) -> str:
    """A program of an npm package that ``make clients`` installs."""
    path = INSTALLED / "npm" / "node_modules" / ".bin" / name
    assert path.exists(), f"{path} is missing: make clients installs it"
    return str(path)


def npm_version(package: str) -> str:
    return json.loads((INSTALLED / "npm" / "node_modules" / package / "package.json").read_text())["version"]


def python_version(environment: str, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python(environment), "-c", code], capture_output=True, text=True).stdout.strip()


def run(command: list[str], **environment: str) -> str:
    """What a client prints. It has two minutes, and no keyboard."""
    done = subprocess.run(
        command,
        env={**os.environ, "PWD": os.getcwd(), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def seen(client: str, version: str, what: str) -> None:
    """A row of the table at the end."""
    _SEEN.append((client, version, what))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for client, version, what in _SEEN:
        terminalreporter.write_line(f"{client} {version}: {what}")
