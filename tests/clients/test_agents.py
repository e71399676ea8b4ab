"""Agents on the command line read a file with their own tool, answer, and continue in a second turn."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clients import agent
from clients.harness import Served, documented, npm_version, program, run, seen

pytestmark = pytest.mark.clients

# One red dot.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


@dataclass(frozen=True)
class Turn:
    """A turn, as the client reports it.

    Attributes:
        answer: the model's last text.
        prompt, cached: tokens of the turn's prompts, and of these the ones read before.
    """

    answer: str
    prompt: int
    cached: int


@dataclass(frozen=True)
class Agent:
    """A client, and how it is used.

    Attributes:
        package: on npm.
        first, then: arguments of the first turn and of one that continues it, before the task.
        read: a turn's output.
        cached: the share of the second turn's prompt that was read before, at least.
    """

    package: str
    program: str
    first: list[str]
    then: list[str]
    read: Callable[[str], Turn]
    cached: float


def claude_turn(output: str) -> Turn:
    said = json.loads(output)
    usage = said["usage"]
    cached = usage["cache_read_input_tokens"]
    return Turn(said["result"], usage["input_tokens"] + cached, cached)


def codex_turn(output: str) -> Turn:
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    texts = [e["item"]["text"] for e in events if e.get("item", {}).get("type") == "agent_message"]
    usage = events[-1]["usage"]
    return Turn(texts[-1], usage["input_tokens"], usage["cached_input_tokens"])


def opencode_turn(output: str) -> Turn:
    events = [json.loads(line) for line in output.splitlines()]
    texts = [e["part"]["text"] for e in events if e["type"] == "text"]
    tokens = [e["part"]["tokens"] for e in events if e["type"] == "step_finish"]
    cached = sum(t["cache"]["read"] for t in tokens)
    return Turn(texts[-1], sum(t["input"] for t in tokens) + cached, cached)


def qwen_turn(output: str) -> Turn:
    # The total at the end counts what it remembers on the side, too.
    said = [e["message"] for e in json.loads(output) if e["type"] == "assistant"][-1]
    usage = said["usage"]
    return Turn(said["content"][-1]["text"], usage["input_tokens"], usage["cache_read_input_tokens"])


AGENTS = {
    "Claude Code": Agent(
        "@anthropic-ai/claude-code",
        "claude",
        ["--output-format", "json", "-p"],
        ["--output-format", "json", "--continue", "-p"],
        claude_turn,
        cached=0.95,
    ),
    "Codex CLI": Agent(
        "@openai/codex",
        "codex",
        ["--profile", "flashmoe", "exec", "--skip-git-repo-check", "--json"],
        ["--profile", "flashmoe", "exec", "resume", "--last", "--skip-git-repo-check", "--json"],
        codex_turn,
        cached=0.95,
    ),
    "OpenCode": Agent(
        "opencode-ai",
        "opencode",
        ["run", "--format", "json"],
        ["run", "--format", "json", "--continue"],
        opencode_turn,
        cached=0.95,
    ),
    # Its first message loses a reminder of the date in the second turn: only the system prompt is the same.
    "Qwen Code": Agent(
        "@qwen-code/qwen-code",
        "qwen",
        ["--auth-type", "openai", "--output-format", "json", "-p"],
        ["--auth-type", "openai", "--output-format", "json", "--continue", "-p"],
        qwen_turn,
        cached=0.6,
    ),
}


def called(value: Any) -> set[str]:
    """Names of the functions that a request's history says were called, whatever the API."""
    if isinstance(value, list):
        return set().union(*map(called, value))
    if not isinstance(value, dict):
        return set()
    call = value.get("type") == "tool_use" or isinstance(value.get("arguments"), str)
    names = {value["name"]} if call and isinstance(value.get("name"), str) else set()
    return names.union(*map(called, value.values()))


@pytest.mark.parametrize("name", AGENTS)
def test_reads_and_continues(name: str, served: Served, home: Path, notes: Path, word: str) -> None:
    client = AGENTS[name]
    settings = documented(name, served)
    command = program(client.program)

    first = client.read(run([command, *client.first, agent.READ.format(notes)], settings))
    assert word in first.answer
    tools = called([r["body"] for r in served.requests()])
    assert len(tools) == 1
    prompt, known = served.metric("prompt_tokens_total"), served.metric("cached_tokens_total")

    again = client.read(run([command, *client.then, agent.AGAIN], settings))
    assert word in again.answer
    served.check_statuses()
    assert served.metric("cached_tokens_total") > known
    # Codex counts a session's tokens, not a turn's.
    read_before = again.cached - first.cached if name == "Codex CLI" else again.cached
    read = again.prompt - first.prompt if name == "Codex CLI" else again.prompt
    assert read_before >= client.cached * read
    assert served.metric("prompt_tokens_total") >= prompt + read
    what = f"{min(tools)} called; {read_before} of turn 2's {read} tokens known"
    seen(name, npm_version(client.package), what)


CALLS = {
    # Schemas that it loads late, an image, an error.
    "Claude Code": [
        ("ToolSearch", {"query": "select:WebFetch,CronList", "max_results": 2}, '"tool_reference"'),
        ("Read", {"file_path": "{project}/dot.png"}, '"image/png"'),
        ("Read", {"file_path": "{project}/none.txt"}, '"is_error"'),
    ],
    # An image, and a function within a namespace, which is none to Codex without the namespace.
    "Codex CLI": [
        ("view_image", {"path": "{project}/dot.png"}, '"input_image"'),
        ("multi_agent_v1__close_agent", {"target": "none"}, '"namespace": "multi_agent_v1"'),
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_continues_after_what_its_tools_return(
    name: str, served: Served, home: Path, notes: Path, word: str
) -> None:
    client = AGENTS[name]
    settings = documented(name, served)
    notes.with_name("dot.png").write_bytes(base64.b64decode(PNG))
    command = [program(client.program), *client.first]
    assert word in client.read(run([*command, agent.READ.format(notes)], settings)).answer
    command = [program(client.program), *client.then]
    for tool, arguments, sent in CALLS[name]:
        prompt, known = served.metric("prompt_tokens_total"), served.metric("cached_tokens_total")
        order = agent.CALL.format(tool, json.dumps(arguments)).replace("{project}", str(notes.parent))
        assert client.read(run([*command, order], settings)).answer == agent.DONE
        prompt = served.metric("prompt_tokens_total") - prompt
        known = served.metric("cached_tokens_total") - known
        assert known >= 0.95 * prompt, (tool, known, prompt)
        assert sent in json.dumps([r["body"] for r in served.requests()])
    assert word in client.read(run([*command, agent.AGAIN], settings)).answer
    assert "unsupported call" not in json.dumps([r["body"] for r in served.requests()])
    served.check_statuses()
