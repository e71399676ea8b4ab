"""Routed experts, without and with an expert that every token uses; and a layer without experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import gpu
from mlx_flashmoe.models.config import BaseConfig
from mlx_flashmoe.models.fused import plus, plus_gated, replayed, swiglu
from mlx_flashmoe.models.router import Router
from mlx_flashmoe.models.together import Together


class Experts(Protocol):
    """What a model asks of a layer's routed experts; see ``StreamedExperts``."""

    def __call__(
        self, x: mx.array, ids: mx.array, weights: mx.array, likely: mx.array | None = None
    ) -> mx.array: ...

    def wants_guess(self, tokens: int) -> bool: ...


class MoE(nn.Module):
    """(residual, x), both [B, T, D] -> residual + experts(x): those that the router gives every token.

    Args:
        dims: D.
    """

    def __init__(self, dims: int, router: Router, experts: Experts):
        super().__init__()
        self.gate = router.make_gate(dims)
        self._router = router
        self._experts = experts

    def __call__(self, residual: mx.array, x: mx.array, likely: mx.array | None = None) -> mx.array:
        """``likely``: a guess at the next layer's ids, or None."""
        ids, weights = self.route(self.gate(x))
        return residual + self._experts(x, ids, weights, likely)

    def wants_guess(self, x: mx.array) -> bool:
        return self._experts.wants_guess(x.shape[0] * x.shape[1])

    def route(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token, from the gate's output: ids and weights [..., K]."""
        return self._router(logits, self.gate.get("e_score_correction_bias"))

    def check_kernels(self, language: gpu.Language, dtype: mx.Dtype) -> None:
        """Compares the kernel that serves the router on a GPU, before it is needed."""
        self._router.check_kernels(language, dtype)


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
    """What every token uses beside its own experts, from gate(x) and up(x): down(silu(gate) * up)."""

    def __init__(self, dims: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden, bias=False)
        self.up_proj = nn.Linear(dims, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dims, bias=False)

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        return self.down_proj(swiglu(gate, up))


class SharedExpertMoE(MoE):
    """Routed experts, and the output of what every token uses.

    Args:
        shared: hidden dims of what every token uses: those of several shared experts together.
        gated: its output is multiplied by the sigmoid of a gate (one ``shared_expert``, as Qwen's); else it is added
            as it is (``shared_experts``, as DeepSeek's).
    """

    def __init__(self, dims: int, router: Router, experts: Experts, shared: int, gated: bool):
        super().__init__(dims, router, experts)
        self._shared = "shared_expert" if gated else "shared_experts"
        self[self._shared] = SharedExpert(dims, shared)
        gates = ["gate"]
        if gated:
            self.shared_expert_gate = nn.Linear(dims, 1, bias=False)
            gates.append("shared_expert_gate")
        self._projections = Together(self, *gates, f"{self._shared}.gate_proj", f"{self._shared}.up_proj")
        self._replayed = replayed(self._routed_and_shared)

    def __call__(self, residual: mx.array, x: mx.array, likely: mx.array | None = None) -> mx.array:
        ids, weights, shared, *shared_gate = self._replayed(x)
        y = self._experts(x, ids, weights, likely)
        return plus_gated(residual, y, shared, *shared_gate) if shared_gate else plus(residual, y, shared)

    def _routed_and_shared(self, x: mx.array) -> tuple[mx.array, ...]:
        """The experts of each token and their weights, the shared expert's output, and its gate if it has one."""
        logits, *shared_gate, gate, up = self._projections(x)
        ids, weights = self.route(logits)
        return ids, weights, self[self._shared](gate, up), *shared_gate


def feed_forward(config: BaseConfig, layer: int, moe: Callable[[], MoE]) -> MoE | MLP:
    """Makes a layer's experts, or what it has instead where it is one of ``config.dense_layers``."""
    if layer not in config.dense_layers:
        return moe()
    assert config.intermediate_size is not None  # where there are such layers
    return MLP(config.hidden_size, config.intermediate_size)
