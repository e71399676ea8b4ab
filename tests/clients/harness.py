"""Real clients and a server for them: where they are installed, how they are run, what was seen."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
INSTALLED = REPOSITORY / ".clients"
PUBLISHED = REPOSITORY.parent / "shared" / "data" / "qwen3.5-397b-a17b" / "chat_template.jinja"

CONTEXT = 200_000  # of the scripted model, in tokens
SEEN: list[tuple[str, str, str]] = []
"""Client, version, and what was seen: the table at the end."""


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
    """A server as a process of its own, from when it says its address to the end of the test."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 60
        while not (address := re.search(r"(http://\S+)/v1 answers", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Served(address[1], record)
    finally:
        process.terminate()
        process.wait(timeout=20)


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


def documented(client: str, served: Served) -> str:
    """The lines that docs/server.md has for a client, with the server's address and context."""
    section = (REPOSITORY / "docs" / "server.md").read_text().partition(f"### {client}\n")[2]
    lines = section.partition("```sh\n")[2].partition("```")[0]
    assert "http://127.0.0.1:8080" in lines, f"docs/server.md has no lines for {client}"
    return lines.replace("http://127.0.0.1:8080", served.url).replace("131072", str(CONTEXT))


def run(command: list[str], settings: str = "") -> str:
    """The output of a client that is run in a shell after lines of settings. It has two minutes, and no keyboard."""
    done = subprocess.run(
        ["bash", "-e", "-c", f'{settings}\nexec "$@"', "bash", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def seen(client: str, version: str, what: str) -> None:
    """A row of the table at the end. The one in docs/server.md has to name the same version."""
    table = (REPOSITORY / "docs" / "server.md").read_text()
    assert f"| {client} | {version} |" in table, f"docs/server.md: {client} {version} is not in the table"
    SEEN.append((client, version, what))
