"""Qwen3-Next, Qwen3-Coder-Next: as Qwen3.5-MoE, but with two fused projections before the delta rule.

Checked against ``Qwen3NextForCausalLM`` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.models.delta_net import DeltaNetConfig, GatedDeltaNet
from mlx_flashmoe.models.hybrid import HybridConfig, HybridModel
from mlx_flashmoe.models.moe import Experts
from mlx_flashmoe.models.together import Together


@dataclass(frozen=True)
class Config(HybridConfig):
    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        return {**super().derive(text), "norm_topk_prob": text.get("norm_topk_prob", True)}


class DeltaNet(GatedDeltaNet):
    """The rows of each projection go key head by key head.

    A key head's rows of ``in_proj_qkvz`` are its query, its key, then the values and the gates of the value heads
    that it serves; of ``in_proj_ba``, their b and then their a.
    """

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.in_proj_qkvz = nn.Linear(config.hidden_size, 2 * (config.keys + config.values), bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * config.linear_num_value_heads, bias=False)
        self._projections = Together(self, "in_proj_qkvz", "in_proj_ba")

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        B, T, _ = x.shape

        def by_part(rows: mx.array, sizes: list[int]) -> list[mx.array]:
            """Parts of the given sizes within each key head, gathered from all heads: [B, T, heads * size] each."""
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
            parts = mx.split(rows.reshape(B, T, self.key_heads, -1), ends, axis=-1)
            return [part.reshape(B, T, -1) for part in parts]

        served = self.value_heads // self.key_heads
        values = served * self.value_dim
        qkvz, ba = self._projections(x)
        q, k, v, z = by_part(qkvz, [self.key_dim, self.key_dim, values, values])
        b, a = by_part(ba, [served, served])
        return mx.concatenate([q, k, v], axis=-1), z, b, a


class Model(HybridModel):
    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        super().__init__(config, experts, active_experts, DeltaNet)
