"""How a model in training does on the held-out set: exactly right answers, and how its experts are used.

An answer counts if the most likely token is the expected one at every position, given the expected ones before
it: then greedy decoding writes exactly that answer. Thinking is included, so another way to the same answer counts
as a mistake here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from . import forward
from .corpus import Dialogue
from .data import Encoder
from .heldout import PATH

ROWS = 64


class HeldOut:
    """The held-out questions as token rows, longest last."""

    def __init__(self, tokenizer: Tokenizer, most: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.records = [json.loads(line) for line in PATH.read_text().splitlines()][:most]
        encoder = Encoder(tokenizer)
        texts = [
            encoder.render(Dialogue(r["task"], [*r["messages"], r["expected"]], r["thinking"], r["tools"]))
            for r in self.records
        ]
        self.rows = []
        for ids, weights in encoder.encode(texts):
            # Only the last thing said is asked for: after the last position that belongs to a prompt.
            answer = weights == 1
            begin = np.flatnonzero(~answer[: np.flatnonzero(answer)[-1]])[-1] + 1
            answer[:begin] = False
            self.rows.append((ids, answer))
        self.order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i][0]))

    @torch.no_grad()
    def evaluate(
        self, config: Any, weights: forward.Weights, device: str, dtype: torch.dtype
    ) -> tuple[dict[str, Any], list[str]]:
        """Figures, and a description of every mistake."""
        right: dict[str, list[bool]] = defaultdict(list)
        used = torch.zeros(config.num_hidden_layers, config.num_experts, device=device)
        mistakes, tokens_seen, loss_sum, answer_tokens = [], 0, 0.0, 0
        for begin in range(0, len(self.order), ROWS):
            chosen = self.order[begin : begin + ROWS]
            length = -(-max(len(self.rows[i][0]) for i in chosen) // 64) * 64
            tokens = np.zeros((len(chosen), length), np.int64)
            answer = np.zeros((len(chosen), length), bool)
            real = np.zeros((len(chosen), length), bool)
            for row, i in enumerate(chosen):
                ids, mask = self.rows[i]
                tokens[row, : len(ids)], answer[row, : len(ids)], real[row, : len(ids)] = ids, mask, True
            t, a, r = (torch.from_numpy(x).to(device) for x in (tokens, answer, real))
            logits, routing = forward.logits(config, weights, t, torch.zeros_like(t), dtype)
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), t[:, 1:].flatten(), reduction="none"
            )
            loss_sum += float((loss * a[:, 1:].flatten()).sum())
            answer_tokens += int(a.sum())
            for layer, routed in enumerate(routing):
                used[layer] += torch.bincount(
                    routed.picked[r.flatten()].flatten(), minlength=config.num_experts
                )
            tokens_seen += int(r.sum())
            guesses = logits[:, :-1].argmax(-1)
            wrong = ((guesses != t[:, 1:]) & a[:, 1:]).cpu().numpy()
            guesses = guesses.cpu().numpy()
            for row, i in enumerate(chosen):
                task = self.records[i]["task"]
                right[task].append(not wrong[row].any())
                if wrong[row].any():
                    mistakes.append(self._mistake(i, tokens[row], guesses[row], answer[row], wrong[row]))
        share = used / tokens_seen
        total = [ok for oks in right.values() for ok in oks]
        called = [ok for task, oks in right.items() if "call" in task for ok in oks]
        figures = {
            "exact": sum(total) / len(total),
            "exact_calls": sum(called) / max(1, len(called)),
            "answer_loss": loss_sum / answer_tokens,
            "most_used_expert": float(share.max()),
            "unused_experts": float((used == 0).float().mean()),
            "tasks": {task: round(sum(oks) / len(oks), 3) for task, oks in sorted(right.items())},
        }
        return figures, mistakes

    def _mistake(
        self, i: int, tokens: np.ndarray, guesses: np.ndarray, answer: np.ndarray, wrong: np.ndarray
    ) -> str:
        record = self.records[i]
        at = int(np.flatnonzero(wrong)[0]) + 1
        begin = int(np.flatnonzero(answer)[0])
        before = self.tokenizer.decode(tokens[begin:at].tolist(), skip_special_tokens=False)
        guess = self.tokenizer.decode([int(guesses[at - 1])], skip_special_tokens=False)
        expected = self.tokenizer.decode(tokens[at : at + 12].tolist(), skip_special_tokens=False)
        question = record["messages"][-1]["content"]
        return (
            f"{i} {record['task']}{'' if record['thinking'] else ' (not thinking)'}, {int(wrong.sum())} wrong\n"
            f"  asked: {question!r}\n  after: {before!r}\n  wrote: {guess!r}\n  not:   {expected!r}\n"
        )
