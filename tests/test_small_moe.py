"""The small model's corpus, held-out set, chat format and tokenizer: what training and eval both build on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from examples.small_moe import heldout, tokenizer
from examples.small_moe.corpus import TASKS, Dialogue, dialogue
from examples.small_moe.corpus.draw import Draw, is_held_out
from examples.small_moe.corpus.tools import KNOWN
from mlx_flashmoe.evaluate import judge, read_questions
from mlx_flashmoe.tools import Thinking, parse_answer

DIALOGUES = 400


@pytest.fixture(scope="module")
def training() -> list[Dialogue]:
    return [dialogue(1, i) for i in range(DIALOGUES)]


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    """The same kind, trained on fewer dialogues: quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "SAMPLE", 200)
        return tokenizer.build()


def test_a_seed_and_a_number_are_a_dialogue(training: list[Dialogue]) -> None:
    # In another order: nothing carries over from one dialogue to the next.
    assert [dialogue(1, i) for i in reversed(range(DIALOGUES))] == training[::-1]
    assert dialogue(2, 0) != dialogue(1, 0) != dialogue(1, 1)
    assert len({json.dumps(d.messages) for d in training}) > 0.95 * DIALOGUES


def test_every_task_can_be_made() -> None:
    for make, _, testing in TASKS:
        for held_out in (False, True) if testing else (False,):
            made = make(Draw(f"{make.__name__} {held_out}", held_out))
            assert made.messages[-1]["role"] == "assistant"


def test_tools_are_on_their_side_of_the_split(training: list[Dialogue]) -> None:
    tested = [dialogue(2026, i, held_out=True) for i in range(DIALOGUES)]

    def names(dialogues: list[Dialogue]) -> set[str]:
        return {tool["function"]["name"] for d in dialogues for tool in d.tools}

    assert len(names(training)) > 100 and len(names(tested)) > 100
    # Everyday tools have names of their own, one of which can be drawn, too; with other parameters.
    assert names(training) & names(tested) <= {known.name for known in KNOWN}
    tools = [{json.dumps(tool) for d in side for tool in d.tools} for side in (training, tested)]
    assert not tools[0] & tools[1]
    questions = [
        {m["content"] for d in side for m in d.messages if m["role"] == "user"} for side in (training, tested)
    ]
    # What is the same in both has nothing of its own in it: a greeting, a question without a name.
    assert len(questions[0] & questions[1]) < 0.05 * len(questions[1])


@pytest.mark.parametrize("kind", ["name", "word"])
def test_names_and_words_are_disjoint(kind: str) -> None:
    drawn = []
    for held_out in (False, True):
        d = Draw(kind, held_out)
        drawn.append({getattr(d, kind)().lower() for _ in range(300)})
        assert all(is_held_out(thing) == held_out for thing in drawn[-1])
    assert not drawn[0] & drawn[1]


def test_the_held_out_file_is_what_the_script_makes() -> None:
    made = [json.dumps(r, ensure_ascii=False) for r in heldout.records()]
    assert heldout.PATH.read_text(encoding="utf-8").splitlines() == made


def answer_of(render: Callable[..., str], message: dict[str, Any], tools: list[dict[str, Any]]) -> str:
    """A message of the model as the template writes it, from where the model begins."""
    asked = [{"role": "user", "content": "?"}]
    prompt = render(asked, tools, add_generation_prompt=True)
    whole = render([*asked, message], tools)
    assert whole.startswith(prompt)
    return whole[len(prompt) :].removesuffix("<|im_end|>\n")


def test_what_the_template_writes_is_parsed_back() -> None:
    questions = read_questions(str(heldout.PATH))
    assert sum(bool(q.calls) for q in questions) > 200
    render = tokenizer.Renderer().render
    for q in questions:
        answer = answer_of(render, q.expected, q.tools)
        verdict = judge(q, answer, thinking=True)
        assert verdict.right and verdict.valid == bool(q.calls), q
        thought = "".join(e.text for e in parse_answer(answer, q.tools, True) if isinstance(e, Thinking))
        assert thought == q.expected.get("reasoning_content", "").strip()


@pytest.mark.parametrize(
    "text",
    [
        "Zürich, 日本語 and 🚀\u200d",
        "12345 + 678 = 13023",
        "  spaces\n\n\tand tabs ",
        '{"a": "\\"\\u00e9"}',
        "\x00\x7fé",
    ],
)
def test_the_tokenizer_gives_text_back(small_tokenizer: Tokenizer, text: str) -> None:
    ids = small_tokenizer.encode(text).ids
    assert small_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids) < tokenizer.VOCABULARY


def test_marks_are_one_token_and_digits_stand_alone(small_tokenizer: Tokenizer) -> None:
    for mark in (*tokenizer.SPECIAL, *tokenizer.MARKS):
        assert len(small_tokenizer.encode(f"a{mark}").ids) == 2
    assert small_tokenizer.encode("1024").tokens == list("1024")


def test_dialogues_survive_the_tokenizer(small_tokenizer: Tokenizer, training: list[Dialogue]) -> None:
    render = tokenizer.Renderer()
    for d in training[:100]:
        text = render(d)
        assert small_tokenizer.decode(small_tokenizer.encode(text).ids, skip_special_tokens=False) == text
