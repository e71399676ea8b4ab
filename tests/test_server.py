"""The server in a process of its own, and the openai and anthropic packages as they are."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("uvicorn")

from mlx_flashmoe.server.errors import ApiError  # noqa: E402
from mlx_flashmoe.server.http import _parse, read_body  # noqa: E402
from mlx_flashmoe.server.schemas import VALIDATORS  # noqa: E402
from mlx_flashmoe.server.stops import StopFinder  # noqa: E402
from mlx_flashmoe.tools import Text  # noqa: E402


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address and process, for as long as it runs."""
    command = [sys.executable, str(Path(__file__).parent / "serve_fake.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", line := process.stdout.readline())
            assert found, line + process.stdout.read()
            yield found[0], process
        finally:
            process.terminate()
            rest = process.communicate(timeout=20)[0]
    assert "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as (address, _):
        yield address


@pytest.fixture
def gpt(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def claude(address: str) -> Any:
    with anthropic.Anthropic(base_url=address, api_key="any", max_retries=0, timeout=30) as client:
        yield client


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def call(**arguments: Any) -> str:
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>"


SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place", "days"],
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLAUDE_TOOL = {"name": "weather", "input_schema": SCHEMA}
ANSWER = "SAY(<think>\nHm.\n</think>\n\nIt is blue.)"
CALLS = f"SAY(Let me see.\n\n{call(place='Zürich', days=3)}\n{call(place='42', days=1)})"


def metric(address: str, name: str) -> float:
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"flashmoe_{name}"))


# OpenAI


def test_openai_answers_and_streams(gpt: Any) -> None:
    assert [m.id for m in gpt.models.list()] == ["obedient"]
    assert gpt.models.retrieve("obedient").owned_by == "mlx-flashmoe"
    made = gpt.chat.completions.create(model="any", messages=[user(ANSWER)], logprobs=True, top_logprobs=2)
    (choice,) = made.choices
    assert (choice.message.content, choice.message.reasoning_content) == ("It is blue.", "Hm.")
    assert choice.finish_reason == "stop"
    assert made.usage.completion_tokens == len(choice.logprobs.content)
    entries = choice.logprobs.content[:-1]  # the last is the end token
    assert b"".join(bytes(e.bytes) for e in entries).decode() == "<think>\nHm.\n</think>\n\nIt is blue."
    assert all(e.logprob > -0.001 and e.top_logprobs[0].token == e.token for e in entries)
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[1].logprob < -10 for e in entries)

    chunks = list(
        gpt.chat.completions.create(
            model="any",
            messages=[user(ANSWER)],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        )
    )
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == "It is blue."
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm."
    assert chunks[-1].usage == made.usage
    streamed = [
        e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in choice.logprobs.content]


