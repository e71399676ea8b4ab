"""DeepSeek-V3, V3.1 and R1 (arXiv:2412.19437), and Kimi K2, K2.5: latent attention, experts in groups.

Checked against ``DeepseekV3ForCausalLM`` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, ClassVar

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.decoder import AttentionLayer, CausalLM
from mlx_flashmoe.models.grouped import GroupedConfig, grouped_moe
from mlx_flashmoe.models.latent_attention import LatentAttention, LatentConfig
from mlx_flashmoe.models.moe import Experts

# What every published model has, and transformers computes without asking.
ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


@dataclass(frozen=True)
class Config(LatentConfig, GroupedConfig):
    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        for name, value in ONLY.items():
            if text.get(name, value) != value:
                raise FormatError(f"{name} {short(text[name])} is not supported, only {value}")
        return super().derive(text)


class Model(CausalLM):
    refused: ClassVar[dict[str, str]] = {
        f".self_attn.{half}.": "is a half of kv_b_proj that mlx-lm has taken apart, one of them along other groups, so "
        "that they cannot be put together again exactly; convert the original, in bfloat16 or FP8, instead"
        for half in ("embed_q", "unembed_out")
    }

    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        def layer(i: int) -> AttentionLayer:
            return AttentionLayer(
                config, LatentAttention(config), grouped_moe(config, i, experts, active_experts)
            )

        super().__init__(config, [layer(i) for i in range(config.num_hidden_layers)])

    @classmethod
    def unused(cls, config: Config) -> tuple[str, ...]:
        predicting = f"model.layers.{config.num_hidden_layers}."  # more tokens than the next
        return predicting, "vision_tower.", "model.vision_tower.", "mm_projector.", "model.mm_projector."

    @staticmethod
    def keep_float32(path: str) -> bool:
        return path.endswith((".gate.weight", ".e_score_correction_bias"))
