"""Answers kept to a grammar are valid, whatever a model would rather say and however short it is kept."""

from __future__ import annotations

import json
import random
from typing import Any

import mlx.core as mx
import pytest
from fakes import FakeCache, FakeModel, make_checkpoint, tokenizer
from tokenizers import AddedToken

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from mlx_flashmoe.errors import RequestError  # noqa: E402
from mlx_flashmoe.generate import stream_generate  # noqa: E402
from mlx_flashmoe.grammar import Constrainer  # noqa: E402
from mlx_flashmoe.sampling import make_sampler  # noqa: E402
from mlx_flashmoe.tokenizer import Tokenizer  # noqa: E402
from mlx_flashmoe.tools import Syntax, Thinking, ToolCall, parse_answer  # noqa: E402
from mlx_flashmoe.tools.syntaxes import (  # noqa: E402
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    DEEPSEEK_V32,
    GLM,
    HARMONY,
    HERMES,
    KIMI,
    MINIMAX,
)

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


# Marks in values

PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "write>",
        "</function>",
        "<parameter=",
        "path>",
        "</parameter>",
    ),
    *("\n", "\n", " ", "x", '"', "é", "{", "}", "\\", "\n</parameter>\n", "\n</parameter>\n</function>\n"),
]
WRITE = tool("write", {"path": TEXT, "content": TEXT, "size": INT, "note": TEXT}, ["path", "content"])


class WishfulModel(FakeModel):
    """Wants to say a text, and after it any marks."""

    def __init__(self, text: str, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.wishes = TOKENIZER.encode(text)

    def step(self, token: int, cache: FakeCache) -> mx.array:
        if not self.wishes:
            self.wishes = TOKENIZER.encode("".join(self.rng.choices(PIECES, k=4)))
        logits = mx.random.normal([self.vocab])
        logits[self.wishes.pop(0)] = 30.0
        return logits


def forced(constrainer: Constrainer, model: FakeModel, offered: list[Any], max_tokens: int = 400) -> str:
    constraint = constrainer.constraint(max_tokens, tools=offered)
    steps = stream_generate(
        model,
        constrainer.tokenizer,
        [5],
        max_tokens,
        sampler=make_sampler(temp=1.0),
        logits_processors=[constraint],
    )
    return "".join(step.text for step in steps)


def in_tags(content: str) -> str:
    return (
        f"<tool_call>\n<function=write>\n<parameter=path>\na\n</parameter>\n<parameter=content>\n{content}\n"
        "</parameter>\n</function>\n</tool_call>"
    )


@pytest.mark.parametrize(
    "content",
    [
        'mark = "</parameter>"\n',
        "A block ends with </tool_call> alone.",
        "</parameter></parameter>\n</parameter>\nx",
        "<tool_call>\n<function=write>",
        "see <parameter=size> and </function>",
        "",
    ],
)
def test_a_forced_call_holds_marks_in_tags(constrainer: Constrainer, content: str) -> None:
    model = WishfulModel(in_tags(content) + "<|im_end|>", random.Random(0))
    (call,) = parse_answer(forced(constrainer, model, [WRITE]), [WRITE])
    assert isinstance(call, ToolCall) and call.arguments == {"path": "a", "content": content}


@pytest.mark.parametrize(
    "content", ["x\n</parameter>\n</function>\n</tool_call>", in_tags("x"), "\n<parameter=size>\n"]
)
def test_a_forced_call_holds_everything_in_json(constrainer: Constrainer, content: str) -> None:
    call = {"name": "write", "arguments": {"path": "a", "content": content}}
    text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    (read,) = parse_answer(
        forced(constrainer, WishfulModel(text + "<|im_end|>", random.Random(0)), [WRITE]), [WRITE]
    )
    assert isinstance(read, ToolCall) and read.arguments == call["arguments"]


def test_what_is_let_through_is_read_back(constrainer: Constrainer) -> None:
    for seed in range(12):
        mx.random.seed(seed)
        model = WishfulModel(in_tags("x").partition("x")[0], random.Random(seed))
        text = forced(constrainer, model, [WRITE], 300)
        check_calls(parse_answer(text, [WRITE]), [WRITE])


@pytest.mark.parametrize(
    "syntax",
    [GLM, MINIMAX, DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, KIMI, HARMONY, HERMES],
    ids=lambda s: s.name,
)
def test_every_syntax_has_forced_calls(syntax: Syntax) -> None:
    inner = make_checkpoint.build_tokenizer()
    inner.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in syntax.marks])
    marked = Tokenizer(inner, special_tokens={"eos_token": "<|im_end|>"})
    marked.__dict__["tool_syntax"] = syntax
    assert marked.vocab_size <= RandomModel.vocab
    offered = [TOOLS[0], TOOLS[5]]
    for seed in range(2):
        text, finish = answer(Constrainer(marked, RandomModel.vocab), 230, seed, tools=offered)
        check_calls(parse_answer(text, offered, syntax=syntax), offered)
        assert finish == "stop"


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
