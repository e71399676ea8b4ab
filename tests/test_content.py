"""Messages and tools of any client, as text that any checkpoint's template renders."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from fakes import tokenizer
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from mlx_flashmoe.chat_template import ChatTemplate, fit, map_text
from mlx_flashmoe.server import anthropic_messages, openai_messages
from mlx_flashmoe.server.content import arguments, text, valid
from mlx_flashmoe.server.errors import ApiError
from mlx_flashmoe.server.offered import NO_PARAMETERS, Offered
from mlx_flashmoe.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data" / "qwen3.5-397b-a17b" / "chat_template.jinja"
OWN = Path(__file__).parents[1] / "examples" / "small_moe" / "model" / "chat_template.jinja"

# Kinds of templates that are published: ones that take anything, ones that want user and assistant in turn, and
# ones without a system message.
LENIENT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
IN_TURN = """{% set ns = namespace(last='assistant') %}{% for m in messages %}
{%- if m.role in ('user', 'assistant') and m.role == ns.last %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}
{%- if m.role != 'system' %}{% set ns.last = m.role %}{% endif %}[{{ m.role }}]{{ m.content }}
{% endfor %}"""
WITHOUT_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif
%}[{{ m.role }}]{{ m.content }}
{% endfor %}"""
TEMPLATES = {
    "own": OWN.read_text(),
    "lenient": LENIENT,
    "in turn": IN_TURN,
    "without system": WITHOUT_SYSTEM,
    **({"published": SHARED.read_text()} if SHARED.is_file() else {}),
}


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, ""),
        ("a", "a"),
        ([], ""),
        (["a", {"type": "text", "text": "b"}, None], "ab"),
        ({"type": "text", "text": "a"}, "a"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}, {"text": "c"}], "abc"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "document", "source": {"type": "text", "data": "Minutes."}}], "Minutes.\n\n"),
        (
            [{"type": "document", "title": "T", "source": {"type": "content", "content": [{"text": "a"}]}}],
            "T\na\n\n",
        ),
        (
            [{"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": "aGk="}}],
            "hi\n\n",
        ),
        (
            [
                {
                    "type": "document",
                    "source": {"type": "base64", "media_type": "application/pdf", "data": "x"},
                }
            ],
            "[document application/pdf: only text can be read]\n\n",
        ),
        (
            [{"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,aGk="}],
            "a.txt\nhi\n\n",
        ),
        ([{"type": "file", "file": {"file_id": "f1"}}], "[file f1: only text can be read]\n\n"),
        ([{"type": "search_result", "title": "T", "source": "s", "content": [{"text": "a"}]}], "T s\na\n\n"),
        ([{"type": "tool_reference", "tool_name": "Fetch"}], "The tool Fetch can be called now."),
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            "[image: this model reads text only and cannot see it]",
        ),
        ([{"type": "input_audio"}], "[audio: this model reads text only and cannot see it]"),
        (
            [{"type": "web_search_tool_result", "content": [{"type": "web_search_result"}]}],
            "[web_search_result: not shown]",
        ),
        ([{"type": "text", "text": None}, {"type": "input_text"}], ""),
        ([{"type": "hologram"}], "[hologram: not shown]"),
        ([{}], "[part: not shown]"),
    ],
)
def test_content_of_any_kind_is_text(content: Any, shown: str) -> None:
    assert text(content, "x") == shown


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image", "input_audio", "video_url"])
def test_what_the_user_shows_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ApiError, match=rf"^m\.1: {kind} is not supported: this model reads text only"):
        text([{"type": "text", "text": "a"}, {"type": kind}], "m", refuse_media=True)


def test_only_the_newest_message_is_refused() -> None:
    shown = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(ApiError, match=r"messages\.0\.content\.0"):
        openai_messages.conversation([shown])
    with pytest.raises(ApiError, match=r"messages\.0\.content\.0"):
        anthropic_messages.conversation({"messages": [shown]}, {})
    said = openai_messages.conversation([shown, {"role": "assistant"}, {"role": "user", "content": "b"}])
    assert [m["content"][:7] for m in said] == ["[image:", "", "b"]


