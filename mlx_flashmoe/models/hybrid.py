"""Qwen3-Next and its successors: gated delta net layers, every so often gated attention, all with experts.

A layer with experts has routed ones and one that every token uses. Norms are published as weight - 1, except the one
inside the delta net.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, ClassVar

import mlx.core as mx

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.attention import GatedAttention
from mlx_flashmoe.models.cache import Cache, RecurrentCache
from mlx_flashmoe.models.config import layers_between_sparse
from mlx_flashmoe.models.decoder import AttentionLayer, CausalLM, DecoderLayer
from mlx_flashmoe.models.delta_net import DeltaNetConfig, GatedDeltaNet
from mlx_flashmoe.models.moe import MLP, Experts, MoE, SharedExpertMoE, feed_forward
from mlx_flashmoe.models.router import Router

ROTARY_SHARE = 0.25  # of each head's dims, where config.json does not say; as in transformers


@dataclass(frozen=True)
class HybridConfig(DeltaNetConfig):
    shared_expert_intermediate_size: int
    layer_types: tuple[str, ...]
    norm_topk_prob: bool

    @classmethod
    def find_dense_layers(cls, text: dict[str, Any]) -> tuple[int, ...]:
        return layers_between_sparse(text)

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        layers, kinds = text["num_hidden_layers"], text.get("layer_types")
        if kinds is None:
            interval = text["full_attention_interval"]
            kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise FormatError(f"layer_types does not list the {layers} layers of num_hidden_layers")
        for kind in kinds:
            if kind not in ("linear_attention", "full_attention"):
                raise FormatError(
                    f"layer_types has {short(kind)}; linear_attention and full_attention are known"
                )
        derived = super().derive({"partial_rotary_factor": ROTARY_SHARE, **text})
        return {**derived, "layer_types": tuple(kinds)}

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        attention, recurrent = self._layer_kv_bytes(tokens, dtype), self.state_bytes(dtype)
        return sum(attention if kind == "full_attention" else recurrent for kind in self.layer_types)


class DeltaNetLayer(DecoderLayer):
    def __init__(self, config: HybridConfig, delta_net: GatedDeltaNet, mlp: MoE | MLP):
        super().__init__(config, mlp)
        self.linear_attn = delta_net

    def mix(self, x: mx.array, cache: RecurrentCache | None) -> mx.array:
        return self.linear_attn(x, cache)

    def make_cache(self) -> Cache:
        return RecurrentCache()


class HybridModel(CausalLM):
    """``delta_net`` makes a layer's, as the architecture has it."""

    norms_less_one: ClassVar[bool] = True

    def __init__(
        self,
        config: HybridConfig,
        experts: Callable[[int], Experts],
        active_experts: int | None,
        delta_net: Callable[[HybridConfig], GatedDeltaNet],
    ):
        active = active_experts or config.num_experts_per_tok
        router = Router(config.num_experts, active, config.norm_topk_prob)

        def layer(i: int, kind: str) -> DecoderLayer:
            shared = config.shared_expert_intermediate_size
            mlp = feed_forward(
                config,
                i,
                lambda: SharedExpertMoE(config.hidden_size, router, experts(i), shared, gated=True),
            )
            if kind == "linear_attention":
                return DeltaNetLayer(config, delta_net(config), mlp)
            return AttentionLayer(config, GatedAttention(config), mlp)

        super().__init__(config, [layer(i, kind) for i, kind in enumerate(config.layer_types)])

    @classmethod
    def unused(cls, config: HybridConfig) -> tuple[str, ...]:
        return "mtp.", "model.mtp."

    @staticmethod
    def keep_float32(path: str) -> bool:
        return path.endswith((".A_log", ".dt_bias")) or (
            path.endswith("norm.weight") and not path.endswith("linear_attn.norm.weight")
        )
