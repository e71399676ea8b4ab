"""Models that have no idea of tools call them 500 times without a mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from mlx_flashmoe import convert, load, stream_generate
from mlx_flashmoe.grammar import Constrainer
from mlx_flashmoe.sampling import make_sampler
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import Thinking, parse_answer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]
from make_checkpoint import write_checkpoint  # noqa: E402
from test_grammar import TOKENIZER, TOOLS, RandomModel, check_calls  # noqa: E402


def random_checkpoint(folder: Path) -> tuple[Any, Tokenizer]:
    write_checkpoint(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "model", q_bits=2, q_group_size=32)
    return load(folder / "model")


# A model of random weights takes its time for a token; one of random logits is as clueless, and quick.
@pytest.mark.parametrize(
    ("make", "wanted"),
    [(lambda folder: (RandomModel(), TOKENIZER), 500), (random_checkpoint, 25)],
    ids=["500 from random logits", "25 from random weights"],
)
def test_required_calls_are_valid(make: Any, wanted: int, tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path)
    constrainer = Constrainer(tokenizer, getattr(model, "vocab_size", RandomModel.vocab))
    prompt = tokenizer.encode("Call something.")
    mx.random.seed(0)
    calls = answers = 0
    while calls < wanted:
        # One tool or a choice of all, sometimes after thinking, and never with tokens to spare.
        thinking = answers % 8 == 0
        offered = TOOLS if answers % 10 == 0 else [TOOLS[answers % len(TOOLS)]]
        max_tokens = 200 if TOOLS[2] in offered else 90
        constraint = constrainer.constraint(max_tokens, tools=offered, thinking=thinking)
        steps = stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens,
            sampler=make_sampler(temp=1.0),
            logits_processors=[constraint],
        )
        text = "".join(step.text for step in steps)
        found = [e for e in parse_answer(text, offered, thinking) if not isinstance(e, Thinking)]
        check_calls(found, offered)
        calls += len(found)
        answers += 1
        print(f"\r{calls} calls in {answers} answers", end="", flush=True)