@pytest.mark.parametrize(
    ("given_", "read"),
    [
        (None, {}),
        ("", {}),
        (" ", {}),
        ("null", {}),
        ("{}", {}),
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ('{"a": "line\nbreak"}', {"a": "line\nbreak"}),
        (r'{"a": "\ud83d"}', {"a": "\ufffd"}),
        ('{"value": ', {"arguments": '{"value": '}),
        ("[1]", {"arguments": [1]}),
        ("plain", {"arguments": "plain"}),
        (7, {"arguments": 7}),
    ],
)
def test_arguments_in_the_history(given_: Any, read: Any) -> None:
    assert arguments(given_) == read


@given(st.text(st.characters(codec=None), max_size=10))
def test_half_characters_are_replaced_and_nothing_else(said: str) -> None:
    halves = sum(0xD800 <= ord(c) < 0xE000 for c in said)
    got = valid(said)
    got.encode()
    assert got == said if not halves else got.count("\ufffd") >= said.count("\ufffd")
    assert valid("\ud83d\ude00\ud83d") == "😀\ufffd"


def test_messages_of_openais_form() -> None:
    said = openai_messages.conversation(
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": "q", "name": "n"},
            {"role": "assistant", "content": "<think>\nA.\n</think>\n\nB. </think>"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "C.",
                "function_call": {"name": "f", "arguments": "{}"},
            },
            {"role": "function", "name": "f", "content": "r"},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "D."}, {"type": "text", "text": "E."}],
            },
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "function": {"name": None}},
                    {"type": "custom", "custom": {"name": "g", "input": "i"}},
                ],
            },
            {"role": "tool", "content": None},
        ]
    )
    assert said == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "B. </think>", "reasoning_content": "A."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "C.",
            "tool_calls": [{"id": "f", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "f", "content": "r"},
        {"role": "assistant", "content": "E.", "reasoning_content": "D."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "unknown", "arguments": {}}},
                {"type": "function", "function": {"name": "g", "arguments": {"input": "i"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "", "content": ""},
    ]


def test_messages_of_anthropics_form() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": base64.b64encode(b"x").decode()}}
    said, _ = anthropic_messages.conversation(
        {
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
                {"type": "text", "text": "a"},
                "b",
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "T.", "signature": ""},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "I read."},
                        {"type": "server_tool_use", "name": "web_search", "input": {}},
                        {"type": "tool_use", "id": "1", "name": "Read", "input": {"file": "a"}},
                        {"type": "tool_use", "id": "2", "name": "Read", "input": '{"file'},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "2", "content": [image]},
                        {"type": "tool_result", "tool_use_id": "1"},
                        {"type": "text", "text": "<system-reminder>\nR.\n</system-reminder>"},
                        {"type": "text", "text": "Go on."},
                    ],
                },
                {"role": "system", "content": [{"type": "text", "text": "Late."}]},
            ],
        },
        {},
    )
    assert said == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "q\n\nr"},
        {
            "role": "assistant",
            "content": "I read.\n\n[server_tool_use: not shown]",
            "reasoning_content": "T.",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "Read", "arguments": {"file": "a"}}},
                {
                    "id": "2",
                    "type": "function",
                    "function": {"name": "Read", "arguments": {"arguments": '{"file'}},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "\n\n<system-reminder>\nR.\n</system-reminder>"},
        {
            "role": "tool",
            "tool_call_id": "2",
            "content": "[image: this model reads text only and cannot see it]",
        },
        {"role": "user", "content": "Go on."},
        {"role": "system", "content": "Late."},
    ]


@pytest.mark.parametrize(
    ("system", "shown"),
    [
        (f"{anthropic_messages.BILLING} a=1;", None),
        (f"{anthropic_messages.BILLING} a=1;\nYou code.", "You code."),
        (
            [
                {"type": "text", "text": f"{anthropic_messages.BILLING} a=1;"},
                {"type": "text", "text": "You code."},
            ],
            "You code.",
        ),
        (
            f"You code.\n{anthropic_messages.BILLING} quoted",
            f"You code.\n{anthropic_messages.BILLING} quoted",
        ),
        (None, None),
    ],
)
def test_the_line_that_changes_with_every_request_is_left_out(system: Any, shown: str | None) -> None:
    said, _ = anthropic_messages.conversation(
        {"system": system, "messages": [{"role": "user", "content": "q"}]}, {}
    )
    assert said[:-1] == ([{"role": "system", "content": shown}] if shown else [])


