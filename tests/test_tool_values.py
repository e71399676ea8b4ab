"""Values that hold the marks of the form itself, calls that lack a mark, and prose that quotes calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlx_flashmoe.chat_template import ChatTemplate
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

PUBLISHED = Path(__file__).parents[2] / "shared/data/qwen3.5-397b-a17b/chat_template.jinja"
# How Qwen3.5's template writes an answer, for where the published one is not at hand.
OWN = """\
{%- set message = messages[1] %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content }}
{%- for call in message.tool_calls %}
{{- ('\n\n' if message.content else '') if loop.first else '\n' }}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' }}
{%- endfor %}{{- '</function>\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}"""


def tool(name: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


TOOLS = [tool("write", path="string", text="string"), tool("fetch", url="string"), tool("now")]
FETCH = "<tool_call>\n<function=fetch>\n<parameter=url>\nhttps://x\n</parameter>\n</function>\n</tool_call>"
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


def write(text: str) -> str:
    return (
        f"<tool_call>\n<function=write>\n<parameter=path>\na\n</parameter>\n<parameter=text>\n{text}\n</parameter>\n"
        "</function>\n</tool_call>"
    )


def read(text: str, thinking: bool = False) -> list[Any]:
    """Calls as (name, arguments), the rest as it is."""
    events = joined(parse_answer(text, TOOLS, thinking))
    return [(e.name, e.arguments) if isinstance(e, ToolCall) else e for e in events]


VALUES = [
    "A block ends with </tool_call> alone.",
    FETCH,
    f"Like this:\n{FETCH}\nEnd.",
    f"{FETCH}\n{FETCH}",
    f"{FETCH}\n{FETCH}\n{FETCH}\n{FETCH}\nand so on",
    write("x"),
    write(FETCH),
    f"```\n{FETCH}\n```",
    "<function=g>",
    "see <function=fetch> and <parameter=text>",
    "<tool_call>",
    "x\n</parameter>\n</function>\n</tool_call> y",
    "x\n</parameter>\n</function> y",
    "</parameter>",
    'mark = "</parameter>"\n',
    "</function>\n</tool_call>",
    "</tool_call>\n</function>",
    '{"name": "fetch", "arguments": {}}',
    "<think></think>",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("other", ["plain", *VALUES[:4], VALUES[8], VALUES[11]])
def test_a_value_is_whole_whatever_marks_it_holds(value: str, other: str) -> None:
    for texts in ([value], [value, other], [other, value], [other, value, other]):
        answer = "\n".join(write(text) for text in texts)
        assert read(answer) == [("write", {"path": "a", "text": text}) for text in texts]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_before_another_parameter_is_whole(value: str) -> None:
    answer = write("b").replace("\na\n", f"\n{value}\n")
    assert read(answer) == [("write", {"path": value, "text": "b"})]


WHOLE = write("b")
CALL = ("write", {"path": "a", "text": "b"})


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(WHOLE.removeprefix("<tool_call>\n"), id="no opening"),
        pytest.param(WHOLE.replace("a\n</parameter>", "a"), id="first parameter not closed"),
        pytest.param(WHOLE.replace("b\n</parameter>", "b"), id="last parameter not closed"),
        pytest.param(WHOLE.replace("</parameter>\n", ""), id="no parameter closed"),
        pytest.param(WHOLE.replace("</function>\n", ""), id="function not closed"),
        pytest.param(WHOLE.replace("\n</tool_call>", ""), id="call not closed"),
        pytest.param(WHOLE.replace("</parameter>\n</function>\n", ""), id="only the call closed"),
        pytest.param(WHOLE.replace("<tool_call>\n", "").replace("\n</tool_call>", ""), id="function alone"),
        pytest.param(WHOLE.replace("\n", ""), id="on one line"),
    ],
)
def test_a_mark_may_be_missing(answer: str) -> None:
    assert read(answer) == [CALL]
    assert read(f"I look.\n\n{answer}\n") == [Text("I look."), CALL]
    assert read(f"{answer}\n{WHOLE}") == [CALL, CALL]
    assert read(f"{WHOLE}\n{answer}\n{answer}") == [CALL, CALL, CALL]


@pytest.mark.parametrize("length", range(1, WHOLE.index("</function>") + len("</function>")))
def test_what_never_closes_is_no_call(length: int) -> None:
    assert read(WHOLE[:length]) == [Text(WHOLE[:length].rstrip())]
    parser = AnswerParser(TOOLS)
    events = parser.feed(WHOLE[:length]) + parser.finish()
    assert not any(isinstance(event, ToolCall) for event in events)
    assert parser.unfinished == any(isinstance(event, CallStart) for event in events)
    assert parser.cut_text == (WHOLE[:length] if parser.unfinished else "")


def test_a_value_is_not_cut_where_it_quotes_a_call() -> None:
    answer = write(f"Like this:\n{FETCH}\nEn")
    assert read(answer[: answer.index("En") + 2]) == [Text(answer[: answer.index("En") + 2])]


@pytest.mark.parametrize(
    "prose",
    [
        "Write <tool_call><function=NAME></function></tool_call> to call one.",
        "Write <tool_call><function=now></function></tool_call> to call one.",
        f"Write {FETCH} to fetch.",
        f"For example:\n\n```\n{FETCH}\n```\n\nThat is all.",
        f"For example:\n\n```xml\n{FETCH}\n{NOW}\n```",
        FETCH.replace("fetch", "other"),
        '```json\n{"name": "fetch", "arguments": {"url": "x"}}\n```',
        'An object {"name": "fetch", "arguments": {"url": "x"}}.',
        '{"name": "fetch", "arguments": {"url": "x"}}',
        '{"name": "Ann", "age": 3}',
        f"Write {FETCH} or {NOW}, one after another.",
        "The tag <function=now> opens a function and </function> closes it.",
    ],
)
def test_prose_that_quotes_stays_prose(prose: str) -> None:
    assert "".join(e.text for e in parse_answer(prose, TOOLS) if isinstance(e, Text)) == prose
    assert read(f"{prose}\n\n{FETCH}")[-1] == ("fetch", {"url": "https://x"})
    assert sum(not isinstance(e, Text) for e in read(f"{prose}\n\n{FETCH}")) == 1


def test_text_on_the_line_before_a_call_makes_no_prose() -> None:
    call = ("fetch", {"url": "https://x"})
    assert read(f"I look: {FETCH}{FETCH}\n{FETCH}") == [Text("I look:"), call, call, call]
    in_json = '<tool_call>{"name": "fetch", "arguments": {"url": "https://x"}}</tool_call>'
    assert read(f"I look: {in_json}{in_json}\n{FETCH}") == [Text("I look:"), call, call, call]


def test_a_fence_that_stays_open_holds_calls() -> None:
    assert read(f"```\n{FETCH}") == [Text("```"), ("fetch", {"url": "https://x"})]


CALLS_IN_JSON = [
    '<tool_call>\n{"name": "fetch", "arguments": {"url": "</tool_call>\\n<tool_call>{"}}\n</tool_call>',
    '<tool_call>{"arguments": {"url": "</tool_call>\\n<tool_call>{"}, "name": "fetch"}</tool_call>',
    '{"name": "fetch", "arguments": {"url": "</tool_call>\\n<tool_call>{"}}\n</tool_call>',
    '<tool_call>{"name": "fetch", "arguments": "{\\"url\\": \\"</tool_call>\\\\n<tool_call>{\\"}"}</tool_call>',
]


@pytest.mark.parametrize("answer", CALLS_IN_JSON)
def test_json_ends_where_the_object_ends(answer: str) -> None:
    call = ("fetch", {"url": "</tool_call>\n<tool_call>{"})
    assert read(answer) == [call]
    assert read(f"Hm.\n{answer}\n{answer}") == [Text("Hm."), call, call]


# Thinking


def test_thinking_that_never_ends_may_end_in_calls() -> None:
    call = ("fetch", {"url": "https://x"})
    assert read(f"I look.\n\n{FETCH}", thinking=True) == [Thinking("I look."), call]
    assert read(f"I look.\n\n{FETCH}\n{FETCH}\n", thinking=True) == [Thinking("I look."), call, call]
    assert read(f"A\n{FETCH}\nB\n{FETCH}", thinking=True) == [Thinking("A"), call, Thinking("B"), call]


@pytest.mark.parametrize("end", ["\nNo, I will not.", "\n</think>\n\nDone.", " is how."])
def test_a_call_in_thinking_that_continues_is_a_thought(end: str) -> None:
    events = read(f"I could.\n\n{FETCH}{end}", thinking=True)
    thought, _, answer = f"I could.\n\n{FETCH}{end}".partition("\n</think>\n\n")
    assert "".join(e.text for e in events if isinstance(e, Thinking)) == thought
    assert events[1:] == ([Text(answer)] if answer else []) or not answer


@pytest.mark.parametrize("shown", [True, False])
def test_only_its_token_ends_thinking(shown: bool) -> None:
    parser = AnswerParser(TOOLS, thinking=True, think_end_id=7)
    events = []
    for text, token in [
        ("A ", 1),
        ("</think>", 2),
        (" quoted", 3),
        ("</think>" if shown else "", 7),
        ("\nB", 4),
    ]:
        events += parser.feed(text, token)
    events += parser.finish()
    thought = "".join(e.text for e in events if isinstance(e, Thinking))
    assert thought == "A </think> quoted"
    assert [e for e in events if isinstance(e, Text)] == [Text("B")]


# Any values, rendered by the template and cut anywhere

MARKS = [
    *("<tool_call>", "</tool_call>", "<function=write>", "<function=g>", "</function>", "<parameter=path>"),
    *("<parameter=zz>", "</parameter>", "<think>", "</think>", "```", '{"name": "now", "arguments": {}}'),
    *("<arg_key>", "</arg_value>", "<invoke name=", "<|call|>", "｜DSML｜"),
]
WORDS = st.sampled_from(["\n", " ", "x", "é", "😀", "null", "0", '"', "\\", "word"])
PLAIN = st.lists(st.sampled_from(MARKS) | WORDS, max_size=8)


def unread(value: str) -> bool:
    """A value that has lines which are marks reads like the form itself, byte for byte."""
    return not any(line.strip() in MARKS[:8] for line in value.split("\n"))


QUOTING = st.sampled_from(VALUES).flatmap(
    lambda v: st.tuples(st.just("x "), st.just(v), st.just(" y")).map("".join)
)
STRINGS = st.text(max_size=12) | PLAIN.map("".join).filter(unread) | QUOTING
KINDS = {
    "string": STRINGS,
    "integer": st.integers(),
    "boolean": st.booleans(),
    "array": st.lists(st.text(max_size=5) | st.integers(), max_size=3),
}


def joined(events: Sequence[Event]) -> list[Event]:
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text | Thinking | CallDelta) and type(last) is type(event):
            out[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            out.append(event)
    return out


def cut(text: str, offered: list[Any], places: list[int], thinking: bool = False) -> list[Event]:
    parser = AnswerParser(offered, thinking)
    events: list[Event] = []
    for start, end in zip([0, *places], [*places, len(text)]):
        events += parser.feed(text[start:end])
    return joined(events + parser.finish())


def check_deltas(events: list[Event]) -> None:
    """A call is a start, the text of its arguments in pieces, and an end."""
    begun: str | None = None
    written = ""
    for event in events:
        if isinstance(event, CallStart):
            begun, written = event.name, ""
        elif isinstance(event, CallDelta):
            written += event.text
        elif isinstance(event, ToolCall):
            assert begun == event.name
            assert written == json.dumps(event.arguments, ensure_ascii=False)
            begun = None


@pytest.mark.parametrize("source", ["own", "published"])
@settings(max_examples=250, deadline=None)
@given(st.data())
def test_what_the_template_writes_is_read_back(source: str, data: st.DataObject) -> None:
    if source == "published" and not PUBLISHED.is_file():
        pytest.skip("the published template is not here")
    template = ChatTemplate(PUBLISHED.read_text() if source == "published" else OWN, {})
    kinds = data.draw(
        st.dictionaries(st.sampled_from(["path", "text", "n"]), st.sampled_from(sorted(KINDS)), min_size=1)
    )
    offered = [tool("write", **kinds), tool("g", **kinds)]
    arguments = st.fixed_dictionaries({}, optional={key: KINDS[kind] for key, kind in kinds.items()})
    calls = data.draw(st.lists(st.tuples(st.sampled_from(["write", "g"]), arguments), min_size=1, max_size=3))
    said = data.draw(st.sampled_from(["", "I look."]))
    messages = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": said,
            "tool_calls": [{"function": {"name": name, "arguments": values}} for name, values in calls],
        },
    ]
    text = (
        template.render(messages, add_generation_prompt=False)
        .partition("</think>\n\n")[2]
        .removesuffix("<|im_end|>\n")
    )
    events = cut(text, offered, sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20))))
    assert [(e.name, e.arguments) for e in events if isinstance(e, ToolCall)] == calls
    assert [e for e in events if isinstance(e, Text)] == ([Text(said)] if said else [])
    check_deltas(events)


ANY = st.lists(
    st.sampled_from([*MARKS, *VALUES, FETCH, NOW, WHOLE, *CALLS_IN_JSON, "\n", "\n", " ", "x", "<", "a\n"]),
    max_size=14,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(ANY, st.booleans(), st.data())
@example(WHOLE.replace("\n</parameter>", "", 1), False, None)
def test_events_are_the_same_however_the_text_is_cut(
    text: str, thinking: bool, data: st.DataObject | None
) -> None:
    whole = cut(text, TOOLS, [], thinking)
    check_deltas(whole)
    places = sorted(data.draw(st.sets(st.integers(0, len(text))))) if data else list(range(len(text)))
    assume(text)
    assert cut(text, TOOLS, places, thinking) == whole


def test_strings_are_shown_while_they_are_written() -> None:
    parser = AnswerParser(TOOLS)
    shown = []
    for letter in write("One line.\nAnother, with </b> and < and </param>.\nA third."):
        shown += [e.text for e in parser.feed(letter) if isinstance(e, CallDelta)]
    assert json.loads("".join(shown) + '"}') == {
        "path": "a",
        "text": "One line.\nAnother, with </b> and < and </param>.\nA third.",
    }
    assert len(shown) > 40
