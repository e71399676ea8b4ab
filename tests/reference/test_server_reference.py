"""The server under requests made up from its own description, and under many of them."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("uvicorn")

from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

SERVER = Path(__file__).parents[1] / "serve_fake.py"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """Address and process id."""
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        yield found[0], process.pid
        process.terminate()
        said = process.communicate(timeout=20)[0]
    assert "Traceback" not in said, said


def ask(host: str, body: dict[str, Any]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


def test_no_request_breaks_it(server: tuple[str, int]) -> None:
    host, _ = server
    schema = schemathesis.openapi.from_url(f"http://{host}/openapi.json")

    @hypothesis.settings(
        max_examples=60,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(data=hypothesis.strategies.data())
    def every(data: Any) -> None:
        for operation in operations:
            case = data.draw(operation.as_strategy())
            if isinstance(case.body, dict):
                # Answers as long as asked for would say nothing more.
                limits = {"max_tokens", "max_output_tokens"} & case.body.keys()
                case.body = {**case.body, **dict.fromkeys(limits, 3)}
            response = case.call(timeout=30)
            assert response.status_code < 500, (case.body, response.text)
            # What has the right form can still be refused for what it says: too long, no such tool.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 23
    every()


def resident(pid: int) -> int:
    """Bytes of memory a process has."""
    text = Path(f"/proc/{pid}/status").read_text()
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", text)
    return int(kib) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked up in /proc")
def test_memory_stays_where_it_is_over_500_requests(server: tuple[str, int]) -> None:
    host, pid = server

    def hundred() -> None:
        with ThreadPoolExecutor(4) as pool:
            for status, answer in pool.map(lambda _: ask(host, body), range(100)):
                assert status == 200 and answer["choices"][0]["message"]["content"]

    body = {"messages": [{"role": "user", "content": "x " * 500 + "SAY(A lighthouse, three boats.)"}]}
    hundred()
    before = resident(pid)
    for _ in range(5):
        hundred()
    growth = resident(pid) - before
    print(f"{growth / 1e6:.1f} MB more after 500 requests")
    assert growth < 8 * 10**6