def test_openai_tools_round_trip(gpt: Any) -> None:
    messages: list[Any] = [user(CALLS)]
    first = gpt.chat.completions.create(model="any", messages=messages, tools=[TOOL])
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    assert message.content == "Let me see."
    calls = message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("weather", {"place": "Zürich", "days": 3}),
        ("weather", {"place": "42", "days": 1}),
    ]
    # Results in another order than the calls: the model sees them in the calls' order, so SAY comes last.
    results = {calls[0].id: "rain", calls[1].id: "SAY(It rains.)"}
    messages.append(message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": i, "content": results[i]} for i in reversed(results)]
    second = gpt.chat.completions.create(model="any", messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "It rains."
    assert second.choices[0].finish_reason == "stop"

    with gpt.chat.completions.stream(model="any", messages=[user(CALLS)], tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    assert [c.function.arguments for c in final.choices[0].message.tool_calls] == [
        c.function.arguments for c in calls
    ]
    untold = gpt.chat.completions.create(
        model="any", messages=[user(CALLS)], tools=[TOOL], tool_choice="none"
    )
    assert untold.choices[0].message.content == "Let me see.\n\n" + CALLS.split("\n\n")[1][:-1]


def test_arguments_are_streamed_as_they_are_written(gpt: Any, claude: Any) -> None:
    place = 'Zürich, "the" large\none'
    asked = [user(f"SAY({call(place=place, days=3)})")]
    chunks = gpt.chat.completions.create(model="any", messages=asked, tools=[TOOL], stream=True)
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [c.function.name for c in calls if c.function.name] == ["weather"] and calls[0].id
    pieces = [c.function.arguments for c in calls]
    assert json.loads("".join(pieces)) == {"place": place, "days": 3} and len(pieces) > 5
    with claude.messages.stream(model="any", max_tokens=300, messages=asked, tools=[CLAUDE_TOOL]) as stream:
        parts = [e.partial_json for e in stream if e.type == "input_json"]
        assert stream.get_final_message().content[0].input == {"place": place, "days": 3}
    assert "".join(parts) == "".join(pieces) and len(parts) > 5


def test_a_call_that_is_cut_is_never_one(gpt: Any, claude: Any) -> None:
    written = call(place="Zürich", days=3)
    asked = {"model": "any", "messages": [user(f"SAY({written})")], "max_tokens": len(written) // 3}
    whole = gpt.chat.completions.create(**asked, tools=[TOOL]).choices[0]
    assert (whole.message.tool_calls, whole.finish_reason) == (None, "length")
    assert written.startswith(whole.message.content) and "<function=weather>" in whole.message.content
    choices = [c.choices[0] for c in gpt.chat.completions.create(**asked, tools=[TOOL], stream=True)]
    sent = "".join(c.function.arguments for choice in choices for c in choice.delta.tool_calls or [])
    with pytest.raises(ValueError):
        json.loads(sent)
    assert choices[-1].finish_reason == "length"
    told = claude.messages.create(**asked, tools=[CLAUDE_TOOL])
    assert (told.stop_reason, [b.type for b in told.content]) == ("max_tokens", ["text"])
    events = list(claude.messages.create(**asked, tools=[CLAUDE_TOOL], stream=True))
    assert events[-2].delta.stop_reason == "max_tokens"


@pytest.mark.parametrize("thinking", [False, True])
def test_openai_forms_that_the_model_would_not_choose(gpt: Any, thinking: bool) -> None:
    pytest.importorskip("llguidance")
    asked = {
        "model": "any",
        "messages": [user("SAY(No, never. FOREVER)")],
        "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}},
    }
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        made = gpt.chat.completions.create(**asked, tools=[TOOL], tool_choice=choice, max_tokens=400)
        (message,) = [c.message for c in made.choices]
        assert made.choices[0].finish_reason == "tool_calls" and not message.content
        assert [set(json.loads(c.function.arguments)) for c in message.tool_calls] == [
            {"place", "days"}
        ] * len(message.tool_calls)
        assert bool(getattr(message, "reasoning_content", None)) == thinking
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    made = gpt.chat.completions.create(**asked, response_format=form, max_tokens=150)
    assert set(json.loads(made.choices[0].message.content)) >= {"place", "days"}
    made = gpt.chat.completions.create(**asked, response_format={"type": "json_object"}, max_tokens=90)
    assert isinstance(json.loads(made.choices[0].message.content), dict)


def test_a_whole_number_may_have_a_point(gpt: Any, claude: Any) -> None:
    more = {"top_k": 40.0, "max_tokens": 5.0}
    made = gpt.chat.completions.create(model="any", messages=[user("SAY(a)")], extra_body=more)
    assert made.choices[0].message.content == "a"
    told = claude.messages.create(model="any", messages=[user("SAY(a)")], max_tokens=5, extra_body=more)
    assert told.content[0].text == "a"


def test_openai_stops(gpt: Any) -> None:
    for stream in (False, True):
        made = gpt.chat.completions.create(
            model="any",
            messages=[user("SAY(<think>a b</think>One, two, three.)")],
            stop=[", t", "b"],
            stream=stream,
        )
        if stream:
            chunks = [c.choices[0] for c in made]
            assert "".join(c.delta.content or "" for c in chunks) == "One"
            assert chunks[-1].finish_reason == "stop"
        else:
            assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("One", "stop")
    cut = gpt.chat.completions.create(model="any", messages=[user("FOREVER SAY(a)")], max_tokens=3)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("aaa", "length")


def test_openai_completions(gpt: Any) -> None:
    prompt = "<|im_start|>user\nSAY(A lighthouse.)<|im_end|>\n<|im_start|>assistant\n"
    made = gpt.completions.create(model="any", prompt=prompt, logprobs=1, seed=-1)
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("A lighthouse.", "stop")
    assert "".join(made.choices[0].logprobs.tokens).startswith("A lighthouse.")
    streamed = gpt.completions.create(model="any", prompt=[prompt], stream=True, max_tokens=2)
    assert made.choices[0].text.startswith("".join(c.choices[0].text for c in streamed))


# Anthropic


def test_anthropic_answers_and_streams(claude: Any) -> None:
    asked = {"model": "any", "max_tokens": 100, "messages": [user(ANSWER)]}
    made = claude.messages.create(**asked)
    assert [b.type for b in made.content] == ["thinking", "text"]
    assert (made.content[0].thinking, made.content[1].text) == ("Hm.", "It is blue.")
    assert (made.stop_reason, made.stop_sequence) == ("end_turn", None)
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "It is blue."
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["thinking", "text"]
    assert (final.usage.input_tokens, final.usage.output_tokens) == (
        made.usage.input_tokens,
        made.usage.output_tokens,
    )
    counted = claude.messages.count_tokens(model="any", messages=[user(ANSWER)])
    assert counted.input_tokens == made.usage.input_tokens
    # Thinking is the template's to open, and only when asked for.
    thought = claude.messages.create(
        **{**asked, "messages": [user("SAY(So.\n</think>\nYes.)")]},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert [getattr(b, b.type) for b in thought.content] == ["So.", "Yes."]


def test_anthropic_tools_round_trip(claude: Any) -> None:
    asked = {"model": "any", "max_tokens": 200, "tools": [CLAUDE_TOOL], "system": "You are brief."}
    messages: list[Any] = [user(CALLS)]
    first = claude.messages.create(**asked, messages=messages)
    assert (first.stop_reason, first.content[0].text) == ("tool_use", "Let me see.")
    calls = first.content[1:]
    assert [(c.name, c.input) for c in calls] == [
        ("weather", {"place": "Zürich", "days": 3}),
        ("weather", {"place": "42", "days": 1}),
    ]
    with claude.messages.stream(**asked, messages=messages) as stream:
        assert [b.input for b in stream.get_final_message().content[1:]] == [c.input for c in calls]
    messages.append({"role": "assistant", "content": first.content})
    texts = ["SAY(It rains.)", [{"type": "text", "text": "rain"}]]
    results = [
        {"type": "tool_result", "tool_use_id": c.id, "content": t} for c, t in zip(reversed(calls), texts)
    ]
    messages.append({"role": "user", "content": results})
    second = claude.messages.create(**asked, messages=messages)
    assert (second.stop_reason, second.content[0].text) == ("end_turn", "It rains.")


def test_anthropic_choices_and_stops(claude: Any) -> None:
    pytest.importorskip("llguidance")
    asked = {"model": "any", "max_tokens": 150, "messages": [user("SAY(One, two.)")]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        made = claude.messages.create(**asked, tools=[CLAUDE_TOOL], tool_choice=choice)
        assert made.stop_reason == "tool_use"
        assert all(set(b.input) == {"place", "days"} for b in made.content)
    made = claude.messages.create(**asked, stop_sequences=["two"])
    assert (made.content[0].text, made.stop_reason, made.stop_sequence) == ("One, ", "stop_sequence", "two")
    assert claude.messages.create(**{**asked, "max_tokens": 1}).stop_reason == "max_tokens"


def test_a_long_silence_is_filled(address: str, gpt: Any, claude: Any) -> None:
    asked = {"model": "any", "max_tokens": 20, "messages": [user("LATE(1) SAY(At last.)")]}
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    # Events that clients count, not comments.
    for path, sign in (
        ("chat/completions", b'"delta":{},"logprobs":null,"finish_reason":null'),
        ("messages", b'event: ping\ndata: {"type":"ping"}\n\n'),
    ):
        connection.request("POST", f"/v1/{path}", json.dumps({**asked, "stream": True}))
        assert connection.getresponse().read().count(sign) >= 3, path
    connection.close()
    chunks = gpt.chat.completions.create(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "At last."
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "At last."


# Errors, as the clients' own exceptions


def test_errors_are_the_clients_own(gpt: Any, claude: Any) -> None:
    def chat(**changes: Any) -> Any:
        return gpt.chat.completions.create(**{"model": "any", "messages": [user("SAY(x)")], **changes})

    def message(**changes: Any) -> Any:
        return claude.messages.create(
            **{"model": "any", "max_tokens": 10, "messages": [user("SAY(x)")], **changes}
        )

    for make, package, changes, text in (
        (chat, openai, {"messages": []}, "messages: .*(short|empty)"),
        (chat, openai, {"messages": [{"role": "robot", "content": "x"}]}, r"messages\.0\.role: 'robot'"),
        (chat, openai, {"n": 129}, "n: 129 answers .* are not supported"),
        (chat, openai, {"temperature": -1}, "temperature: -1"),
        (chat, openai, {"tool_choice": "required"}, "tool_choice asks for a tool that is not among tools"),
        (chat, openai, {"extra_body": {"chat_template_kwargs": {"tools": 1}}}, "tools cannot be set"),
        (message, anthropic, {"max_tokens": 0}, "max_tokens: 0 is less than"),
        (message, anthropic, {"tool_choice": {"type": "tool", "name": "x"}}, "not among tools"),
    ):
        with pytest.raises(package.BadRequestError, match=text):
            make(**changes)
    for make, package in ((chat, openai), (message, anthropic)):
        with pytest.raises(package.BadRequestError, match="do not fit into the context of 2000 tokens"):
            make(messages=[user("x" * 2000)])
        with pytest.raises(package.InternalServerError, match="the disk is gone"):
            make(messages=[user("BREAK")])
        with pytest.raises(package.APIError, match="the disk is gone"):
            list(make(messages=[user("BREAK")], stream=True))
    with pytest.raises(openai.NotFoundError, match="only obedient"):
        gpt.models.retrieve("another")
    with pytest.raises(openai.NotFoundError):
        gpt.embeddings.create(model="any", input="x")
    large = "x" * (33 * 2**20)
    with pytest.raises(openai.APIStatusError, match="larger than") as too_large:
        chat(messages=[user(large)])
    assert too_large.value.status_code == 413
    with pytest.raises(anthropic.APIStatusError, match="larger than") as too_large:
        message(messages=[user(large)])
    assert too_large.value.status_code == 413


@pytest.mark.parametrize("path", ["chat/completions", "completions", "messages", "messages/count_tokens"])
def test_bodies_that_no_client_sends(address: str, path: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    for body in (
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'),
        b'{"prompt": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"prompt": "x", "max_tokens": %s}' % (b"9" * 5000),
        b'{"prompt": 7, "max_tokens": 5, "messages": [{"role": "user", "content": "x", "tool_calls": '
        + b'{"a":' * 900
        + b"1"
        + b"}" * 902,
    ):
        connection.request("POST", f"/v1/{path}", body)
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert (response.status, error["type"]) == (400, "invalid_request_error"), body[:80]
    connection.close()


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        (
            "completion",
            b'{"prompt":[' + b'"a",' * 300_000 + b"7]}",
            "prompt.300000: 7 is not of type 'string'",
        ),
        (
            "completion",
            b'{"prompt":[' + b"7," * 300_000 + b"-1]}",
            "prompt.300000: -1 is less than the minimum",
        ),
        ("completion", b'{"prompt":[' + b"7," * (2**21 + 1) + b"7]}", "no such prompt fits"),
        ("chat_completion", b'{"messages":[' + b"{}," * 300_000 + b"{}]}", "more than 32768 JSON objects"),
        (
            "chat_completion",
            b'{"messages":[' + b"[]," * 300_000 + b"[]]}",
            r"messages.0: \[\] is not of type",
        ),
        (
            "message",
            b'{"max_tokens":1,"messages":[{"role":"user","content":[' + b"7," * 300_000 + b"7]}]}",
            "content.*is not",
        ),
    ],
    ids=["texts", "tokens", "commas", "objects", "arrays", "parts"],
)
def test_what_is_wrong_with_a_large_body_is_found_quickly(name: str, body: bytes, message: str) -> None:
    started = time.perf_counter()
    json.loads(body)
    read = time.perf_counter()
    with pytest.raises(ApiError, match=message):
        _parse(body, VALIDATORS[name])
    checked = time.perf_counter()
    assert checked - read < 10 * (read - started) + 0.5  # jsonschema's own keywords: 4 to 40 s


def test_a_body_is_checked_beside_the_event_loop() -> None:
    class Slow:
        def iter_errors(self, data: Any) -> list[Any]:
            time.sleep(0.3)
            return []

    class Sent:
        async def stream(self) -> Any:
            yield b'{"a": 1, "b": null}'

    async def both() -> tuple[dict[str, Any], int]:
        turns = 0
        reading = asyncio.create_task(read_body(Sent(), Slow()))  # type: ignore[arg-type]
        while not reading.done():
            await asyncio.sleep(0.01)
            turns += 1
        return await reading, turns

    body, turns = asyncio.run(both())
    assert body == {"a": 1} and turns > 5


def test_a_key_and_web_pages() -> None:
    with running("secret") as (address, _):
        host = address.removeprefix("http://")
        openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list()
        anthropic.Anthropic(base_url=address, api_key="secret").messages.count_tokens(
            model="any", messages=[user("x")]
        )
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="Secret").models.list()
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=address, api_key="é").messages.count_tokens(
                model="any", messages=[user("x")]
            )
        for path, headers, status in (
            ("/health", {}, 200),
            ("/metrics", {}, 401),
            ("/metrics", {"Authorization": "Bearer secret"}, 200),
            ("/health", {"Origin": "https://example.org"}, 403),
        ):
            connection = http.client.HTTPConnection(host, timeout=10)
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            assert response.status == status, path
            assert response.getheader("Access-Control-Allow-Origin") is None
            connection.close()


def test_what_does_not_start(tmp_path: Path) -> None:
    def start(*arguments: str) -> str:
        command = [sys.executable, "-m", "mlx_flashmoe", "serve", "--model", str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        return done.stderr

    assert "--host 0.0.0.0 lets other machines connect: give an --api-key" in start("--host", "0.0.0.0")
    for nothing in ("", " "):
        assert "--api-key is empty" in start("--host", "0.0.0.0", "--port", "0", "--api-key", nothing)
    assert "flashmoe.json" in start("--host", "0.0.0.0", "--without-api-key", "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be used" in start("--port", str(taken.getsockname()[1]))


# Stop sequences


@given(st.text("ab<", max_size=12), st.lists(st.text("ab<", min_size=1, max_size=3), max_size=3), st.data())
def test_the_first_sequence_ends_the_text(text: str, sequences: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    finder, shown, met = StopFinder(sequences), "", None
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        events, met = finder.feed([Text(text[start:end])], last=end == len(text))
        shown += "".join(event.text for event in events)
        if met is not None:
            break
    if met is None:
        assert shown == text and not any(s in text for s in sequences)
    else:
        assert text.startswith(shown + met)
        assert not any(s in shown for s in sequences)


# The log


def test_a_line_for_each_request() -> None:
    pytest.importorskip("uvicorn")
    from mlx_flashmoe.server.log import line
    from mlx_flashmoe.server.worker import Job

    def job(**figures: Any) -> Job:
        return Job(list(range(1000)), 100, lambda p: p, [], **figures)

    def said(*jobs: Job, status: int = 200) -> str:
        return line("POST", "/v1/messages", status, 4.25, jobs)[9:]

    assert said(status=400) == "400 POST /v1/messages · 4.2 s"
    known = job(generated=21, cached=900, prompt_seconds=2.0, answer_seconds=2.0, hits=3, misses=1)
    expected = (
        "prompt 1,000 (900 cached) at 50.0 per second · answer 21 at 10.0 per second · 75% hits · 4.2 s"
    )
    assert said(known) == f"200 POST /v1/messages · {expected}"
    assert said(job(given_up=True)) == "200 POST /v1/messages · prompt 1,000 · answer 0 · given up · 4.2 s"


# Load


def test_who_goes_away_makes_room_at_once(address: str, gpt: Any) -> None:
    def wait_for(busy: int, waiting: int) -> float:
        start = time.monotonic()
        while (metric(address, "busy"), metric(address, "queue_waiting")) != (busy, waiting):
            assert time.monotonic() < start + 5
            time.sleep(0.005)
        return time.monotonic() - start

    # A stream that is closed while tokens come, and a request that is cut off while it waits.
    first = gpt.chat.completions.create(model="any", messages=[user("SLOWLY FOREVER SAY(a)")], stream=True)
    chunks = iter(first)
    assert [next(chunks).choices[0].delta.content for _ in range(3)] == ["", "a", "a"]
    waiting = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    body = json.dumps({"messages": [user("SLOWLY FOREVER SAY(b)")]})
    waiting.request("POST", "/v1/chat/completions", body)
    wait_for(1, 1)
    waiting.close()
    wait_for(1, 0)
    counted = metric(address, "generated_tokens_total")
    first.close()
    assert wait_for(0, 0) < 0.5  # a token takes a twentieth of a second
    assert metric(address, "generated_tokens_total") >= counted + 2
    made = gpt.chat.completions.create(model="any", messages=[user("SAY(c)")])
    assert made.choices[0].message.content == "c"


def test_a_request_that_is_sent_again_does_not_wait_for_the_one_that_was_given_up(
    address: str, gpt: Any
) -> None:
    body = json.dumps({"messages": [user("SLOWLY FOREVER SAY(b)")]})  # would take a minute and more
    given_up = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    given_up.request("POST", "/v1/chat/completions", body)
    while not metric(address, "busy"):
        time.sleep(0.005)
    given_up.close()
    started = time.monotonic()
    made = gpt.chat.completions.create(model="any", messages=[user("SAY(c)")])
    assert made.choices[0].message.content == "c" and time.monotonic() - started < 10


def test_the_end_of_the_server_ends_its_answers() -> None:
    with running() as (address, process), ThreadPoolExecutor(3) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=30)

        def ask(stream: bool) -> None:
            said = client.chat.completions.create(
                model="any", messages=[user("SLOWLY FOREVER SAY(a)")], stream=stream
            )
            list(said)

        asked = [pool.submit(ask, stream) for stream in (True, False, True)]
        while metric(address, "queue_waiting") < 2:
            time.sleep(0.01)
        process.terminate()
        for one in asked:
            with pytest.raises(openai.APIError, match="the server is stopping"):
                one.result(timeout=5)


def test_50_clients_at_once(gpt: Any, address: str) -> None:
    patient = gpt.with_options(timeout=60)

    def ask(i: int) -> str:
        try:
            made = patient.chat.completions.create(
                model="any", messages=[user(f"SLOWLY SAY(Number {i}.)")], stream=i % 2 == 0
            )
            if i % 2:
                return str(made.choices[0].message.content)
            return "".join(chunk.choices[0].delta.content or "" for chunk in made)
        except openai.RateLimitError as e:
            assert int(e.response.headers["Retry-After"]) >= 1
            return "refused"

    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(ask, range(50)))
    answered = [i for i in range(50) if said[i] != "refused"]
    assert all(said[i] == f"Number {i}." for i in answered)
    assert len(answered) >= 9  # one at work and a queue of eight
    assert metric(address, "busy") + metric(address, "queue_waiting") == 0
