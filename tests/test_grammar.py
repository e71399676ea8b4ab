"""Answers kept to a grammar are valid, whatever a model would rather say and however short it is kept."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest
from fakes import FakeCache, FakeModel, tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from mlx_flashmoe.errors import RequestError  # noqa: E402
from mlx_flashmoe.generate import stream_generate  # noqa: E402
from mlx_flashmoe.grammar import Constrainer  # noqa: E402
from mlx_flashmoe.sampling import make_sampler  # noqa: E402
from mlx_flashmoe.tools import Thinking, ToolCall, parse_answer  # noqa: E402

TOKENIZER = tokenizer()


class RandomModel(FakeModel):
    """Any token is as likely as any other."""

    def step(self, token: int, cache: FakeCache) -> mx.array:
        return mx.random.normal([self.vocab])


def tool(name: str, properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TEXT, INT = {"type": "string"}, {"type": "integer"}
TOOLS = [
    tool("weather", {"place": TEXT, "days": {"type": "integer", "minimum": 1, "maximum": 14}}, ["place", "days"]),
    tool("nothing", {}, []),
    tool(
        "book",
        {
            "class": {"enum": ["first", "second"]},
            "name": {"type": "string", "minLength": 2, "maxLength": 5},
            "seats": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            "price": {"type": "number"},
            "quiet": {"type": "boolean"},
            "note": {"anyOf": [TEXT, {"type": "null"}]},
            "size": {"type": ["string", "integer"]},
            "unit": {"$ref": "#/$defs/Unit"},
            "person": {"$ref": "#/$defs/Person"},
        },
        ["class", "name", "seats", "unit"],
        **{
            "$defs": {
                "Unit": {"enum": ["m", "km"], "type": "string"},
                "Person": {"type": "object", "properties": {"name": TEXT, "age": INT}, "required": ["age"]},
            }
        },
    ),
    # These cannot be promised in tags, and are called in JSON.
    tool("pattern", {"code": {"type": "string", "pattern": "^[a-c]{3}$"}, "text": TEXT}, ["code", "text"]),
    tool("either", {"x": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "maximum": 3}]}}, ["x"]),
    tool("map", {}, [], additionalProperties={"type": "integer"}, minProperties=1),
    tool("odd <name>", {"a b\n": TEXT}, ["a b\n"]),
]  # fmt: skip


def answer(constrainer: Constrainer, max_tokens: int, seed: int, **what: Any) -> tuple[str, str]:
    """Text and finish reason of a random answer."""
    mx.random.seed(seed)
    constraint = constrainer.constraint(max_tokens, **what)
    steps = list(
        stream_generate(
            RandomModel(),
            constrainer.tokenizer,
            [5, 6],
            max_tokens,
            sampler=make_sampler(temp=1.0),
            logits_processors=[constraint],
        )
    )
    return "".join(step.text for step in steps), str(steps[-1].finish_reason)


def check_calls(events: list[Any], tools: list[dict[str, Any]]) -> None:
    assert events
    for call in events:
        assert isinstance(call, ToolCall), call
        (schema,) = [t["function"]["parameters"] for t in tools if t["function"]["name"] == call.name]
        jsonschema.validate(call.arguments, schema)


@pytest.fixture(scope="module")
def constrainer() -> Constrainer:
    return Constrainer(TOKENIZER, RandomModel.vocab)


@pytest.mark.parametrize("offered", TOOLS, ids=lambda t: t["function"]["name"])
def test_required_calls_are_valid(constrainer: Constrainer, offered: dict[str, Any]) -> None:
    for seed in range(3):
        text, finish = answer(constrainer, 230, seed, tools=[offered], several=bool(seed % 2))
        events = parse_answer(text, [offered])
        check_calls(events, [offered])
        assert finish == "stop"
        assert seed % 2 or len(events) == 1


def test_one_of_several_tools(constrainer: Constrainer) -> None:
    names = set()
    for seed in range(8):
        text, _ = answer(constrainer, 230, seed, tools=TOOLS[:2])
        check_calls(events := parse_answer(text, TOOLS[:2]), TOOLS[:2])
        names |= {event.name for event in events if isinstance(event, ToolCall)}
    assert names == {"weather", "nothing"}


def test_thinking_is_free_and_ends_in_time(constrainer: Constrainer) -> None:
    for seed in range(8):  # 300 tokens of thinking each, of which one in 700 would end the answer
        text, finish = answer(constrainer, 400, seed, tools=TOOLS[:1], thinking=True)
        thinking, *calls = parse_answer(text, TOOLS[:1], thinking=True)
        assert isinstance(thinking, Thinking) and finish == "stop"
        check_calls(calls, TOOLS[:1])


PERSON = {
    "type": "object",
    "properties": {"name": TEXT, "born": {"type": "integer"}, "likes": {"type": "array", "items": TEXT}},
    "required": ["name", "born"],
    "additionalProperties": False,
}


def test_json_of_a_schema(constrainer: Constrainer) -> None:
    for seed, schema in enumerate(
        [PERSON, {"type": "object"}, {"type": "array", "items": PERSON, "minItems": 2}]
    ):
        text, finish = answer(constrainer, 160, seed, schema=schema)
        jsonschema.validate(json.loads(text), schema)
        assert finish == "stop"


def test_json_or_a_call(constrainer: Constrainer) -> None:
    kinds = set()
    for seed in range(8):
        text, _ = answer(constrainer, 160, seed, tools=TOOLS[:2], schema=PERSON)
        if text.startswith("{"):
            jsonschema.validate(json.loads(text), PERSON)
        else:
            check_calls(parse_answer(text, TOOLS[:2]), TOOLS[:2])
        kinds.add(text[0])
    assert kinds == {"{", "<"}


def test_what_cannot_be_kept_to_is_said_before_it_begins(constrainer: Constrainer) -> None:
    with pytest.raises(
        RequestError, match=r"max_tokens is 20, but the shortest answer asked for has \d+ tokens"
    ):
        constrainer.constraint(20, tools=TOOLS[:1])
    with pytest.raises(RequestError, match=r"cannot be kept to the schema: .*unevaluatedProperties"):
        constrainer.constraint(100, schema={"type": "object", "unevaluatedProperties": {"type": "string"}})
    circle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    with pytest.raises(RequestError, match="cannot be kept to the schema"):
        answer(constrainer, 500, 0, tools=[tool("f", {"x": {"$ref": "#/$defs/a"}}, ["x"], **circle)])
