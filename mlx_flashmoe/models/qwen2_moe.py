"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): attention with biases, routed experts and a gated shared one.

Checked against ``Qwen2MoeForCausalLM`` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.attention import Attention
from mlx_flashmoe.models.config import BaseConfig, head_dim, layers_between_sparse
from mlx_flashmoe.models.decoder import AttentionLayer, CausalLM
from mlx_flashmoe.models.moe import Experts, SharedExpertMoE, feed_forward
from mlx_flashmoe.models.router import Router


@dataclass(frozen=True)
class Config(BaseConfig):
    norm_topk_prob: bool
    shared_expert_intermediate_size: int

    @classmethod
    def find_dense_layers(cls, text: dict[str, Any]) -> tuple[int, ...]:
        return layers_between_sparse(text)

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        if text.get("use_sliding_window"):
            raise FormatError("use_sliding_window is not supported")
        own = {"head_dim": head_dim(text), "attention_bias": text.get("qkv_bias", True)}
        return {**super().derive({**text, **own}), **own}


class Model(CausalLM):
    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        dims, shared = config.hidden_size, config.shared_expert_intermediate_size
        active = active_experts or config.num_experts_per_tok
        router = Router(config.num_experts, active, config.norm_topk_prob)

        def layer(i: int) -> AttentionLayer:
            attention = Attention(config, output_bias=False, normalized=None)
            mlp = feed_forward(
                config, i, lambda: SharedExpertMoE(dims, router, experts(i), shared, gated=True)
            )
            return AttentionLayer(config, attention, mlp)

        super().__init__(config, [layer(i) for i in range(config.num_hidden_layers)])
