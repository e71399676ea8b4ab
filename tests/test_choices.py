"""Several answers to one request: n, several prompts, echo; in turn, in one place of the queue."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from test_server import metric, running


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as (address, _):
        yield address


def open_request(address: str, path: str, body: dict[str, Any], timeout: float = 60) -> Any:
    request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=timeout)


def post(address: str, path: str, **body: Any) -> Any:
    with open_request(address, path, body) as response:
        return json.load(response)


def refused(address: str, path: str, **body: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        open_request(address, path, body)
    return error.value.code, json.load(error.value)["error"]["message"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def waiting_for(address: str, name: str, value: float) -> None:
    deadline = time.monotonic() + 10
    while metric(address, name) != value:
        assert time.monotonic() < deadline, (name, metric(address, name))
        time.sleep(0.01)


def test_each_prompt_has_n_choices_in_order(address: str) -> None:
    prompts = ["<|im_start|>SAY(a b)<|im_end|><|im_start|>", "<|im_start|>SAY(other)<|im_end|><|im_start|>"]
    single = [post(address, "/v1/completions", prompt=p, max_tokens=20) for p in prompts]
    body = {"prompt": prompts, "n": 2, "max_tokens": 20}
    made = post(address, "/v1/completions", **body)
    assert [(c["index"], c["text"]) for c in made["choices"]] == [
        (0, "a b"),
        (1, "a b"),
        (2, "other"),
        (3, "other"),
    ]
    assert {c["finish_reason"] for c in made["choices"]} == {"stop"}
    for key, each in (("prompt_tokens", 1), ("completion_tokens", 2)):
        assert made["usage"][key] == each * sum(one["usage"][key] for one in single)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with open_request(address, "/v1/completions", {**body, **options}) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert {**chunks.pop()["usage"]} == made["usage"]
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order == sorted(order)
    texts = [
        "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)
    ]
    assert texts == ["a b", "a b", "other", "other"]


def test_choices_of_a_seed_differ_and_are_the_same_again(address: str) -> None:
    # The fake says one thing with certainty; without its tokens every other one is as likely.
    said = post(address, "/tokenize", prompt="Nothing.")["tokens"]
    body = {"prompt": "ab", "max_tokens": 12, "temperature": 1, "logit_bias": {str(t): -20 for t in said}}

    def texts(**changes: int) -> list[str]:
        return [c["text"] for c in post(address, "/v1/completions", **body, **changes)["choices"]]

    first = texts(n=4, seed=7)
    assert first == texts(n=4, seed=7)
    assert len(set(first)) == 4
    assert texts(seed=9) == [first[2]]


def test_conversations_have_choices_too(address: str) -> None:
    made = post(address, "/v1/chat/completions", messages=user("SAY(hello)"), n=3)
    assert [(c["index"], c["message"]["content"]) for c in made["choices"]] == [
        (i, "hello") for i in range(3)
    ]


def test_a_full_queue_does_not_refuse_the_next_choice() -> None:
    with running() as (address, _), ThreadPoolExecutor(10) as pool:

        def ask(text: str, **body: Any) -> list[str]:
            made = post(address, "/v1/chat/completions", messages=user(text), **body)
            return [c["message"]["content"] for c in made["choices"]]

        several = pool.submit(ask, "SLOWLY SAY(one two three four five six)", n=3)
        waiting_for(address, "busy", 1)
        others = [pool.submit(ask, f"SAY({i})") for i in range(8)]
        waiting_for(address, "queue_waiting", 8)
        status, message = refused(address, "/v1/chat/completions", messages=user("SAY(x)"))
        assert (status, message) == (429, "all places in the queue are taken; try again later")
        assert not several.done()
        assert several.result(timeout=30) == ["one two three four five six"] * 3
        assert [other.result(timeout=30) for other in others] == [[str(i)] for i in range(8)]


def test_a_client_that_goes_away_gets_no_more_choices() -> None:
    with running() as (address, _):
        body = {"messages": user("SLOWLY FOREVER SAY(a)"), "n": 100, "max_tokens": 10}
        with pytest.raises(TimeoutError):
            open_request(address, "/v1/chat/completions", body, timeout=1)
        waiting_for(address, "busy", 0)
        counted = metric(address, "generated_tokens_total")
        time.sleep(0.5)
        assert metric(address, "generated_tokens_total") == counted < 100
        assert metric(address, "queue_waiting") == 0


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_with_its_likelihood(address: str, max_tokens: int, stream: bool) -> None:
    tokens = [10, 11, 12, 13]
    body = {"prompt": [tokens], "max_tokens": max_tokens, "echo": True, "logprobs": 2, "stream": stream}
    with open_request(address, "/v1/completions", body) as response:
        text = response.read().decode()
    if stream:
        made = [
            json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")
        ]
    else:
        made = json.loads(text)["choices"]
    said = "".join(choice["text"] for choice in made)
    parts = [choice["logprobs"] for choice in made if choice["logprobs"]]
    names, logprobs, top, offsets = (
        [value for part in parts for value in part[key]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert said == "+,-." + "Nothing."[: len(said) - 4] and len(said) > 3 + bool(max_tokens)
    assert len(names) == 4 + max_tokens and names[:4] == list("+,-.")
    assert (logprobs[0], top[0]) == (None, None)
    # The fake says nothing of what comes within a prompt: all 768 tokens are alike.
    assert logprobs[1:4] == pytest.approx([-6.6438] * 3, abs=1e-3)
    assert all(len(likely) == 2 for likely in top[1:])
    assert offsets[:4] == [0, 1, 2, 3] and made[-1]["finish_reason"] == "length"


def test_echo_without_likelihoods(address: str) -> None:
    made = post(address, "/v1/completions", prompt="SAY", max_tokens=1, echo=True)
    (choice,) = made["choices"]
    assert choice["text"].startswith("SAY") and len(choice["text"]) > 3 and choice["logprobs"] is None
    assert (
        post(address, "/v1/completions", prompt="SAY", max_tokens=0, echo=True)["choices"][0]["text"] == "SAY"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "max_tokens": 0}, "max_tokens should be at least 1"),
        ({"prompt": ["a"] * 129}, "129 answers .* are not supported"),
        ({"prompt": ["a"] * 65, "n": 2}, "130 answers .* are not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of is not supported"),
        ({"prompt": "a", "logit_bias": {"768": 1}}, "768 is not a token id: they are 0 to 767"),
        ({"prompt": "a", "guided_regex": "a+"}, "guided_regex is not supported"),
        ({"prompt": ["a", 5]}, "prompt.1: 5 is not of type 'string'"),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"prompt": []}, "prompt: .*(too short|non-empty)"),
    ],
)
def test_what_is_refused(address: str, body: dict[str, Any], message: str) -> None:
    status, said = refused(address, "/v1/completions", **body)
    assert status == 400 and re.search(message, said), said


def test_the_tokenizer_over_http(address: str) -> None:
    with urllib.request.urlopen(f"{address}/tokenizer_info", timeout=10) as response:
        info = json.load(response)
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    text = "Hello <|im_end|> 你好"
    tokens = post(address, "/tokenize", prompt=text, add_special_tokens=False)
    assert tokens["count"] == len(tokens["tokens"])
    assert post(address, "/detokenize", tokens=tokens["tokens"])["prompt"] == text
    assert refused(address, "/tokenize", text="x")[0] == 400
    assert refused(address, "/detokenize", tokens=[768])[0] == 400
