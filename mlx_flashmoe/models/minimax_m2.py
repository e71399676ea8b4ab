"""MiniMax-M2 and its successors (M2.1, M2.5): queries and keys normalized over all heads, experts chosen by sigmoids.

Checked against ``MiniMaxM2ForCausalLM`` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, ClassVar

import mlx.core as mx

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.attention import Attention
from mlx_flashmoe.models.config import BaseConfig, head_dim, whole
from mlx_flashmoe.models.decoder import AttentionLayer, CausalLM
from mlx_flashmoe.models.moe import Experts, MoE
from mlx_flashmoe.models.router import Gate, Router

# Settings of published configurations that this architecture has one value of.
FIXED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}


@dataclass(frozen=True)
class Config(BaseConfig):
    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        for name, value in FIXED.items():
            if text.get(name, value) != value:
                raise FormatError(f"{name} {short(text[name])} is not supported, only {value!r}")
        head = head_dim(text)
        rotary = {}
        if "rotary_dim" in text:
            rotary["partial_rotary_factor"] = whole(text, "rotary_dim", most=head) / head
        return {
            **super().derive({**rotary, **text, "head_dim": head}),
            "head_dim": head,
            "num_experts": text["num_local_experts"],
            "moe_intermediate_size": text["intermediate_size"],
        }

    def activation_bytes(self, dtype: mx.Dtype) -> int:
        return super().activation_bytes(dtype) + Gate.activation_bytes(self.hidden_size, self.num_experts)


class Model(CausalLM):
    renamed: ClassVar[dict[str, str]] = {
        ".block_sparse_moe.": ".mlp.",
        ".mlp.e_score_correction_bias": ".mlp.gate.e_score_correction_bias",
        ".w1.": ".gate_proj.",
        ".w2.": ".down_proj.",
        ".w3.": ".up_proj.",
    }

    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        active = active_experts or config.num_experts_per_tok
        router = Router(config.num_experts, active, normalize=True, scoring="sigmoid", corrected=True)

        def layer(i: int) -> AttentionLayer:
            mlp = MoE(config.hidden_size, router, experts(i))
            return AttentionLayer(config, Attention(config, normalized="heads"), mlp)

        super().__init__(config, [layer(i) for i in range(config.num_hidden_layers)])

    @staticmethod
    def keep_float32(path: str) -> bool:
        return Gate.holds(path)
