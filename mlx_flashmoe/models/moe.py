"""Router and routed experts, without and with an expert that every token uses; and a layer without experts."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import gpu, router
from mlx_flashmoe.models.fused import plus_gated, replayed, swiglu
from mlx_flashmoe.models.together import Together


class Experts(Protocol):
    """What a model asks of a layer's routed experts; see ``StreamedExperts``."""

    def __call__(
        self, x: mx.array, ids: mx.array, weights: mx.array, likely: mx.array | None = None
    ) -> mx.array: ...

    def wants_guess(self, tokens: int) -> bool: ...


class MoE(nn.Module):
    """(residual, x), both [B, T, D] -> residual + experts(x): the ``active`` most probable ones of every token.

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

    def __call__(self, residual: mx.array, x: mx.array, likely: mx.array | None = None) -> mx.array:
        """``likely``: a guess at the next layer's ids, or None."""
        ids, weights = self.route(self.gate(x))
        return residual + self._experts(x, ids, weights, likely)

    def wants_guess(self, x: mx.array) -> bool:
        return self._experts.wants_guess(x.shape[0] * x.shape[1])

    def route(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token, from the gate's output: ids and weights [..., K]."""
        return router.route(logits, self._active, self._normalize)

    def check_kernels(self, language: gpu.Language, dtype: mx.Dtype) -> None:
        """Compares the kernel that serves the router on a GPU, before it is needed."""
        router.right(language, dtype, self.gate.weight.shape[0], self._active, self._normalize)


class MLP(nn.Module):
    """In a layer without experts: (residual, x), both [B, T, D] -> residual + down(silu(gate(x)) * up(x))."""

    def __init__(self, dims: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden, bias=False)
        self.up_proj = nn.Linear(dims, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dims, bias=False)
        self._projections = Together(self, "gate_proj", "up_proj")

    def __call__(self, residual: mx.array, x: mx.array, likely: mx.array | None = None) -> mx.array:
        return residual + self.down_proj(swiglu(*self._projections(x)))

    def wants_guess(self, x: mx.array) -> bool:
        return False


class SharedExpert(nn.Module):
    """The expert every token uses, from gate(x) and up(x): down(silu(gate) * up)."""

    def __init__(self, dims: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden, bias=False)
        self.up_proj = nn.Linear(dims, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dims, bias=False)

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        return self.down_proj(swiglu(gate, up))


class SharedExpertMoE(MoE):
    """Routed experts, and the gated output of one of ``shared`` hidden dims that every token uses."""

    def __init__(self, dims: int, count: int, experts: Experts, active: int, normalize: bool, shared: int):
        super().__init__(dims, count, experts, active, normalize)
        self.shared_expert = SharedExpert(dims, shared)
        self.shared_expert_gate = nn.Linear(dims, 1, bias=False)
        self._projections = Together(
            self, "gate", "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj"
        )
        self._replayed = replayed(self._routed_and_shared)

    def __call__(self, residual: mx.array, x: mx.array, likely: mx.array | None = None) -> mx.array:
        ids, weights, shared, shared_gate = self._replayed(x)
        y = self._experts(x, ids, weights, likely)
        return plus_gated(residual, y, shared, shared_gate)

    def _routed_and_shared(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """The experts of each token and their weights, the shared expert's output and its gate."""
        logits, shared_gate, gate, up = self._projections(x)
        ids, weights = self.route(logits)
        return ids, weights, self.shared_expert(gate, up), shared_gate
