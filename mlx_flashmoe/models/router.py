"""Routers: from a gate's logits, the experts that a token uses and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import gpu
from mlx_flashmoe.kernels import router as softmax_kernel

TINY = 1e-20  # keeps weights finite where all sigmoids of a token are 0


class Gate(nn.Module):
    """x [..., D] -> logits [..., E], computed in float32: ``Model.keep_float32`` keeps the parameters so.

    The parameters are never quantized: near-equal scores decide which experts a token uses.

    Args:
        corrected: has ``e_score_correction_bias`` [E], which the router adds to the scores.
    """

    def __init__(self, dims: int, count: int, corrected: bool):
        super().__init__()
        self.weight = mx.zeros((count, dims))
        if corrected:
            self.e_score_correction_bias = mx.zeros((count,))

    @staticmethod
    def holds(path: str) -> bool:
        """Whether a parameter of a model is a gate's."""
        return path.endswith((".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"))

    @staticmethod
    def activation_bytes(dims: int, count: int) -> int:
        """Bytes that a prompt's token takes for its choice, beyond what every router's takes."""
        return 4 * dims + 3 * 4 * count  # the input in float32; scores corrected, and within groups

    def __call__(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32) @ self.weight.T


@dataclass(frozen=True)
class Router:
    """The ``active`` experts with the highest scores, out of ``count``.

    The correction is that of Wang et al., "Auxiliary-Loss-Free Load Balancing" (arXiv:2408.15664); groups are those
    of DeepSeek-V3 (arXiv:2412.19437).

    Attributes:
        normalize: the chosen experts' weights are made to sum to 1; else they are their scores.
        scoring: of logits. Softmax is over all experts.
        corrected: the gate has a bias that is added to the scores for the choice, not for the weights.
        groups: equal groups of experts. A group counts as much as its two best experts together.
        chosen_groups: groups that a token's experts come from.
        scaling: all weights are multiplied by it, after they are normalized.
    """

    count: int
    active: int
    normalize: bool
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    groups: int = 1
    chosen_groups: int = 1
    scaling: float = 1.0

    def make_gate(self, dims: int) -> nn.Module:
        """The module that gives the logits, from x [..., dims].

        A plain softmax's is computed in the activations' dtype, as the models that have one do, and may be quantized.
        """
        if self._plain:
            return nn.Linear(dims, self.count, bias=False)
        return Gate(dims, self.count, self.corrected)

    def __call__(self, logits: mx.array, correction: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """The experts of each token.

        Args:
            logits: [..., count]; the scores are computed in float32.
            correction: [count], if ``corrected``.

        Returns:
            integer ids [..., active], ascending on the CPU, and float32 weights [..., active].
        """
        if self._plain:
            ids, weights = softmax_kernel.route(logits, self.active, self.normalize)
        else:
            logits = logits.astype(mx.float32)
            softmax = self.scoring == "softmax"
            scores = mx.softmax(logits, axis=-1) if softmax else mx.sigmoid(logits)
            ids = self._choose(scores if correction is None else scores + correction)
            weights = mx.take_along_axis(scores, ids, axis=-1)
            if self.normalize:
                weights = weights / (weights.sum(axis=-1, keepdims=True) + TINY)
        return ids, weights if self.scaling == 1 else weights * self.scaling

    def check_kernels(self, language: gpu.Language, dtype: mx.Dtype) -> None:
        """Compares the kernel that serves the router on a GPU, before it is needed."""
        if self._plain:
            softmax_kernel.right(language, dtype, self.count, self.active, self.normalize)

    @property
    def _plain(self) -> bool:
        """Whether the choice is that of the softmax kernel."""
        return self.scoring == "softmax" and not self.corrected and self.groups == 1

    def _choose(self, scores: mx.array) -> mx.array:
        """The ids of the best scores [..., count] within the best groups."""
        if self.groups > 1:
            grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
            best = mx.topk(grouped, 2, axis=-1).sum(axis=-1)
            unchosen = self.groups - self.chosen_groups
            if unchosen:
                out = mx.argpartition(best, kth=unchosen - 1, axis=-1)[..., :unchosen, None]
                grouped = mx.put_along_axis(grouped, out, mx.array(-mx.inf, mx.float32), axis=-2)
            scores = grouped.reshape(scores.shape)
        # Ascending: the order in which a prompt's experts are added up.
        best = mx.argpartition(scores, kth=-self.active, axis=-1)[..., -self.active :]
        return mx.sort(best, axis=-1)
