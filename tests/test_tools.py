"""Tool calls found in answers: both forms, values by schema, and text that is no call."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe.tools import (
    AnswerParser,
    CallDelta,
    CallStart,
    Event,
    Text,
    Thinking,
    ToolCall,
    parse_answer,
)


def tool(name: str, properties: dict[str, Any], **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", {"place": {"type": "string"}, "days": {"type": "integer"}})


def written(name: str, **values: str) -> str:
    """A call as Qwen3.5's chat template writes it."""
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def joined(events: list[Event]) -> list[Any]:
    """Neighbouring pieces of text as one, calls as (name, arguments)."""
    out: list[Any] = []
    for event in events:
        if isinstance(event, CallStart | CallDelta):
            continue
        if isinstance(event, ToolCall):
            out.append((event.name, event.arguments))
        elif out and type(out[-1]) is type(event):
            out[-1] = type(event)(out[-1].text + event.text)
        else:
            out.append(event)
    return out


def one_value(text: str, schema: Any, **root: Any) -> Any:
    (call,) = parse_answer(written("f", x=text), [tool("f", {} if schema is None else {"x": schema}, **root)])
    assert isinstance(call, ToolCall)
    return call.arguments["x"]


# Parts of an answer


def test_an_answer_in_all_its_parts() -> None:
    text = (
        "I should look.\n</think>\n\nLet me see.\n\n"
        + written("weather", place="Zürich\n<b>", days="3")
        + "\n"
        + '<tool_call>\n{"name": "weather", "arguments": {"place": "3", "days": 1}}\n</tool_call>\n'
    )
    assert joined(parse_answer(text, [WEATHER], thinking=True)) == [
        Thinking("I should look."),
        Text("Let me see."),
        ("weather", {"place": "Zürich\n<b>", "days": 3}),
        ("weather", {"place": "3", "days": 1}),
    ]


def test_text_is_out_before_a_call_is_whole_and_a_call_when_it_is() -> None:
    parser = AnswerParser([WEATHER])
    assert parser.feed("Look: <tool") == [Text("Look:")]
    assert parser.feed("s> and <tool_call> in text") == [Text(" <tools> and <tool_call> in text")]
    call = written("weather", days="2")
    assert parser.feed("\n" + call) == [CallStart("weather"), CallDelta("{")]
    # Another call settles that this one has ended; else, the end of the answer does.
    settled = [CallDelta('"days": 2'), CallDelta("}"), ToolCall("weather", {"days": 2}, call)]
    assert parser.feed("\n" + call) == [*settled, CallStart("weather"), CallDelta("{")]
    assert parser.feed("\n") == []
    assert parser.finish() == settled


def test_text_after_a_call_keeps_its_distance() -> None:
    text = f"  a\n\n{written('weather')}\n\nb\n"
    assert parse_answer(text, [WEATHER])[::2] == [Text("  a"), Text("\n\nb")]


def test_without_tools_nothing_is_a_call() -> None:
    text = written("weather", place="here")
    assert joined(parse_answer(text)) == [Text(text)]


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "\n",
        "weather",
        "<function=nothing></function>",
        "<function=weather></function> and more",
        "<function=></function>",
        "<function=weather>here</function>",
        '{"name": "weather", "arguments": {"place": }}',
        '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "arguments": "here"}',
        '{"name": "", "arguments": {}}',
        '{"name": 1}',
        '{"name": "weather", "arguments": {"days": NaN}}',
        pytest.param('{"name": "weather", "arguments": {"place": ' + "[" * 100_000, id="deep"),
    ],
)
def test_a_malformed_call_is_text_and_the_next_one_a_call(inside: str) -> None:
    text = f"<tool_call>{inside}</tool_call>"
    assert joined(parse_answer(text + written("weather"), [WEATHER])) == [Text(text), ("weather", {})]


def test_a_call_cut_short() -> None:
    text = written("weather", place="here")
    for length in range(1, len(text)):
        events = joined(parse_answer(text[:length], [WEATHER]))
        whole = length >= text.index("</function>") + len("</function>")
        assert events == [("weather", {"place": "here"}) if whole else Text(text[:length].rstrip())]


def test_values_may_look_like_the_form() -> None:
    place = "<parameter=x>\n1\n</parameter> </function> <tool_call> {"
    assert joined(parse_answer(written("weather", place=place, days="1"), [WEATHER])) == [
        ("weather", {"place": place, "days": 1})
    ]


