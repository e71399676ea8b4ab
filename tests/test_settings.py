"""Settings of a request: by every name, in every form, kept to or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashmoe.sampling import picking
from mlx_flashmoe.server import settings
from mlx_flashmoe.server.engine import Ask, Engine
from mlx_flashmoe.server.errors import ApiError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OTHER = {"type": "array", "items": {"type": "integer"}}


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, {}),
        ({"temperature": None, "top_k": None, "seed": None, "logit_bias": None}, {}),
        ({"temperature": 0.7}, {"temp": 0.7}),
        ({"temperature": 0}, {"temp": 0}),
        ({"top_p": 0.95}, {"top_p": 0.95}),
        ({"top_p": 0, "top_k": 40}, {"top_k": 1}),
        ({"top_p": -1}, {"top_p": 1.0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"min_p": -1}, {"min_p": 0}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"seed": 2**64 + 5}, {"seed": 5}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": -2},
            {"presence_penalty": 1.5, "frequency_penalty": -2},
        ),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repetition_penalty": 0}, {"repetition_penalty": 1}),
        ({"repeat_last_n": 64}, {"repetition_context_size": 64}),
        ({"repetition_context_size": -1}, {"repetition_context_size": -1}),
        ({"repeat_penalty": 1.1, "repeat_last_n": 0}, {"repetition_penalty": 1}),
        ({"logit_bias": {}}, {}),
        ({"logit_bias": {"5": 3, "12": -100}}, {"logit_bias": {5: 3, 12: -100}}),
    ],
)
def test_sampling_by_every_name(body: dict[str, Any], asked: dict[str, Any]) -> None:
    assert settings.sampling(body) == asked
    picking(**settings.sampling(body))  # which is what the arguments are for


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 7.0}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, 9),
        ({"max_tokens": 7, "max_completion_tokens": None}, 7),
        ({"max_output_tokens": 10**12}, 10**12),
        ({"n_predict": 3}, 3),
        ({"num_predict": -2}, None),
    ],
)
def test_a_limit_by_every_name(body: dict[str, Any], limit: int | None) -> None:
    assert settings.max_tokens(body) == limit


ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


@pytest.mark.parametrize(
    ("body", "variables"),
    [
        ({}, {}),
        ({"enable_thinking": False}, OFF),
        ({"enable_thinking": True}, ON),
        ({"thinking": {"type": "disabled"}}, OFF),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ON),
        ({"thinking": {"type": "adaptive"}}, ON),
        ({"thinking": False}, OFF),
        ({"think": True}, ON),
        ({"think": "low"}, {**ON, "reasoning_effort": "low"}),
        ({"think": ""}, {}),
        ({"reasoning_effort": "none"}, OFF),
        ({"reasoning_effort": "minimal"}, {**ON, "reasoning_effort": "minimal"}),
        ({"reasoning_effort": "high"}, {**ON, "reasoning_effort": "high"}),
        ({"reasoning": {"effort": "none"}}, OFF),
        ({"reasoning": {"effort": "medium", "summary": "auto"}}, {**ON, "reasoning_effort": "medium"}),
        ({"reasoning": {"effort": "high", "enabled": False}}, {**OFF, "reasoning_effort": "high"}),
        ({"reasoning": {"enabled": False}}, OFF),
        ({"reasoning": {}}, {}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"chat_template_kwargs": {"enable_thinking": False, "x": 1}}, {**OFF, "x": 1}),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, ON),
        ({"reasoning_effort": "high", "enable_thinking": False}, {**OFF, "reasoning_effort": "high"}),
    ],
)
def test_thinking_by_every_name(body: dict[str, Any], variables: dict[str, Any]) -> None:
    assert settings.thinking(body) == variables


ANY_OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("body", "schema"),
    [
        ({}, None),
        ({"response_format": None, "format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"format": ""}, None),
        ({"text": {"verbosity": "low"}}, None),
        ({"text": "a text"}, None),
        ({"output_config": {"effort": "low"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": OTHER}}, OTHER),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            SCHEMA,
        ),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, SCHEMA),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, SCHEMA),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, SCHEMA),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, SCHEMA),
        ({"text": {"format": {"type": "json_object"}}}, ANY_OBJECT),
        ({"format": "json"}, ANY_OBJECT),
        ({"format": SCHEMA}, SCHEMA),
        ({"guided_json": SCHEMA}, SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
        ({"json_schema": SCHEMA}, SCHEMA),
        ({"json_schema": {}}, {}),
        ({"json_schema": SCHEMA, "guided_json": SCHEMA}, SCHEMA),
    ],
)
def test_a_form_by_every_name(body: dict[str, Any], schema: Any) -> None:
    assert settings.answer_schema(body) == schema


@pytest.mark.parametrize("field", [*settings._GRAMMARS, "response_format", "guided_json", "format"])
@given(value=st.text("abcxyz<>", min_size=1).filter(lambda text: text not in ("json", "text")))
def test_no_form_is_ignored(field: str, value: str) -> None:
    for form in (value, {"type": value}) if field == "response_format" else (value,):
        with pytest.raises(ApiError, match=f"{field}.*not supported"):
            settings.answer_schema({field: form})


@pytest.mark.parametrize(
    ("read", "body", "message"),
    [
        (settings.sampling, {"temperature": "warm"}, 'temperature should be a number .* but is "warm"'),
        (settings.sampling, {"temperature": True}, "temperature"),
        (settings.sampling, {"temperature": -1}, "temperature"),
        (settings.sampling, {"temperature": float("inf")}, "temperature"),
        (settings.sampling, {"top_p": float("nan")}, "top_p"),
        (settings.sampling, {"top_k": 1.5}, "top_k should be a whole number"),
        (settings.sampling, {"top_k": float("inf")}, "top_k"),
        (settings.sampling, {"top_k": -2}, "top_k"),
        (settings.sampling, {"seed": "x"}, "seed"),
        (settings.sampling, {"presence_penalty": 3}, "presence_penalty"),
        (settings.sampling, {"repeat_penalty": -1}, "repeat_penalty"),
        (settings.sampling, {"logit_bias": [[5, 1]]}, "logit_bias should be an object"),
        (settings.sampling, {"logit_bias": {"hello": 1}}, 'logit_bias: "hello" is not a token id'),
        (settings.sampling, {"logit_bias": {"-5": 1}}, "logit_bias"),
        (settings.sampling, {"logit_bias": {"5": 101}}, r"logit_bias\.5 should be .* 100"),
        (settings.sampling, {"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias has 5000 tokens"),
        (settings.max_tokens, {"max_tokens": 0}, "max_tokens should be at least 1, or -1"),
        (settings.max_tokens, {"num_predict": "many"}, "num_predict"),
        (settings.choices, {"n": 0}, "n should be a whole number of at least 1"),
        (settings.choices, {"n": 129}, "n: 129 answers .* not supported"),
        (settings.choices, {"best_of": 2}, "best_of is not supported"),
        (settings.choices, {"n": 2, "best_of": 3}, "best_of is not supported"),
        (settings.stop, {"stop": 5}, "stop should be"),
        (settings.stop, {"stop": ["a", 5]}, "stop should be"),
        (settings.thinking, {"thinking": 5}, "thinking should be"),
        (settings.thinking, {"reasoning": {"effort": {}}}, r"reasoning\.effort should be"),
        (settings.thinking, {"chat_template_kwargs": "x"}, "chat_template_kwargs should be an object"),
        (
            settings.answer_schema,
            {"response_format": {"type": "json_schema"}},
            r"response_format\.schema is missing",
        ),
        (settings.answer_schema, {"response_format": {"type": "xml"}}, '"xml" is not supported'),
        (settings.answer_schema, {"response_format": SCHEMA}, '"object" is not supported'),
        (settings.answer_schema, {"response_format": {"type": "json_object", "schema": 5}}, r"schema is 5"),
        (settings.answer_schema, {"guided_json": "{"}, "guided_json is not JSON"),
        (settings.answer_schema, {"format": 5}, "format"),
        (settings.answer_schema, {"guided_json": SCHEMA, "format": OTHER}, "different forms"),
        (settings.answer_schema, {"structured_outputs": {"regex": "a+"}}, r"structured_outputs\.regex"),
        (settings.tools, {"functions": {"name": "x"}}, "functions should be a list"),
        (settings.tools, {"function_call": 5}, "function_call should be"),
        (settings.check_supported, {"suffix": "x"}, "suffix is not supported"),
        (settings.check_supported, {"modalities": ["text", "audio"]}, "not supported"),
        (settings.check_supported, {"audio": {"voice": "x"}}, "not supported"),
        (settings.check_supported, {"use_beam_search": True}, "use_beam_search is not supported"),
    ],
)
def test_what_is_wrong_is_named(
    read: Callable[[dict[str, Any]], Any], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        read(body)
    assert refused.value.status == 400


def test_what_changes_nothing_is_not_refused() -> None:
    settings.check_supported({"suffix": "", "modalities": ["text"], "audio": None, "use_beam_search": False})
    assert settings.choices({"n": None, "best_of": 1}) == 1
    assert settings.choices({"n": 3, "best_of": 3}, 42) == 3
    assert settings.stop({"stop": None}) == []
    assert settings.stop({"stop": "a"}) == ["a"]
    assert settings.stop({"stop_sequences": ["a", "b"]}) == ["a", "b"]


def test_functions_count_as_tools() -> None:
    function = {"name": "f", "parameters": {}}
    tool = {"type": "function", "function": function}
    assert settings.tools({}) == ([], "auto")
    assert settings.tools({"functions": [function]}) == ([tool], "auto")
    assert settings.tools({"functions": [function], "function_call": "none"}) == ([tool], "none")
    named = {"type": "function", "function": {"name": "f"}}
    assert settings.tools({"functions": [function], "function_call": {"name": "f"}}) == ([tool], named)
    assert settings.tools({"tools": [tool], "tool_choice": "required", "function_call": "none"}) == (
        [tool],
        "required",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *(name for name, *_ in settings._NUMBERS),
    *("top_k", "seed", "logit_bias", "n", "best_of", "stop", "tools", "functions", "function_call"),
    *(*settings.LENGTHS, *settings._WINDOWS, *settings._THINKING, *settings._SCHEMAS, *settings._GRAMMARS),
    *(
        "response_format",
        "text",
        "output_config",
        "output_format",
        "structured_outputs",
        "suffix",
        "modalities",
    ),
    *("audio", "chat_template_kwargs", "use_beam_search"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_no_value_is_more_than_refused(body: dict[str, Any]) -> None:
    for read in (
        settings.sampling,
        settings.max_tokens,
        settings.choices,
        settings.stop,
        settings.thinking,
        settings.answer_schema,
        settings.check_supported,
    ):
        try:
            read(body)
        except ApiError as e:
            assert e.status == 400 and any(field in e.message for field in body)


@pytest.mark.parametrize(
    ("api", "server", "request_", "thinks"),
    [
        (None, None, None, True),  # as the template has it
        (False, None, None, False),
        (None, False, None, False),
        (False, True, None, True),
        (False, True, False, False),
        (False, False, True, True),
    ],
)
def test_thinking_is_as_the_request_says_or_else_the_server_or_else_the_api(
    api: bool | None, server: bool | None, request_: bool | None, thinks: bool
) -> None:
    def variables(think: bool | None) -> dict[str, Any]:
        return {} if think is None else {"enable_thinking": think}

    worker: Any = SimpleNamespace(tokenizer=tokenizer())
    ask = Ask(
        messages=[{"role": "user", "content": "Hi"}],
        template=variables(request_),
        template_default=variables(api),
    )
    engine = Engine(worker, "model", {}, variables(server))
    assert worker.tokenizer.opens_thinking(engine.tokens(ask)) is thinks
