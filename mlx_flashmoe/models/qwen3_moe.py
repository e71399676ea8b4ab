"""Qwen3-MoE (235B-A22B, 30B-A3B, Coder-480B-A35B): attention without a gate, no expert that every token uses.

Checked against ``Qwen3MoeForCausalLM`` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.attention import Attention
from mlx_flashmoe.models.config import BaseConfig, head_dim, layers_between_sparse
from mlx_flashmoe.models.decoder import AttentionLayer, CausalLM
from mlx_flashmoe.models.moe import Experts, MoE, feed_forward
from mlx_flashmoe.models.router import Router


@dataclass(frozen=True)
class Config(BaseConfig):
    norm_topk_prob: bool

    @classmethod
    def find_dense_layers(cls, text: dict[str, Any]) -> tuple[int, ...]:
        return layers_between_sparse(text)

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        if text.get("use_sliding_window"):
            raise FormatError("use_sliding_window is not supported")
        text = {**text, "head_dim": head_dim(text)}
        return {
            **super().derive(text),
            "head_dim": text["head_dim"],
            # Published configurations have the first name, those that transformers writes the second.
            "num_experts": text["num_experts"] if "num_experts" in text else text["num_local_experts"],
        }


class Model(CausalLM):
    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        active = active_experts or config.num_experts_per_tok
        router = Router(config.num_experts, active, config.norm_topk_prob)

        def layer(i: int) -> AttentionLayer:
            mlp = feed_forward(config, i, lambda: MoE(config.hidden_size, router, experts(i)))
            return AttentionLayer(config, Attention(config), mlp)

        super().__init__(config, [layer(i) for i in range(config.num_hidden_layers)])
