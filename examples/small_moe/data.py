"""From dialogues to batches of token rows, made by worker processes while the GPU trains.

A row holds as many whole dialogues as fit, each a segment of its own: the forward pass lets none see another, so
filling rows costs nothing and every dialogue is learned as it will be met, from its first token on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .corpus import dialogue
from .tokenizer import Renderer

LENGTH = 768
# A token of the prompt counts this much of an answer's: enough to learn what text looks like here, and how names
# recur; most of a prompt is random, and cannot be learned.
PROMPT_WEIGHT = 0.1


@dataclass
class Batch:
    """Arrays [rows, LENGTH]: tokens; the segment each belongs to; what predicting it counts in the loss."""

    tokens: np.ndarray
    segments: np.ndarray
    weights: np.ndarray

    @classmethod
    def empty(cls, rows: int) -> Batch:
        return cls(
            np.zeros((rows, LENGTH), np.int16),
            np.full((rows, LENGTH), -2, np.int16),
            np.zeros((rows, LENGTH), np.float32),
        )

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(self.tokens).to(device, non_blocking=True).long()
        segments = torch.from_numpy(self.segments).to(device, non_blocking=True)
        return tokens, segments, torch.from_numpy(self.weights).to(device, non_blocking=True)


class Encoder:
    """Dialogues to token ids, and to what each token counts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.render = Renderer()
        self.think, self.thought, self.end, self.start = (
            tokenizer.token_to_id(t) for t in ("<think>", "</think>", "<|im_end|>", "<|im_start|>")
        )

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and weights of whole dialogues: answers of the model, thinking and the end of the turn included."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [(ids := np.array(e.ids, np.int16), self.weigh(ids)) for e in encodings]

    def weigh(self, ids: np.ndarray) -> np.ndarray:
        """What the model writes stands from ``<think>`` to the end of a turn; the prompt ends with a line break
        after it, or, where thinking is off, after an empty thinking part."""
        weights = np.full(len(ids), PROMPT_WEIGHT, np.float32)
        ends = np.flatnonzero(ids == self.end)
        for begin in np.flatnonzero(ids == self.think):
            begin += 4 if ids[begin + 2] == self.thought else 2
            weights[begin : ends[np.searchsorted(ends, begin)] + 1] = 1
        weights[0] = 0
        return weights


class Rows(IterableDataset):
    """Endless batches; each worker makes every so-many-th dialogue of the corpus."""

    def __init__(self, tokenizer: str, seed: int, rows: int) -> None:
        self.tokenizer, self.seed, self.rows = tokenizer, seed, rows

    def __iter__(self) -> Iterator[Batch]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many workers as processors
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        encoder = Encoder(Tokenizer.from_str(self.tokenizer))
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        batch, used, segments = Batch.empty(self.rows), np.zeros(self.rows, int), np.zeros(self.rows, int)
        while True:
            texts = [encoder.render(dialogue(self.seed, number + stride * i)) for i in range(64)]
            number += stride * 64
            for ids, weights in encoder.encode(texts):
                if len(ids) > LENGTH:
                    continue
                fitting = np.flatnonzero(used + len(ids) <= LENGTH)
                if not len(fitting):
                    waiting.append((ids, weights))
                    # A few that do not fit mean that the batch is nearly full. They begin the next one.
                    if len(waiting) < min(8, self.rows):
                        continue
                    yield batch
                    batch = Batch.empty(self.rows)
                    used[:], segments[:] = 0, 0
                    for again in waiting:
                        self._place(batch, used, segments, 0, *again)
                    waiting = []
                    continue
                self._place(batch, used, segments, fitting[0], ids, weights)

    def _place(
        self,
        batch: Batch,
        used: np.ndarray,
        segments: np.ndarray,
        row: int,
        ids: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        while used[row] + len(ids) > LENGTH:
            row += 1
        at = slice(used[row], used[row] + len(ids))
        batch.tokens[row, at], batch.weights[row, at], batch.segments[row, at] = ids, weights, segments[row]
        used[row] += len(ids)
        segments[row] += 1


def loader(tokenizer: Tokenizer, seed: int, rows: int, workers: int) -> Iterator[Batch]:
    """Batches of ``rows`` rows of the corpus of that seed; the same ones for the same number of workers."""
    dataset = Rows(tokenizer.to_str(), seed, rows)
    return iter(
        DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)
    )
