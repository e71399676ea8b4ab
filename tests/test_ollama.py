"""Ollama's API, with the ollama package as it is, and the lists of models of every API."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ollama = pytest.importorskip("ollama")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("uvicorn")

from test_server import SCHEMA, call, running  # noqa: E402

from mlx_flashmoe.facts import Facts  # noqa: E402
from mlx_flashmoe.server.errors import ApiError  # noqa: E402
from mlx_flashmoe.server.ollama import _messages, _settings  # noqa: E402

TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALLS = f"SAY(Let me see.\n\n{call(place='Zürich', days=3)}\n{call(place='42', days=1)})"
THINKS = "SAY(<think>\nHm.\n</think>\n\nIt is blue.)"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as (address, _):
        yield address


@pytest.fixture
def client(address: str) -> Any:
    return ollama.Client(address, timeout=30)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def request(
    address: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Status, media type and body of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(method, path, None if body is None else json.dumps(body), headers or {})
    response = connection.getresponse()
    answer = response.status, response.getheader("content-type", ""), response.read().decode()
    connection.close()
    return answer


def test_a_chat_whole_and_in_lines(client: Any) -> None:
    made = client.chat("any", messages=[user(THINKS)])
    assert (made.message.content, made.message.thinking) == ("It is blue.", "Hm.")
    assert (made.model, made.done, made.done_reason) == ("any", True, "stop")
    assert made.prompt_eval_count > 0 and made.eval_count > 0
    assert 0 < made.eval_duration < made.total_duration and made.prompt_eval_duration > 0
    *parts, last = client.chat("any", messages=[user(THINKS)], stream=True)
    assert "".join(p.message.content or "" for p in parts) == "It is blue."
    assert "".join(p.message.thinking or "" for p in parts) == "Hm."
    assert not any(p.done for p in parts) and last.done and last.done_reason == "stop"
    assert (last.prompt_eval_count, last.eval_count) == (made.prompt_eval_count, made.eval_count)


def test_answers_are_streamed_unless_the_request_says_otherwise(address: str) -> None:
    status, media, text = request(address, "POST", "/api/chat", {"model": "x", "messages": [user("SAY(hi)")]})
    lines = [json.loads(line) for line in text.splitlines()]
    assert (status, media) == (200, "application/x-ndjson") and len(lines) > 1 and lines[-1]["done"]
    body = {"model": "x", "prompt": "SAY(hi)", "stream": False}
    status, media, text = request(address, "POST", "/api/generate", body)
    assert (status, media, json.loads(text)["response"]) == (200, "application/json", "hi")


def test_tools_round_trip(client: Any) -> None:
    messages: list[Any] = [user(CALLS)]
    first = client.chat("any", messages=messages, tools=[TOOL])
    calls = [(c.function.name, c.function.arguments) for c in first.message.tool_calls]
    assert calls == [("weather", {"place": "Zürich", "days": 3}), ("weather", {"place": "42", "days": 1})]
    assert first.message.content == "Let me see."
    streamed = client.chat("any", messages=messages, tools=[TOOL], stream=True)
    assert [
        (c.function.name, c.function.arguments) for part in streamed for c in part.message.tool_calls or []
    ] == calls
    messages += [
        first.message,
        {"role": "tool", "tool_name": "weather", "content": "rain"},
        {"role": "tool", "tool_name": "weather", "content": "SAY(It rains.)"},
    ]
    assert client.chat("any", messages=messages, tools=[TOOL]).message.content == "It rains."


def test_generate_and_its_fields(client: Any) -> None:
    opened = "SAY(Hm.\n</think>\n\nIt is blue.)"  # thinking that is on is opened by the prompt
    made = client.generate("any", opened, system="Be short.", think=True)
    assert (made.response, made.thinking, made.done_reason) == ("It is blue.", "Hm.", "stop")
    raw = client.generate("any", "<|im_start|>user\nSAY(<think>a</think>b)<|im_end|>\n<|im_start|>", raw=True)
    assert (raw.response, raw.thinking) == ("<think>a</think>b", None)
    cut = client.generate("any", "SAY(One, two, three.)", options={"num_predict": 2})
    assert (cut.eval_count, cut.done_reason) == (2, "length")
    stopped = client.generate("any", "SAY(One, two, three.)", options={"stop": [", t"], "num_predict": -1})
    assert (stopped.response, stopped.done_reason) == ("One", "stop")
    parts = list(client.generate("any", "SAY(hi)", stream=True))
    assert "".join(p.response for p in parts) == "hi" and parts[-1].done


def test_forms(client: Any) -> None:
    pytest.importorskip("llguidance")
    asked: dict[str, Any] = {"think": False, "options": {"num_predict": 150}}
    no = "SAY(No, never. FOREVER)"
    made = client.chat("any", messages=[user(no)], format=SCHEMA, **asked)
    assert set(json.loads(made.message.content)) >= {"place", "days"}
    made = client.generate("any", no, format="json", think=False, options={"num_predict": 90})
    assert isinstance(json.loads(made.response), dict)
    with pytest.raises(ollama.ResponseError, match="xml"):
        client._request(dict, "POST", "/api/chat", json={"messages": [user(no)], "format": "xml"})


def test_a_request_without_a_prompt_loads_the_model(client: Any) -> None:
    for made in (client.chat("any", messages=[]), client.generate("any"), client.generate("any", "")):
        assert made.done and made.done_reason == "load"
    assert client.generate("any", keep_alive=0).done_reason == "unload"


def test_what_the_server_tells_of_its_model(client: Any, address: str) -> None:
    (listed,) = client.list().models
    assert listed.model == "obedient:latest" and listed.details.family == "fake_moe"
    assert (listed.size, listed.details.parameter_size) == (1_000_000, "1.8M")
    for name in ("obedient", "obedient:latest"):
        shown = client.show(name)
        assert shown.modelinfo["fake_moe.context_length"] == 2000
        assert shown.modelinfo["general.basename"] == "obedient"
        assert shown.capabilities == ["completion", "tools", "thinking"]
        assert client.pull(name).status == "success"
        assert [p.status for p in client.pull(name, stream=True)][-1] == "success"
    (running_model,) = client.ps().models
    assert (running_model.model, running_model.context_length) == ("obedient:latest", 2000)
    for ask in (client.show, client.pull):
        with pytest.raises(ollama.ResponseError, match="only obedient") as refused:
            ask("other")
        assert refused.value.status_code == 404
    _, _, text = request(address, "GET", "/api/version")
    assert [int(part) for part in json.loads(text)["version"].split(".")] >= [0, 13, 4]
    for method in ("HEAD", "GET"):
        assert request(address, method, "/")[0] == 200
        assert request(address, method, "/api/tags")[0] == 200


def test_errors_have_the_form_of_their_api(client: Any, address: str) -> None:
    with pytest.raises(ollama.ResponseError, match=r"messages\.0\.images: not supported"):
        client.chat("any", messages=[{"role": "user", "content": "x", "images": ["aGk="]}])
    for body, message in (
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "template": "y"}, "template: not supported"),
        ({"prompt": "x", "images": ["aGk="]}, "images: not supported"),
        ({"prompt": "x", "logprobs": True}, "logprobs is not supported here"),
        ({"prompt": "x", "options": {"top_k": "many"}}, "top_k"),
        ({"prompt": 5}, "prompt: 5"),
    ):
        status, _, text = request(address, "POST", "/api/generate", body)
        assert status == 400 and message in json.loads(text)["error"], text
    status, _, text = request(address, "POST", "/api/embed", {"input": "x"})
    assert status == 404 and "embeddings are not supported" in json.loads(text)["error"]
    status, _, text = request(address, "POST", "/api/create", {})
    assert status == 404 and json.loads(text)["error"].startswith("POST /api/create")
    broken = [user("SAY(One, two.) BREAK")]
    with pytest.raises(ollama.ResponseError, match="the disk is gone"):
        client.chat("any", messages=broken)
    with pytest.raises(ollama.ResponseError, match="the disk is gone"):
        list(client.chat("any", messages=broken, stream=True))


def test_a_silent_stream_has_lines_that_clients_count(client: Any) -> None:
    start = time.monotonic()
    parts = list(client.chat("any", messages=[user("LATE(1) SAY(hi)")], stream=True))
    assert len(parts) > 6 and time.monotonic() - start > 1
    assert "".join(p.message.content for p in parts) == "hi"


def test_the_key_is_asked_for_here_too() -> None:
    with running("secret") as (address, _):
        for method, path in (("GET", "/api/tags"), ("POST", "/api/chat"), ("GET", "/v1/models")):
            status, _, text = request(address, method, path)
            error = json.loads(text)["error"]
            assert status == 401 and "an API key is needed" in (
                error if "/api/" in path else error["message"]
            )
        client = ollama.Client(address, headers={"Authorization": "Bearer secret"})
        assert client.list().models
        headers = {"Authorization": "Bearer secret", "Origin": "https://example.org"}
        assert request(address, "GET", "/api/tags", headers=headers)[0] == 403


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_k": st.integers(-1, 100),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0, 1),
        "seed": st.integers(-1, 2**40),
        "repeat_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "num_predict": st.integers(1, 1000),
        "stop": st.lists(st.text(min_size=1), max_size=3),
        "num_ctx": st.integers(1, 10**6),
        "mirostat": st.just(0),
    },
)


@given(OPTIONS, st.sampled_from([None, True, False, "low", "high"]))
def test_every_option_counts(options: dict[str, Any], think: Any) -> None:
    asked = _settings({"options": options, "think": think})
    names = {"temperature": "temp", "repeat_penalty": "repetition_penalty"}
    for field in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"):
        assert asked["sampling"].get(names.get(field, field)) == options.get(field)
    assert asked["max_tokens"] == options.get("num_predict")
    assert asked["stop"] == options.get("stop", [])
    thinks = None if think is None else think is not False
    assert asked["template"].get("enable_thinking") == thinks


def test_images_in_the_history_become_words() -> None:
    history = [{"role": "user", "content": "See:", "images": ["aGk="]}, user("x")]
    (first, _) = _messages(history)
    assert [p["type"] for p in first["content"]] == ["text", "image"]
    with pytest.raises(ApiError, match=r"messages\.1\.images"):
        _messages([user("x"), history[0]])


# Lists of models


def test_the_context_in_every_form_in_which_clients_ask_for_it(address: str) -> None:
    listed = json.loads(request(address, "GET", "/v1/models")[2])
    (model,) = listed["data"]
    assert json.loads(request(address, "GET", "/v1/models/obedient")[2]) == model
    assert model["context_length"] == model["max_model_len"] == model["meta"]["n_ctx"] == 2000
    assert model["meta"]["n_ctx_train"] == 4096
    (codex,) = listed["models"]
    assert (codex["slug"], codex["context_window"]) == ("obedient", 2000)
    assert codex["base_instructions"]  # Codex would go without any
    (studio,) = json.loads(request(address, "GET", "/api/v0/models")[2])["data"]
    assert json.loads(request(address, "GET", "/api/v0/models/obedient")[2]) == studio
    assert (studio["state"], studio["max_context_length"]) == ("loaded", 2000)
    status, _, text = request(address, "GET", "/api/v0/models/other")
    assert status == 404 and "only obedient" in json.loads(text)["error"]["message"]


def test_anthropics_clients_get_their_own_list(address: str) -> None:
    with anthropic.Anthropic(base_url=address, api_key="any", max_retries=0) as claude:
        (model,) = claude.models.list()
        assert (model.id, model.type, model.max_input_tokens) == ("obedient", "model", 2000)
        assert claude.models.retrieve("obedient") == model
        with pytest.raises(anthropic.NotFoundError, match="only obedient") as missing:
            claude.models.retrieve("other")
        assert missing.value.body["type"] == "error"


@pytest.mark.parametrize(
    ("parameters", "bits", "shown"),
    [(999, 4, "999"), (17_619_936, 4, "17.6M"), (396_800_000_000, 16, "397B"), (1.2e12, 2, "1.2T")],
)
def test_facts_are_shown_for_people(parameters: int, bits: int, shown: str) -> None:
    facts = Facts("x", int(parameters), bits, 1)
    assert facts.parameter_size == shown
    assert facts.quantization == ("BF16" if bits == 16 else f"{bits}-bit")
