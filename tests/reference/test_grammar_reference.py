"""A checkpoint with random weights, which has no idea of tools, calls them 500 times without a mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from mlx_flashmoe import convert, load, stream_generate  # noqa: E402
from mlx_flashmoe.grammar import Constrainer  # noqa: E402
from mlx_flashmoe.sampling import make_sampler  # noqa: E402
from mlx_flashmoe.tools import Thinking, ToolCall, parse_answer  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]
from make_checkpoint import write_checkpoint  # noqa: E402
from test_grammar import TOOLS  # noqa: E402


def test_500_of_500_required_calls_are_valid(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "model", q_bits=2, q_group_size=32)
    model, tokenizer = load(tmp_path / "model")
    constrainer = Constrainer(tokenizer, model.vocab_size)
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    prompt = tokenizer.encode("Call something.")
    mx.random.seed(0)
    calls = answers = 0
    while calls < 500:
        # One tool or a choice of all, with and without thinking, in few tokens and in many.
        thinking = answers % 4 == 0
        offered = TOOLS if answers % 3 == 0 else [TOOLS[answers % len(TOOLS)]]
        max_tokens = 220 if TOOLS[2] in offered else 130
        constraint = constrainer.constraint(max_tokens, tools=offered, thinking=thinking)
        text = "".join(
            step.text
            for step in stream_generate(
                model,
                tokenizer,
                prompt,
                max_tokens,
                sampler=make_sampler(temp=1.0),
                logits_processors=[constraint],
            )
        )
        found = [e for e in parse_answer(text, offered, thinking) if not isinstance(e, Thinking)]
        assert found, text
        for call in found:
            assert isinstance(call, ToolCall), text
            jsonschema.validate(call.arguments, schemas[call.name])
        calls += len(found)
        answers += 1
    print(f"{calls} calls in {answers} answers")
