"""Tool calls read by us and by mlx-lm's parsers: the same. The first calls are the ones its own tests publish."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

qwen3_coder = pytest.importorskip("mlx_lm.tool_parsers.qwen3_coder")
json_tools = pytest.importorskip("mlx_lm.tool_parsers.json_tools")

from mlx_flashmoe.tools import Syntax, ToolCall, parse_answer  # noqa: E402
from mlx_flashmoe.tools.syntaxes import GLM, KIMI, MINIMAX  # noqa: E402


def tool(name: str, /, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TOOLS = [
    tool("multiply", a="number", b="number"),
    tool("get_current_temperature", location="str"),
    tool("search", filters="object", tags="array"),
    tool("schedule", name="string", deadline="string"),
    tool("log", msg="string"),
]


def ours(body: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    (call,) = parse_answer(f"<tool_call>{body}</tool_call>", tools)
    assert isinstance(call, ToolCall), "not understood as a call"
    return {"name": call.name, "arguments": call.arguments}


@pytest.mark.parametrize(
    "body",
    [
        "<function=multiply>\n<parameter=a>\n12234585\n</parameter>\n<parameter=b>\n48838483920\n</parameter>\n"
        "</function>",
        "<function=get_current_temperature>\n<parameter=location>\nLondon\n</parameter>\n</function>",
        "<function=search><parameter=filters>{'category': 'books', 'in_stock': True}</parameter>"
        "<parameter=tags>['fiction', 'new']</parameter></function>",
        '<function=search><parameter=filters>{"category": "books"}</parameter>'
        '<parameter=tags>["fiction", "new"]</parameter></function>',
        "<function=schedule>\n<parameter=name>\ndeploy\n</parameter>\n<parameter=deadline>\n"
        "2025-06-15T10:30:00Z\n</parameter>\n</function>",
        "<function=log>\n<parameter=msg>\nversion 3.10.5-beta\n</parameter>\n</function>",
    ],
)
def test_published_calls_in_tags(body: str) -> None:
    assert ours(body, TOOLS) == qwen3_coder.parse_tool_call(body, TOOLS)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "multiply", "arguments": {"a": 12234585, "b": 48838483920}}',
        '{"name": "get_current_temperature", "arguments": {"location": "London"}}',
    ],
)
def test_published_calls_in_json(body: str) -> None:
    assert ours(body, TOOLS) == json_tools.parse_tool_call(body, TOOLS)


WORDS = st.text(alphabet="ab1 .-<>/\n\"'", max_size=12).filter(lambda t: "</" not in t)
VALUES = {
    "string": WORDS,
    "integer": st.integers(-(2**53), 2**53).map(str),
    "number": st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    "boolean": st.sampled_from(["true", "false", "True", "False"]),
    "array": st.lists(WORDS | st.integers() | st.booleans() | st.none(), max_size=3).flatmap(
        lambda v: st.sampled_from([json.dumps(v), repr(v)])
    ),
    "object": st.dictionaries(WORDS, st.integers() | WORDS, max_size=3).map(json.dumps),
    "absent": WORDS,
}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(sorted(VALUES)), max_size=4), st.data())
def test_any_call_in_tags(kinds: list[str], data: st.DataObject) -> None:
    types = {f"p{i}": kind for i, kind in enumerate(kinds) if kind != "absent"}
    body = "".join(
        f"<parameter=p{i}>\n{data.draw(VALUES[kind])}\n</parameter>\n" for i, kind in enumerate(kinds)
    )
    tools = [tool("f", **types)]
    body = f"\n<function=f>\n{body}</function>\n"
    assert ours(body, tools) == qwen3_coder.parse_tool_call(body.strip(), tools)


# Other syntaxes. Bodies are what mlx-lm cuts out between its marks.

EXAMPLES = [
    ("glm47", GLM, "multiply<arg_key>a</arg_key><arg_value>12</arg_value><arg_key>b</arg_key><arg_value>4</arg_value>"),
    ("glm47", GLM, "get_current_temperature\n<arg_key>location</arg_key>\n<arg_value>London</arg_value>\n"),
    ("glm47", GLM, 'search\n<arg_key>filters</arg_key>\n<arg_value>{"in_stock": true}</arg_value>\n'),
    ("minimax_m2", MINIMAX, '\n<invoke name="multiply">\n<parameter name="a">12</parameter>\n'
     '<parameter name="b">4.5</parameter>\n</invoke>\n'),
    ("minimax_m2", MINIMAX, '\n<invoke name="search">\n<parameter name="tags">["a", "b"]</parameter>\n</invoke>\n'),
    ("kimi_k2", KIMI, '<|tool_call_begin|>functions.multiply:0<|tool_call_argument_begin|>{"a": 12, "b": 4}'
     "<|tool_call_end|>"),
    ("kimi_k2", KIMI, "<|tool_call_begin|>functions.log:3<|tool_call_argument_begin|> {} <|tool_call_end|>"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "syntax", "body"), EXAMPLES)
def test_calls_in_other_syntaxes(module: str, syntax: Syntax, body: str) -> None:
    theirs = pytest.importorskip(f"mlx_lm.tool_parsers.{module}")
    text = theirs.tool_call_start + body + theirs.tool_call_end
    calls = theirs.parse_tool_call(body, TOOLS)
    calls = calls if isinstance(calls, list) else [calls]
    ours = [e for e in parse_answer(text, TOOLS, syntax=syntax) if isinstance(e, ToolCall)]
    assert [(c.name, c.arguments) for c in ours] == [(c["name"], c["arguments"]) for c in calls]