def test_deferred_tools_are_told_where_they_are_referred_to() -> None:
    tools = [
        {"name": "ToolSearch", "input_schema": {"type": "object"}},
        {"name": "Fetch", "input_schema": {"type": "object"}, "defer_loading": True},
        {"name": "Unseen", "input_schema": {"type": "object"}, "defer_loading": True},
    ]
    offered = Offered(tools)
    found = [{"type": "tool_reference", "tool_name": name} for name in ("Fetch", "Gone")]
    result = {"type": "tool_result", "tool_use_id": "1", "content": found}
    said, loaded = anthropic_messages.conversation(
        {"messages": [{"role": "user", "content": [result]}]}, offered.deferred
    )
    assert [t["function"]["name"] for t in offered.tools] == ["ToolSearch"]
    assert [t["function"]["name"] for t in loaded] == ["Fetch"]
    description = json.dumps(offered.deferred["Fetch"])
    assert said[0]["content"] == (
        f"This tool can be called now:\n{description}\nThe tool Gone can be called now."
    )
    assert [t["function"]["name"] for t in offered.required(["Fetch"]) or ()] == ["Fetch"]
    # With nothing to find them with, they are tools like any other.
    assert [t["function"]["name"] for t in Offered(tools[1:]).tools] == ["Fetch", "Unseen"]


# Tools


@pytest.mark.parametrize(
    ("tool", "name", "left_out"),
    [
        ({"type": "function", "function": {"name": "f", "parameters": None}}, "f", None),
        ({"type": "function", "name": "f"}, "f", None),
        ({"name": "f", "input_schema": {}}, "f", None),
        ({"type": None, "name": "f", "input_schema": None}, "f", None),
        ({"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}, "f", None),
        ({"type": "web_search_20250305", "name": "web_search", "max_uses": 8}, None, "web_search"),
        ({"type": "web_search"}, None, "web_search"),
        ({"type": "web_search_preview_2025_03_11"}, None, "web_search_preview_2025_03_11"),
        ({"type": "bash_20250124", "name": "bash"}, None, "bash"),
        ({"type": "text_editor_20250728", "name": "e"}, None, "text_editor"),
        ({"type": "custom", "name": "apply_patch", "format": {}}, None, "custom"),
        ({"type": "custom", "custom": {"name": "apply_patch"}}, None, "custom"),
        ({"type": "mcp", "server_url": "x"}, None, "mcp"),
        ({"type": "file_search"}, None, "file_search"),
        ({"type": "function"}, None, "function"),
        ({"type": "function", "function": {"name": 7}}, None, "function"),
        ({"type": "</script> x"}, None, "other"),
        ({}, None, "unnamed"),
    ],
    ids=json.dumps,
)
def test_tools_of_any_kind(tool: Any, name: str | None, left_out: str | None) -> None:
    offered = Offered([tool, None, 7])
    assert [t["function"]["name"] for t in offered.tools] == ([name] if name else [])
    assert dict(offered.left_out) == ({left_out: 1} if left_out else {})
    for made in offered.tools:
        assert made["function"]["parameters"] in (NO_PARAMETERS, {"type": "object"})


def test_custom_tools_are_functions_in_anthropics_api() -> None:
    for tool in (
        {"type": "custom", "name": "f"},
        {"type": "custom", "name": "f", "input_schema": {"type": "object"}},
    ):
        assert [t["function"]["name"] for t in Offered([tool], custom=True).tools] == ["f"]


def test_a_tool_that_was_left_out_cannot_be_required_and_one_that_is_missing_is_an_error() -> None:
    function, search = {"name": "f"}, {"type": "web_search"}
    assert Offered([search]).required(None) is None
    assert Offered([search]).required(["web_search"]) is None
    assert [t["function"]["name"] for t in Offered([search, function]).required(None) or ()] == ["f"]
    for offered, names in ((Offered(None), None), (Offered([function]), ["g"])):
        with pytest.raises(ApiError, match="not among tools"):
            offered.required(names)


# Templates

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


@given(st.lists(ROLES, min_size=1, max_size=8), st.sampled_from(sorted(TEMPLATES)))
def test_any_order_of_roles_is_rendered_in_its_order(roles: list[str], name: str) -> None:
    template = _template(name)
    messages = [{"role": role, "content": f"<{i}>"} for i, role in enumerate(roles)]
    rendered = template.render(fit(messages, template))
    places = [rendered.index(m["content"]) for m in messages]
    assert places == sorted(places)


@given(st.lists(ROLES, min_size=2, max_size=8), st.sampled_from(sorted(TEMPLATES)), st.data())
def test_a_longer_conversation_begins_with_the_shorter_one(
    roles: list[str], name: str, data: st.DataObject
) -> None:
    """Else nothing that is kept of its prompt could be used again."""
    template = _template(name)
    messages = [{"role": role, "content": f"<{i}>"} for i, role in enumerate(roles)]
    cut = data.draw(st.integers(1, len(roles) - 1))
    # Elsewhere the last message becomes longer; and a new question drops the thinking before it.
    new = set(roles[cut:])
    steady = name not in ("own", "published") or new <= {"assistant", "tool"}
    if steady and (roles[cut] == "assistant" or (name == "lenient" and roles[cut] != "system")):
        shorter = template.render(fit(messages[:cut], template), add_generation_prompt=False)
        longer = template.render(fit(messages, template), add_generation_prompt=False)
        if "user" in roles[:cut]:
            assert longer.startswith(shorter.removesuffix("<|im_end|>\n"))


def test_a_conversation_that_a_template_takes_is_left_as_it_is() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "r", "tool_call_id": "x"},
    ]
    for name in TEMPLATES:
        if name != "without system":
            assert fit(messages, _template(name)) == messages


