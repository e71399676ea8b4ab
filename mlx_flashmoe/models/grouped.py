"""Experts as DeepSeek-V3 has them (arXiv:2412.19437), and models after it.

The first layers have none. Others have routed ones, in groups, which are chosen by corrected sigmoids, and shared ones
that every token uses, without a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.config import MOST, BaseConfig, first_layers, whole
from mlx_flashmoe.models.moe import MLP, Experts, MoE, SharedExpertMoE, feed_forward
from mlx_flashmoe.models.router import Gate, Router


@dataclass(frozen=True)
class GroupedConfig(BaseConfig):
    """Fields have their names in config.json, but for

    mtp_layers: layers after the last one that predict tokens further ahead; text generation leaves them out.
    """

    n_group: int
    topk_group: int
    n_shared_experts: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    mtp_layers: tuple[int, ...]

    @classmethod
    def find_dense_layers(cls, text: dict[str, Any]) -> tuple[int, ...]:
        return first_layers(text)

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        experts = whole(text, "n_routed_experts", most=MOST["num_experts"])
        groups, chosen = text["n_group"], text["topk_group"]
        if experts % groups or (groups > 1 and experts < 2 * groups):
            raise FormatError(
                f"n_group {groups} does not part {experts} experts into equal groups of 2 or more"
            )
        if chosen > groups:
            raise FormatError(f"topk_group {chosen} is more than the {groups} of n_group")
        if text["num_experts_per_tok"] > experts // groups * chosen:
            raise FormatError(
                f"num_experts_per_tok {text['num_experts_per_tok']} is more than topk_group {chosen} of the n_group "
                f"{groups} groups of {experts} experts have"
            )
        layers = text["num_hidden_layers"]
        mtp = whole({"num_nextn_predict_layers": 0, **text}, "num_nextn_predict_layers", 0, layers)
        return {
            **super().derive(text),
            "num_experts": experts,
            "mtp_layers": tuple(range(layers, layers + mtp)),
        }

    @property
    def selectable_experts(self) -> int:
        return self.num_experts // self.n_group * self.topk_group

    @property
    def mtp_names(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors of ``mtp_layers``."""
        return tuple(f"model.layers.{i}." for i in self.mtp_layers)

    @property
    def shared_size(self) -> int:
        """Hidden dims of the shared experts together."""
        return self.n_shared_experts * self.moe_intermediate_size

    def activation_bytes(self, dtype: mx.Dtype) -> int:
        # Of the shared experts: gate, up, their product and the result.
        shared = (3 * self.shared_size + self.hidden_size) * dtype.size
        chosen = Gate.activation_bytes(self.hidden_size, self.num_experts)
        return super().activation_bytes(dtype) + chosen + shared


def grouped_moe(
    config: GroupedConfig, layer: int, experts: Callable[[int], Experts], active_experts: int | None
) -> MoE | MLP:
    """Makes what a layer has after its attention; ``experts`` and ``active_experts`` as of ``CausalLM``."""
    router = Router(
        config.num_experts,
        active_experts or config.num_experts_per_tok,
        config.norm_topk_prob,
        "sigmoid",
        corrected=True,
        groups=config.n_group,
        chosen_groups=config.topk_group,
        scaling=config.routed_scaling_factor,
    )
    shared = config.shared_size
    return feed_forward(
        config,
        layer,
        lambda: SharedExpertMoE(config.hidden_size, router, experts(layer), shared, gated=False),
    )
