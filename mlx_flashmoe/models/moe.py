"""Router and routed experts, without and with an expert that every token uses."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.models.fused import plus_gated, swiglu


class Experts(Protocol):
    """What a model asks of a layer's routed experts; see ``StreamedExperts``."""

    def __call__(
        self, x: mx.array, ids: mx.array, weights: mx.array, likely: mx.array | None = None
    ) -> mx.array: ...

    def wants_guess(self, tokens: int) -> bool: ...


class MoE(nn.Module):
    """x [B, T, D] -> [B, T, D]: the ``active`` experts that the router finds most probable for a token.

    Args:
        dims: D.
        count: experts to choose from.
        normalize: the chosen experts' weights are made to sum to 1; else they are their probabilities.
    """

    def __init__(self, dims: int, count: int, experts: Experts, active: int, normalize: bool):
        super().__init__()
        self.gate = nn.Linear(dims, count, bias=False)
        self._experts = experts
        self._active = active
        self._normalize = normalize

    def __call__(self, x: mx.array, likely: mx.array | None = None) -> mx.array:
        """``likely``: a guess at the next layer's ids, or None."""
        ids, weights = self.route(x)
        return self._experts(x, ids, weights, likely)

    def wants_guess(self, x: mx.array) -> bool:
        return self._experts.wants_guess(x.shape[0] * x.shape[1])

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token: ids and weights [..., K]."""
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        ids = mx.argpartition(scores, kth=-self._active, axis=-1)[..., -self._active :]
        weights = mx.take_along_axis(scores, ids, axis=-1)
        return ids, weights / weights.sum(axis=-1, keepdims=True) if self._normalize else weights


class SharedExpert(nn.Module):
    """The expert every token uses: down(silu(gate(x)) * up(x))."""

    def __init__(self, dims: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden, bias=False)
        self.up_proj = nn.Linear(dims, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class SharedExpertMoE(MoE):
    """Routed experts, and the gated output of one of ``shared`` hidden dims that every token uses."""

    def __init__(self, dims: int, count: int, experts: Experts, active: int, normalize: bool, shared: int):
        super().__init__(dims, count, experts, active, normalize)
        self.shared_expert = SharedExpert(dims, shared)
        self.shared_expert_gate = nn.Linear(dims, 1, bias=False)

    def __call__(self, x: mx.array, likely: mx.array | None = None) -> mx.array:
        ids, weights = self.route(x)
        shared = self.shared_expert(x)
        return plus_gated(self._experts(x, ids, weights, likely), shared, self.shared_expert_gate(x))
