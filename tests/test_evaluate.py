"""eval: figures checked against ones computed another way, and judgements of answers written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fakes import HashModel, ScriptedModel, make_checkpoint, tokenizer

from mlx_flashmoe import convert
from mlx_flashmoe.cli import main
from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.evaluate import (
    CONTEXT,
    Question,
    answer_questions,
    evaluate_text,
    judge,
    read_questions,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "nights": {"type": "integer"},
                    "options": {"type": "object", "properties": {"tags": {"type": "array"}}},
                },
                "required": ["place"],
            },
        },
    }
]


def question(content: str = "", arguments: dict[str, Any] | None = None, tools: Any = TOOLS) -> Question:
    calls = [{"type": "function", "function": {"name": "book", "arguments": arguments}}] if arguments else []
    expected = {"role": "assistant", "content": content, "tool_calls": calls}
    return Question("task", True, tools, [{"role": "user", "content": "?"}], expected)


def call(**arguments: str) -> str:
    inside = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function=book>\n{inside}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("arguments", "answer", "right", "valid"),
    [
        ({"place": "Rome"}, call(place="Rome"), True, True),
        ({"place": "Rome"}, "thoughts\n</think>\n\n" + call(place="Rome"), True, True),
        ({"place": "Rome", "nights": 2}, call(nights="2", place="Rome"), True, True),
        ({"place": "Rome", "nights": 1}, call(place="Rome", nights="true"), False, False),
        ({"place": "Rome"}, call(place="Roma"), False, True),
        ({"place": "Rome"}, call(nights="2"), False, False),  # a required one is missing
        ({"place": "Rome"}, call(place="Rome", hotel="x"), False, False),  # an unknown one
        ({"place": "Rome"}, call(place="Rome", options='{"tags": 1}'), False, False),  # a wrong type, nested
        ({"place": "Rome"}, call(place="Rome") + "\n" + call(place="Rome"), False, True),
        ({"place": "Rome"}, call(place="Rome").replace("book", "look"), False, False),
        ({"place": "Rome"}, call(place="Rome")[:-40], False, False),
        ({"place": "Rome"}, "Rome", False, False),
    ],
)
def test_calls_are_judged(arguments: dict[str, Any], answer: str, right: bool, valid: bool) -> None:
    verdict = judge(question(arguments=arguments), answer, thinking="</think>" in answer)
    assert verdict.called and (verdict.right, verdict.valid) == (right, valid)


def test_text_is_judged_without_the_thinking() -> None:
    asked = question("It is 12.")
    assert judge(asked, "7 + 5\n</think>\n\nIt is 12.", thinking=True).right
    assert judge(asked, "It is 12.", thinking=False).right
    assert not judge(asked, "It is 13.", thinking=False).right
    assert not judge(asked, "It is 12.\n\n" + call(place="Rome"), thinking=False).right
    assert not judge(asked, "It is 12.", thinking=True).right  # all of it was thought


def test_answers_are_greedy_and_counted() -> None:
    words = tokenizer()
    asked = question("A ship", tools=[])
    prompt = words.apply_chat_template(asked.messages, enable_thinking=True)
    script = [
        *words.encode("so\n</think>\n\nA ship", add_special_tokens=False),
        words.token_id("<|im_end|>"),
    ]
    model: Any = ScriptedModel(len(prompt), script)
    figures = answer_questions(model, words, [asked, question("A boat", tools=[])])
    assert (figures.exact, figures.correct_calls, figures.valid_calls) == (0.5, None, None)
    assert figures.tokens == 2 * len(script) and figures.by_task() == {"task": (1, 2)}


class Uniform:
    """Finds every token equally likely."""

    def make_cache(self) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return mx.zeros((*tokens.shape, HashModel.vocab))


def test_perplexity_and_agreement() -> None:
    words = tokenizer()
    text = 2 * make_checkpoint.TEXT
    ids = words.encode(text, add_special_tokens=False)
    assert len(ids) > CONTEXT + 1
    model: Any = HashModel()
    uniform: Any = Uniform()
    figures = evaluate_text(model, words, text, (uniform, words))
    assert max(model.calls) == CONTEXT and sum(model.calls) == len(ids) - 1

    nats, kl, same = 0.0, 0.0, 0
    for begin in range(0, len(ids) - 1, CONTEXT):
        chunk = ids[begin : begin + CONTEXT + 1]
        logits = np.array(HashModel()(mx.array([chunk[:-1]]), HashModel().make_cache())[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= logprobs[np.arange(len(chunk) - 1), chunk[1:]].sum()
        kl += (-np.log(768) - logprobs).mean(-1).sum()
        same += int((logits.argmax(-1) == 0).sum())
    count = len(ids) - 1
    assert figures.tokens == count and figures.nats == pytest.approx(nats, rel=1e-5)
    assert figures.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert figures.kl == pytest.approx(kl / count, rel=1e-4) and figures.top1 == same / count
    assert figures.bytes == len(text.encode()) - len(words.decode(ids[:1]).encode())


def test_what_is_not_a_question_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    good = json.dumps(vars(question("x")))
    for bad in ("{", "{}", "[]", good.replace('"content": "x"', '"text": "x"')):
        file.write_text(good + "\n" + bad + "\n")
        with pytest.raises(RequestError, match="line 2"):
            read_questions(str(file))
    file.write_text("")
    with pytest.raises(RequestError, match="no questions"):
        read_questions(str(file))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint.write_checkpoint(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "model", q_bits=4)
    (tmp_path / "text").write_text(make_checkpoint.TEXT[:300])
    figures = tmp_path / "figures.json"
    arguments = ["eval", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text")]
    assert main([*arguments, "--against", str(tmp_path / "model"), "--json", str(figures)]) == 0
    assert "perplexity" in capsys.readouterr().out
    report = json.loads(figures.read_text())
    assert report["text"]["kl"] == pytest.approx(0, abs=1e-6) and report["text"]["top1"] == 1
    experts = report["experts"]
    assert (
        experts["tokens"] == report["text"]["tokens"] and len(experts["most_used"]) == make_checkpoint.LAYERS
    )
    assert all(
        make_checkpoint.ACTIVE_EXPERTS / make_checkpoint.EXPERTS <= s <= 1 for s in experts["most_used"]
    )
    assert main(arguments[:3]) == 2
    assert "--text" in capsys.readouterr().err
