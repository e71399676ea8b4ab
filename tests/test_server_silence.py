"""A stream of three minutes, whatever keeps it silent, has something that clients count at least every ten seconds."""

from __future__ import annotations

import http.client
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from test_server import CLAUDE_TOOL, TOOL, running

LISTED = {"type": "object", "properties": {"numbers": {"type": "array"}}, "required": ["numbers"]}
# A prompt that takes 20 seconds; then a list, which is sent when it is whole, 40 seconds of it.
CALL = "<tool_call>\n<function=weather>\n<parameter=numbers>\n[{}]\n</parameter>\n</function>\n</tool_call>"
LATE = f"LATE(20) SLOWLY SAY({CALL.format(', '.join(['1'] * 300))})"
# What may be a stop sequence's beginning is held back for as long.
HELD = "x" * 700


def largest_gap(address: str, path: str, body: dict[str, Any]) -> tuple[float, float, str]:
    """Seconds without an event, seconds to the headers, and the stream."""
    start = last = time.monotonic()
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    headers = time.monotonic() - start
    assert response.status == 200, response.read()
    gap, seen = 0.0, ""
    while line := response.readline().decode():
        if line.startswith(("data:", "{")):  # comments do not count
            now = time.monotonic()
            gap, last = max(gap, now - last), now
            seen += line
    connection.close()
    return gap, headers, seen


@pytest.mark.slow
def test_no_stream_is_silent_for_ten_seconds() -> None:
    """Four requests at once: each waits for those before it, reads a long prompt, and holds a call or a text back."""
    said = [{"role": "user", "content": LATE}]
    tool = {**TOOL["function"], "parameters": LISTED}  # type: ignore[dict-item]
    held = [{"role": "user", "content": f"LATE(20) SLOWLY SAY({HELD})"}]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": said, "tools": [{"type": "function", "function": tool}]}),
        (
            "/v1/messages",
            {"messages": said, "max_tokens": 5000, "tools": [{**CLAUDE_TOOL, "input_schema": LISTED}]},
        ),
        ("/v1/chat/completions", {"messages": held, "stop": ["x" * 1000]}),
        ("/v1/responses", {"input": said, "tools": [{"type": "function", **tool}]}),
        ("/api/chat", {"messages": said, "tools": [{"type": "function", "function": tool}]}),
    ]
    with running("--keep-alive", "5", "--context", "20000") as (address, _), ThreadPoolExecutor(5) as pool:
        started = time.monotonic()
        answers = [
            pool.submit(largest_gap, address, path, {**body, "stream": True}) for path, body in requests
        ]
        for (path, _), answer in zip(requests, answers):
            gap, headers, seen = answer.result()
            assert gap < 10 and headers < 1, path
            assert re.search(r"weather|xxxx", seen), path
        assert time.monotonic() - started > 180
