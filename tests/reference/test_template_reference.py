"""The chat template of the Qwen3.5 family, rendered by us and by transformers: byte for byte the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from mlx_flashmoe.errors import RequestError  # noqa: E402
from mlx_flashmoe.tokenizer import Tokenizer  # noqa: E402

DATA = Path(__file__).parents[3] / "shared" / "data" / "qwen3.5-397b-a17b"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Look <up> the "weather" & more – in °C',
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["place"],
        },
    },
}
SYSTEM = {"role": "system", "content": "  You are brief.\n"}
USER = {"role": "user", "content": "How is the weather in Zürich?"}
CALL = {
    "role": "assistant",
    "content": "Let me see.",
    "reasoning_content": "A tool fits.",
    "tool_calls": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "arguments": {"place": "Zürich <b>", "days": 3, "x": [1, None, {"a": 0.5}]},
            },
        },
        {"type": "function", "function": {"name": "get_weather", "arguments": {}}},
    ],
}
RESULTS = [{"role": "tool", "content": '{"sky": "blue"}'}, {"role": "tool", "content": "cold"}]
ANSWER = {"role": "assistant", "content": "<think>\nIt is blue.\n</think>\n\nBlue and cold."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "tomorrow?"}]}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "no generation prompt": ([SYSTEM, USER], {"add_generation_prompt": False}),
    "thinking off": ([USER], {"enable_thinking": False}),
    "thinking on": ([USER], {"enable_thinking": True}),
    "parts": ([PARTS], {}),
    "several turns": ([SYSTEM, USER, ANSWER, PARTS], {}),
    "thinking kept": ([SYSTEM, USER, ANSWER, PARTS], {"preserve_thinking": True}),
    "tools": ([USER], {"tools": [WEATHER]}),
    "tools and system": ([SYSTEM, USER], {"tools": [WEATHER, WEATHER]}),
    "tool call": ([USER, CALL], {"tools": [WEATHER], "add_generation_prompt": False}),
    "tool results": ([USER, CALL, *RESULTS], {"tools": [WEATHER]}),
    "after the tools": ([SYSTEM, USER, CALL, *RESULTS, ANSWER, PARTS], {"tools": [WEATHER]}),
    "call without text": ([USER, {**CALL, "content": ""}, RESULTS[0]], {"tools": [WEATHER]}),
    "call without thinking": ([USER, {k: v for k, v in CALL.items() if k != "reasoning_content"}], {}),
    "empty": ([{"role": "user", "content": ""}], {}),
    "special text": ([{"role": "user", "content": "{{ 1 + 1 }} {% raw %} <|im_end|> \u2028 \t\n"}], {}),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    if not DATA.is_dir():
        pytest.skip(f"the published chat template is not here: no {DATA}")
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "chat_template.jinja").write_bytes((DATA / "chat_template.jinja").read_bytes())
    settings = json.loads((DATA / "tokenizer_config.json").read_text())
    # The vocabulary is not among the data; what renders a template does not depend on it.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = tokenizers.decoders.ByteLevel()
    vocabulary.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    vocabulary.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_as_transformers_does(both: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = both
    messages, options = CONVERSATIONS[name]
    options = {"add_generation_prompt": True, **options}
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert ours.apply_chat_template(messages, tokenize=False, **options) == expected
    ids = theirs.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
    mine = ours.apply_chat_template(messages, **options)
    if name == "special text":  # there, a message's text becomes special tokens
        end = ours.token_id("<|im_end|>")
        assert ours.decode(mine) == expected and mine.count(end) == ids.count(end) - 1
    else:
        assert mine == ids


@pytest.mark.parametrize(
    "messages",
    [[SYSTEM], [USER, SYSTEM], [{"role": "robot", "content": "x"}], [{"role": "user", "content": 3}]],
)
def test_refuses_what_transformers_refuses(
    both: tuple[Tokenizer, Any], messages: list[dict[str, Any]]
) -> None:
    ours, theirs = both
    with pytest.raises(Exception) as expected:
        theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(RequestError) as actual:
        ours.apply_chat_template(messages, tokenize=False)
    assert str(expected.value) in str(actual.value)


TEMPLATES = [
    "{%- for m in messages %}\n  {%- if loop.first %}\n{{ m | tojson }}\n  {%- endif %}\n{% endfor %}\n",
    "  {% for m in messages %}\n    {# note #}\n  {{ m.role }}\n  {% break %}\n{% endfor %}\n end\n",
    "{{ messages | tojson(indent=2) }}|{{ {'é': '</b>'} | tojson(ensure_ascii=True, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':')) }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ dict(a=1) | items | list }}",
    "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_environment_is_the_one_transformers_gives(both: tuple[Tokenizer, Any], template: str) -> None:
    ours, theirs = both
    mine = Tokenizer(
        ours._tokenizer, special_tokens=ours.special_tokens, chat_templates={"default": template}
    )
    messages = [SYSTEM, USER]
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert mine.apply_chat_template(messages, add_generation_prompt=False, tokenize=False) == expected
