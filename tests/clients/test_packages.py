"""Packages that programs talk to models with: a file is read with the program's tool, and a second turn continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from clients.harness import (
    HERE,
    INSTALLED,
    Served,
    documented,
    npm_version,
    python,
    python_version,
    run,
    seen,
)

pytestmark = pytest.mark.clients

PACKAGES = {
    "litellm": "with_litellm.py",
    "langchain-openai": "with_langchain_openai.py",
    "langchain-anthropic": "with_langchain_anthropic.py",
    "openai-agents": "with_openai_agents.py",
    "ollama": "with_ollama.py",
    "pydantic-ai-slim": "with_pydantic_ai.py",
    "inspect-ai": "with_inspect_ai.py",
    "ai (Vercel)": "with_vercel_ai.mjs",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_calls_a_tool_and_continues(package: str, served: Served, home: Path, notes: Path, word: str) -> None:
    script = HERE / "packages" / PACKAGES[package]
    if script.suffix == ".py":
        version, command = python_version("packages", package), [python("packages"), str(script)]
    else:
        node = shutil.which("node")
        assert node is not None
        version, command = npm_version("ai"), [node, str(script), str(INSTALLED / "npm" / "node_modules")]
    settings = documented("Packages", served)
    said = json.loads(run([*command, str(notes)], settings).splitlines()[-1])
    assert word in said["first"] and word in said["again"]
    served.check_statuses()
    known = served.metric("cached_tokens_total")
    assert known > 0
    assert said["cached"] is None or 0 < said["cached"] <= known
    paths = sorted({r["path"] for r in served.requests() if r["path"] != "/metrics"})
    counted = (
        f"{known} tokens known" if said["cached"] is None else f"{said['cached']} tokens of turn 2 known"
    )
    seen(package, version, f"{' '.join(paths)}; {counted}")
