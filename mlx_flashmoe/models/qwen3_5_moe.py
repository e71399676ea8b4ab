"""Qwen3.5-MoE: gated delta net layers, every fourth gated attention, each followed by routed experts.

Checked against ``Qwen3_5MoeForCausalLM`` of Hugging Face transformers. Parameter paths are the names in a
converted folder's safetensors files; the routed experts are not parameters, they come from ``experts``.
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
        return {**super().derive(text), "norm_topk_prob": True}


class DeltaNet(GatedDeltaNet):
    """Every input of the rule has a projection of its own."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        dims = config.hidden_size
        self.in_proj_qkv = nn.Linear(dims, 2 * config.keys + config.values, bias=False)
        self.in_proj_z = nn.Linear(dims, config.values, bias=False)
        self.in_proj_b = nn.Linear(dims, config.linear_num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(dims, config.linear_num_value_heads, bias=False)
        self._projections = Together(self, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        qkv, z, b, a = self._projections(x)
        return qkv, z, b, a


class Model(HybridModel):
    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        super().__init__(config, experts, active_experts, DeltaNet)

    @classmethod
    def unused(cls, config: HybridConfig) -> tuple[str, ...]:
        vision = "visual.", "model.visual.", "vision_tower.", "model.vision_tower."
        return *super().unused(config), *vision
