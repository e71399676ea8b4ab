"""Every syntax: what its template writes is read back, however it is cut, and the template tells which one it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tool_values import check_deltas, joined, tool
from tokenizers import AddedToken

from fakes import make_checkpoint  # isort: skip
from mlx_flashmoe.chat_template import ChatTemplate
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import (
    QWEN,
    AnswerParser,
    Event,
    Syntax,
    Text,
    Thinking,
    ToolCall,
    parse_answer,
    syntax_of,
)
from mlx_flashmoe.tools.syntaxes import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    DEEPSEEK_V32,
    GLM,
    HARMONY,
    HERMES,
    KIMI,
    MINIMAX,
)

# How each family's template writes text and calls, in short. "c" is a call's function.
TEMPLATES: dict[str, tuple[Syntax, str]] = {
    "qwen": (
        QWEN,
        "{{ said }}{% for c in calls %}\n<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments | items %}"
        "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>{% endfor %}",
    ),
    "hermes": (
        HERMES,
        '{{ said }}{% for c in calls %}\n<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}",
    ),
    "glm": (
        GLM,
        "{{ said }}{% for c in calls %}\n<tool_call>{{ c.name }}{% for k, v in c.arguments | items %}\n"
        "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}\n"
        "</tool_call>{% endfor %}",
    ),
    "minimax": (
        MINIMAX,
        '{{ said }}\n<minimax:tool_call>\n{% for c in calls %}<invoke name="{{ c.name }}">\n'
        '{% for k, v in c.arguments | items %}<parameter name="{{ k }}">{{ v if v is string else v | tojson }}'
        "</parameter>\n{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>",
    ),
    "deepseek-v3": (
        DEEPSEEK_V3,
        "{{ said }}<｜tool▁calls▁begin｜>{% for c in calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.name }}\n"
        "```json\n{{ c.arguments | tojson }}\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>",
    ),
    "deepseek-v3.1": (
        DEEPSEEK_V31,
        "{{ said }}<｜tool▁calls▁begin｜>{% for c in calls %}<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>"
        "{{ c.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>",
    ),
    "deepseek-v3.2": (
        DEEPSEEK_V32,
        '{{ said }}\n\n<｜DSML｜function_calls>\n{% for c in calls %}<｜DSML｜invoke name="{{ c.name }}">\n'
        '{% for k, v in c.arguments | items %}<｜DSML｜parameter name="{{ k }}" string="{{ \'true\' if v is string '
        "else 'false' }}\">{{ v if v is string else v | tojson }}</｜DSML｜parameter>\n{% endfor %}"
        "</｜DSML｜invoke>\n{% endfor %}</｜DSML｜function_calls>",
    ),
    "kimi": (
        KIMI,
        "{{ said }}<|tool_calls_section_begin|>{% for c in calls %}<|tool_call_begin|>functions.{{ c.name }}:"
        "{{ loop.index0 }}<|tool_call_argument_begin|>{{ c.arguments | tojson }}<|tool_call_end|>{% endfor %}"
        "<|tool_calls_section_end|>",
    ),
    "harmony": (
        HARMONY,
        "{% if said %}<|channel|>commentary<|message|>{{ said }}<|end|><|start|>assistant{% endif %}"
        "{% for c in calls %}{{ '' if loop.first else '<|start|>assistant' }}<|channel|>commentary to=functions."
        "{{ c.name }} <|constrain|>json<|message|>{{ c.arguments | tojson }}<|call|>{% endfor %}",
    ),
}
ALL = pytest.mark.parametrize("family", sorted(TEMPLATES))

STRINGS = st.lists(
    st.sampled_from(
        [
            *(
                "<tool_call>",
                "</tool_call> x",
                "</arg_value> x",
                "</parameter> x",
                "</invoke> x",
                "<|call|>",
                "```",
            ),
            *("x", "é", "😀", " ", "\n", '"', "\\", "{", "}", "<", "</｜DSML｜", "function_calls>"),
        ]
    ),
    max_size=8,
).map("".join)
KINDS = {
    "string": STRINGS,
    "integer": st.integers(),
    "boolean": st.booleans(),
    "array": st.lists(STRINGS | st.integers() | st.none(), max_size=3),
    "object": st.dictionaries(st.text(max_size=5), STRINGS | st.floats(0, 1), max_size=3),
}
TOOLS = [tool("get_weather", place="string", days="integer"), tool("now")]


def rendered(family: str, said: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    template = ChatTemplate(TEMPLATES[family][1], {})
    return template.render([], said=said, calls=[{"name": name, "arguments": args} for name, args in calls])


def cut(text: str, offered: list[Any], syntax: Syntax, places: list[int]) -> list[Event]:
    parser = AnswerParser(offered, False, syntax)
    events: list[Event] = []
    for start, end in zip([0, *places], [*places, len(text)]):
        events += parser.feed(text[start:end])
    return joined(events + parser.finish())


@ALL
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_the_template_writes_is_read_back(family: str, data: st.DataObject) -> None:
    kinds = data.draw(st.dictionaries(st.sampled_from(["a", "b_c", "d"]), st.sampled_from(sorted(KINDS))))
    offered = [tool("f", **kinds), tool("g.h", **kinds)]
    arguments = st.fixed_dictionaries({}, optional={key: KINDS[kind] for key, kind in kinds.items()})
    calls = data.draw(st.lists(st.tuples(st.sampled_from(["f", "g.h"]), arguments), min_size=1, max_size=3))
    said = data.draw(st.sampled_from(["", "I look."]))
    text = rendered(family, said, calls)
    events = cut(text, offered, TEMPLATES[family][0], sorted(data.draw(st.sets(st.integers(0, len(text))))))
    assert [(e.name, e.arguments) for e in events if isinstance(e, ToolCall)] == calls
    assert [e for e in events if isinstance(e, Text)] == ([Text(said)] if said else [])
    check_deltas(events)


@ALL
def test_a_call_that_never_ends_is_none_and_other_names_are_text(family: str) -> None:
    syntax = TEMPLATES[family][0]
    text = rendered(family, "", [("get_weather", {"place": "Oslo", "days": 3})])
    for length in range(text.index("Oslo") + 4):
        parser = AnswerParser(TOOLS, False, syntax)
        events = parser.feed(text[:length]) + parser.finish()
        assert not any(isinstance(event, ToolCall) for event in events)
        kept = parse_answer(text[:length], TOOLS, syntax=syntax)
        assert family == "harmony" or "".join(e.text for e in kept) == text[:length].strip()
    other = text.replace("get_weather", "get_news")
    assert not any(isinstance(e, ToolCall) for e in parse_answer(other, TOOLS, syntax=syntax))


@ALL
def test_strings_are_shown_while_they_are_written(family: str) -> None:
    text = rendered(family, "", [("get_weather", {"place": "Oslo, where it rains"})])
    parser = AnswerParser(TOOLS, False, TEMPLATES[family][0])
    begun = parser.feed(text[: text.index("rains")])
    assert '"place": "Oslo, where' in "".join(e.text for e in begun if hasattr(e, "text"))
    assert parser.in_call


@ALL
def test_the_template_tells_the_syntax(family: str) -> None:
    syntax, template = TEMPLATES[family]
    assert syntax_of(template) is syntax


def test_a_template_that_says_nothing_is_read_in_both_forms_of_qwen() -> None:
    assert syntax_of("{{ messages }}") is QWEN


def test_harmony_has_thinking_in_a_channel() -> None:
    text = (
        "<|channel|>analysis<|message|>I should look.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"place": "<|end|>"}<|call|>'
    )
    whole = [Thinking("I should look."), Text("Wait."), ("get_weather", {"place": "<|end|>"})]
    for size in (1, 2, 5, len(text)):
        events = cut(text, TOOLS, HARMONY, list(range(0, len(text), size)))
        check_deltas(events)
        shown = [(e.name, e.arguments) if isinstance(e, ToolCall) else e for e in events]
        assert [e for e in shown if isinstance(e, tuple | Text | Thinking)] == whole
    final = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>"
    )
    assert parse_answer(final, TOOLS, syntax=HARMONY) == [Thinking("Hm."), Text("Hi.")]
    assert parse_answer(final, None, syntax=HARMONY) == [Thinking("Hm."), Text("Hi.")]
    swapped = "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}"
    assert parse_answer(swapped, TOOLS, syntax=HARMONY) == [ToolCall("now", {}, swapped)]


@ALL
def test_the_marks_are_seen_where_they_are_special_tokens(family: str) -> None:
    syntax, template = TEMPLATES[family]
    inner = make_checkpoint.build_tokenizer()
    inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in syntax.marks])
    tokenizer = Tokenizer(inner, chat_templates={"default": template})
    assert tokenizer.tool_syntax is syntax
    text = rendered(family, "Hm.", [("get_weather", {"place": "Oslo"})])
    detokenizer = tokenizer.detokenizer
    pieces = [detokenizer.add_token(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finalize() == text


def test_json_escapes_are_whole_characters_however_they_are_cut() -> None:
    values = {"place": 'é😀\\"\n\u2028', "days": 2}
    text = f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(values)}}}</tool_call>'
    for size in (1, 2, 3, 5, 7):
        events = cut(text, TOOLS, HERMES, list(range(0, len(text), size)))
        check_deltas(events)
        assert [e.arguments for e in events if isinstance(e, ToolCall)] == [values]
    half = text.replace("\\ude00", "")
    assert [e.arguments["place"][1] for e in parse_answer(half, TOOLS) if isinstance(e, ToolCall)] == ["?"]
