"""What fewer bits an expert and fewer experts a token cost: a table of a trained checkpoint's quality.

    python -m examples.small_moe.quality_table small-moe quality

Writes ``quality.md`` and ``quality.json``. ``small-moe`` is the checkpoint in bfloat16, as training leaves it.
Only the experts have the bits of a row; everything else has 4, as in the model that is published.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mlx_flashmoe import convert, load
from mlx_flashmoe.evaluate import Question, answer_questions, evaluate_text, read_questions
from mlx_flashmoe.tokenizer import Tokenizer

from .heldout import PATH
from .quantize import BITS as DENSE_BITS
from .quantize import GROUP_SIZE

BITS = (8, 4, 3, 2)
ACTIVE = (8, 6, 4, 3, 2)


def text_of(questions: list[Question], tokenizer: Tokenizer) -> str:
    """The held-out dialogues as one text, expected answers included."""
    return "".join(
        tokenizer.apply_chat_template(
            [*q.messages, q.expected], tools=q.tools, add_generation_prompt=False, tokenize=False
        )
        for q in questions
    )


def measure(folder: Path, active: int, questions: list[Question]) -> dict[str, Any]:
    model, tokenizer = load(folder, active_experts=active)
    text = evaluate_text(model, tokenizer, text_of(questions, tokenizer))
    answers = answer_questions(model, tokenizer, questions)
    return {
        "perplexity": text.perplexity,
        "exact": answers.exact,
        "valid_calls": answers.valid_calls,
        "correct_calls": answers.correct_calls,
        "seconds": answers.seconds,
    }


def row(figures: dict[str, Any]) -> str:
    rates = (
        "-" if figures[rate] is None else f"{100 * figures[rate]:.1f}%"
        for rate in ("exact", "valid_calls", "correct_calls")
    )
    cells = [str(figures["bits"]), str(figures["active"]), f"{figures['perplexity']:.4g}", *rates]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint by bits and active experts.")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder in bfloat16")
    parser.add_argument("out", type=Path, help="path of the files to write, without a suffix")
    parser.add_argument(
        "--limit", type=int, default=200, help="held-out questions to ask (default: %(default)s)"
    )
    parser.add_argument(
        "--active", type=int, nargs="+", default=ACTIVE, help="experts a token (default: 8 6 4 3 2)"
    )
    args = parser.parse_args()
    questions = read_questions(str(PATH))[: args.limit]
    lines = [
        "| bits | active experts | perplexity | exact answers | valid calls | correct calls |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    table: list[dict[str, Any]] = []
    for bits in BITS:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "model"
            convert(
                str(args.checkpoint),
                str(folder),
                q_bits=DENSE_BITS,
                q_group_size=GROUP_SIZE,
                q_bits_gate_up=bits,
                q_bits_down=bits,
            )
            for active in args.active:
                figures = {"bits": bits, "active": active, **measure(folder, active, questions)}
                table.append(figures)
                lines.append(row(figures))
                print(lines[-1], flush=True)
                # After every row: a run takes long, and may be cut short.
                args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
                report = {"questions": len(questions), "group_size": GROUP_SIZE, "rows": table}
                args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