def test_reminders_stand_where_they_were_said() -> None:
    template = _template("own")
    late = [
        {"role": "user", "content": "q"},
        {"role": "system", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "r"},
        {"role": "system", "content": "two"},
        {"role": "system", "content": " "},
    ]
    reminder = "<system-reminder>\n{}\n</system-reminder>"
    assert [(m["role"], m["content"]) for m in fit(late, template)] == [
        ("user", "q"),
        ("user", reminder.format("one")),
        ("assistant", ""),
        ("tool", f"r\n\n{reminder.format('two')}"),
    ]


# Special tokens

MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|im_",
    "start|>",
    "\ufdd0",
    "\ufdd1",
    "system\n",
    "é ",
]


@given(st.lists(st.sampled_from(MARKS), max_size=8).map("".join), st.sampled_from(["own", "published"]))
def test_text_never_becomes_special_tokens(said: str, name: str) -> None:
    if name not in TEMPLATES:
        return
    made = Tokenizer(tokenizer()._tokenizer, special_tokens={}, chat_templates={"default": TEMPLATES[name]})
    tools = [{"type": "function", "function": {"name": "f", "description": said, "parameters": {said: said}}}]

    def conversation(said: str) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": said},
            {"role": "user", "content": said},
            {
                "role": "assistant",
                "content": said,
                "tool_calls": [{"function": {"name": "f", "arguments": {"x": said}}}],
            },
            {"role": "tool", "content": said},
        ]

    ids = made.apply_chat_template(conversation(f"a{said}z"), tools)
    plain = made.apply_chat_template(conversation("az"), map_text(tools, lambda t: t if t != said else ""))
    for mark in MARKS[:4]:
        assert ids.count(made.token_id(mark)) == plain.count(made.token_id(mark))
    expected = made.apply_chat_template(conversation("a\0z"), tools, tokenize=False).replace(
        "a\0z", f"a{said}z"
    )
    assert made.decode(ids) == expected


def test_the_last_message_can_be_continued() -> None:
    made = tokenizer()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is <|im_end|> b"}]
    shown = made.decode(made.apply_chat_template(messages, continue_final_message=True))
    assert shown.endswith("It is <|im_end|> b") and shown.count("assistant\n") == 1
    assert (
        made.apply_chat_template(messages, continue_final_message=True).count(made.token_id("<|im_end|>"))
        == 1
    )


_TEMPLATES: dict[str, ChatTemplate] = {}


def _template(name: str) -> ChatTemplate:
    if name not in _TEMPLATES:
        _TEMPLATES[name] = ChatTemplate(TEMPLATES[name], {})
    return _TEMPLATES[name]