# Types of values


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "42", "42"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, ' "quoted"\n\n', ' "quoted"\n\n'),
        ({"type": "integer"}, "42", 42),
        ({"type": "integer"}, " 42.0 ", 42),
        ({"type": "integer"}, "123456789012345678901", 123456789012345678901),
        ({"type": "integer"}, "4.5", 4.5),  # wrong, and left for the caller to see
        ({"type": "integer"}, "many", "many"),
        ({"type": "integer"}, '"4"', '"4"'),
        ({"type": "number"}, "4.5", 4.5),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-1e999", -sys.float_info.max),
        ({"type": "integer"}, "9" * 5000, int(sys.float_info.max)),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "null"}, "null", None),
        ({"type": "integer"}, "null", None),
        ({"type": "array"}, '["a", 1, {"b": null}]', ["a", 1, {"b": None}]),
        ({"type": "object"}, "{'a': (1, True), 2: '\\d'}", {"a": [1, True], "2": "\\d"}),
        ({"type": "object"}, '{"a": "line\nbreak"}', {"a": "line\nbreak"}),
        ({"type": "object"}, "{1, 2}", "{1, 2}"),
        ({"type": "object"}, r'{"a": "\ud800"}', {"a": "?"}),
        pytest.param({"type": "array"}, "[" * 100_000, "[" * 100_000, id="deep"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "7", 7),
        ({"type": ["string", "integer"]}, "true", "true"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "array"}, {"$ref": "#/$defs/N"}]}, "7", 7),
        ({"$ref": "#/$defs/N"}, "7.0", 7),
        ({"$ref": "#/$defs/loop"}, "7", "7"),
        ({"$ref": "#/nowhere/else"}, "7", "7"),
        ({"allOf": [{"type": "boolean"}]}, "true", True),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"type": "int"}, "1", 1),
        ({"type": "whatever"}, "word", "word"),
        ({"type": 3, "anyOf": 4, "enum": 5}, "1", "1"),
        ({}, "1", "1"),
        (None, "1", "1"),
        (None, "Null", None),
        (7, "1", "1"),
    ],
)
def test_a_value_gets_its_type_from_the_schema(schema: Any, text: str, value: Any) -> None:
    got = one_value(text, schema, **{"$defs": {"N": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}})
    assert (type(got), got) == (type(value), value)


# The schema and its values, and the value as the chat template writes it.
VALUES = st.one_of(
    st.tuples(st.just("string"), st.text(max_size=20)),
    st.tuples(st.just("integer"), st.integers()),
    st.tuples(st.just("number"), st.floats(allow_nan=False, allow_infinity=False)),
    st.tuples(st.just("boolean"), st.booleans()),
    st.tuples(st.just("null"), st.none()),
    st.tuples(st.just("array"), st.lists(st.text(max_size=5) | st.integers(), max_size=3)),
    st.tuples(
        st.just("object"), st.dictionaries(st.text(max_size=5), st.none() | st.floats(0, 1), max_size=3)
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b_c", "x1"]), VALUES), st.booleans())
def test_what_the_template_writes_is_read_back(parameters: dict[str, tuple[str, Any]], as_json: bool) -> None:
    arguments = {key: value for key, (_, value) in parameters.items()}
    offered = [tool("f", {key: {"type": kind} for key, (kind, _) in parameters.items()})]
    if as_json:
        text = f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>"
    else:
        text = written("f", **{k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()})
    assert joined(parse_answer(text, offered)) == [("f", arguments)]


# Any text, cut anywhere

PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter="),
        *(
            "f>",
            "x>",
            "\n",
            " ",
            "</parameter>",
            '{"name": "f"',
            ', "arguments": {',
            "}",
            '"x": 1',
            "1",
            "é",
            "<",
        ),
        *(written("f", x="1"), '<tool_call>{"name": "f"}</tool_call>'),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.booleans(), st.data())
def test_no_text_is_lost_however_it_is_cut(text: str, thinking: bool, data: st.DataObject) -> None:
    offered = [tool("f", {"x": {"type": "integer"}})]
    whole = parse_answer(text, offered, thinking)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parser = AnswerParser(offered, thinking)
    events = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        events += parser.feed(text[start:end])
    events += parser.finish()
    if not parser.unfinished:
        assert joined(events) == joined(whole)

    rest = text.lstrip()
    if thinking or rest.startswith("<think>"):
        rest = rest.removeprefix("" if thinking else "<think>").replace("</think>", "", 1)
    kept = "".join(event.text for event in whole)
    assert "".join(kept.split()) == "".join(rest.split())
    shown = [event.text for event in events if not isinstance(event, CallStart | CallDelta)]
    assert len("".join([*"".join(shown).split(), *parser.cut_text.split()])) == len("".join(rest.split()))


def test_the_time_is_that_of_the_text() -> None:
    start = time.perf_counter()
    parse_answer("<tool_call>{" * 20_000, [WEATHER])
    parse_answer(
        "<tool_call><function=f>" + "<parameter=x></parameter> " * 20_000 + "</tool_call>", [WEATHER]
    )
    assert time.perf_counter() - start < 5
