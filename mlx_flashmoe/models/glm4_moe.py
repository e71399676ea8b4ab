"""GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7: attention that rotates half of each head, and DeepSeek-V3's experts.

Checked against ``Glm4MoeForCausalLM`` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_flashmoe.models.attention import Attention
from mlx_flashmoe.models.config import head_dim
from mlx_flashmoe.models.decoder import AttentionLayer, CausalLM
from mlx_flashmoe.models.grouped import GroupedConfig, grouped_moe
from mlx_flashmoe.models.moe import Experts
from mlx_flashmoe.models.router import Gate

ROTARY_SHARE = 0.5  # of each head's dims, where config.json does not say; as in transformers


@dataclass(frozen=True)
class Config(GroupedConfig):
    use_qk_norm: bool

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        head = {"head_dim": head_dim(text)}
        return {**super().derive({"partial_rotary_factor": ROTARY_SHARE, **text, **head}), **head}


class Model(CausalLM):
    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        def layer(i: int) -> AttentionLayer:
            attention = Attention(
                config, output_bias=False, normalized="head" if config.use_qk_norm else None
            )
            return AttentionLayer(config, attention, grouped_moe(config, i, experts, active_experts))

        super().__init__(config, [layer(i) for i in range(config.num_hidden_layers)])

    @classmethod
    def unused(cls, config: Config) -> tuple[str, ...]:
        return config.mtp_names

    @staticmethod
    def keep_float32(path: str) -> bool:
        return Gate.holds(path)
