"""Small random models of each architecture made by transformers, saved in each layout that is in the wild."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from mlx_flashmoe.layout import PROJECTIONS, Manifest
from mlx_flashmoe.models import architecture

ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]}
COMMON: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    moe_intermediate_size=64,
    num_experts=16,
    num_experts_per_tok=4,
    eos_token_id=None,
    attn_implementation="eager",
)
DELTA_NET: dict[str, Any] = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    shared_expert_intermediate_size=64,
)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Family:
    """An architecture in transformers, a small shape of it, and the layouts it comes in.

    Layouts: "wrapped" and "released", as it is published (experts stacked and names wrapped, or one tensor an expert);
    "wrapped, released", as Kimi K2.5 is; "per expert", as transformers writes it; "fused", as transformers holds it.

    Attributes:
        named: settings that transformers writes, and what config.json calls them.
        released: settings in a release's config.json that transformers does not write; ... is one that only it writes.
        left_out: a tensor of a release that text generation does not use.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    base: dict[str, Any]
    layouts: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)
    released: dict[str, Any] = field(default_factory=dict)
    left_out: str | None = None


QWEN3_5 = Family(
    Qwen3_5MoeTextConfig,
    Qwen3_5MoeForCausalLM,
    {**COMMON, **DELTA_NET, "rope_parameters": ROPE},
    ("wrapped", "per expert"),
)
QWEN3_NEXT = Family(
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    {**COMMON, **DELTA_NET, "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.25}},
    ("released", "per expert"),
    named={"num_local_experts": "num_experts"},
    left_out="mtp.fc.weight",
)
QWEN3_MOE = Family(
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    {**COMMON, "norm_topk_prob": True, "rope_parameters": PLAIN_ROPE},
    ("released", "per expert"),
    named={"num_local_experts": "num_experts"},
)
QWEN2_MOE = Family(
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    {**COMMON, "head_dim": 32, "shared_expert_intermediate_size": 96, "rope_parameters": PLAIN_ROPE},
    ("released", "per expert", "fused"),
)
GLM4_MOE = Family(
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    {
        **{name: value for name, value in COMMON.items() if name != "num_experts"},
        "n_routed_experts": 16,
        "intermediate_size": 192,
        "attention_bias": True,
        "use_qk_norm": True,
        "routed_scaling_factor": 2.5,
        "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
    },
    ("released", "per expert", "fused"),
    left_out="model.layers.4.eh_proj.weight",
)
DEEPSEEK_V3 = Family(
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    dict(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=24,
        moe_intermediate_size=64,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        max_position_embeddings=128,
        eos_token_id=None,
        attn_implementation="eager",
        rope_parameters=PLAIN_ROPE,
    ),
    ("released", "per expert", "fused"),
    released={
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1},
        **{"head_dim": ..., "qk_head_dim": ..., "rope_interleave": ...},
    },
    left_out="model.layers.4.eh_proj.weight",
)
MINIMAX_M2 = Family(
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    {
        **{
            name: value
            for name, value in COMMON.items()
            if name not in ("num_experts", "moe_intermediate_size")
        },
        "num_local_experts": 16,
        "intermediate_size": 64,
        "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
    },
    ("released", "per expert", "fused"),
    released={
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
        "num_mtp_modules": 3,
    },
)

# Heads, groups, layer patterns, expert counts, tied embeddings: what differs from the family's base.
SHAPES: dict[str, tuple[Family, dict[str, Any]]] = {
    "base": (QWEN3_5, {}),
    "tied, one kv head, many experts": (
        QWEN3_5,
        dict(tie_word_embeddings=True, num_key_value_heads=1, num_experts=40, num_experts_per_tok=10),
    ),
    "odd pattern, wide values": (
        QWEN3_5,
        dict(
            num_hidden_layers=5,
            layer_types=[
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
                "linear_attention",
            ],
            linear_num_key_heads=2,
            linear_num_value_heads=8,
            linear_value_head_dim=64,
            linear_key_head_dim=64,
            shared_expert_intermediate_size=32,
        ),
    ),
    "equal heads, bias, top-1, kernel 3": (
        QWEN3_5,
        dict(
            linear_num_key_heads=4,
            attention_bias=True,
            num_experts_per_tok=1,
            num_experts=6,
            linear_conv_kernel_dim=3,
            num_attention_heads=6,
            head_dim=32,
            rope_parameters={**ROPE, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
    ),
    "YaRN": (QWEN3_5, dict(rope_parameters={**ROPE, **YARN})),
    "no multiples of 128": (
        QWEN3_5,
        dict(hidden_size=192, moe_intermediate_size=96, shared_expert_intermediate_size=96),
    ),
    "Qwen3-Next": (QWEN3_NEXT, {}),
    "Qwen3-Next, first layer without experts": (
        QWEN3_NEXT,
        dict(mlp_only_layers=[0], intermediate_size=96),
    ),
    "Qwen3-MoE, every second layer without experts, and the last": (
        QWEN3_MOE,
        dict(num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[4], intermediate_size=192),
    ),
    "Qwen3-Next, wide values, tied, weights as they are, YaRN": (
        QWEN3_NEXT,
        dict(
            linear_num_value_heads=8,
            linear_value_head_dim=64,
            linear_num_key_heads=2,
            tie_word_embeddings=True,
            norm_topk_prob=False,
            rope_parameters={**YARN, "partial_rotary_factor": 0.5},
        ),
    ),
    "Qwen3-Next, equal heads, bias, kernel 3": (
        QWEN3_NEXT,
        dict(linear_num_key_heads=4, attention_bias=True, linear_conv_kernel_dim=3, num_experts_per_tok=1),
    ),
    "Qwen3-MoE": (QWEN3_MOE, {}),
    "Qwen3-MoE, many heads, weights as they are": (
        QWEN3_MOE,
        dict(
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=32,
            norm_topk_prob=False,
            num_experts=40,
            num_experts_per_tok=8,
        ),
    ),
    "Qwen3-MoE, tied, bias, YaRN": (
        QWEN3_MOE,
        dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=YARN),
    ),
    "DeepSeek-V3": (DEEPSEEK_V3, {}),
    "DeepSeek-V3, no query latent, one group, tied, two shared, weights as they are, half rotation": (
        replace(DEEPSEEK_V3, layouts=("per expert", "fused")),  # no release rotates so
        dict(
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            n_shared_experts=2,
            tie_word_embeddings=True,
            norm_topk_prob=False,
            first_k_dense_replace=0,
            rope_interleave=False,
        ),
    ),
    "DeepSeek-V3, YaRN with mscale, bias, wide values": (
        DEEPSEEK_V3,
        dict(
            attention_bias=True,
            v_head_dim=48,
            qk_nope_head_dim=16,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
    ),
    "DeepSeek-V3, YaRN with two mscales, one of them for all scores": (
        DEEPSEEK_V3,
        dict(rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}),
    ),
    "Kimi K2": (
        replace(DEEPSEEK_V3, layouts=("released", "wrapped, released")),
        dict(
            n_group=1,
            topk_group=1,
            n_routed_experts=40,
            num_experts_per_tok=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters={
                **YARN,
                "rope_theta": 5e4,
                "beta_fast": 1.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        ),
    ),
    "Qwen2-MoE": (QWEN2_MOE, {}),
    "Qwen2-MoE, every second layer without experts, weights sum to 1, tied, no bias": (
        QWEN2_MOE,
        dict(
            decoder_sparse_step=2,
            intermediate_size=192,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            qkv_bias=False,
        ),
    ),
    "Qwen2-MoE, heads without groups, YaRN": (
        QWEN2_MOE,
        dict(num_key_value_heads=4, head_dim=64, rope_parameters=YARN),
    ),
    "GLM-4.5": (GLM4_MOE, {}),
    "GLM-4.5-Air, no norms in attention, no bias, scores as they are": (
        GLM4_MOE,
        dict(use_qk_norm=False, attention_bias=False, norm_topk_prob=False, routed_scaling_factor=1.0),
    ),
    "GLM-4.5, groups, two shared experts, three layers without experts, tied": (
        GLM4_MOE,
        dict(
            n_routed_experts=24,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            first_k_dense_replace=3,
            tie_word_embeddings=True,
        ),
    ),
    "GLM-4.5, experts in every layer, one group of many, YaRN, heads that share": (
        GLM4_MOE,
        dict(
            first_k_dense_replace=0,
            n_group=8,
            topk_group=3,
            num_attention_heads=6,
            head_dim=32,
            rope_parameters={**YARN, "partial_rotary_factor": 0.5},
        ),
    ),
    "MiniMax-M2": (MINIMAX_M2, {}),
    "MiniMax-M2, tied, one expert, whole heads rotated": (
        MINIMAX_M2,
        dict(
            tie_word_embeddings=True,
            num_experts_per_tok=1,
            num_attention_heads=6,
            num_key_value_heads=1,
            head_dim=32,
            rope_parameters=PLAIN_ROPE,
        ),
    ),
    "MiniMax-M2, many experts, YaRN, no multiples of 128": (
        MINIMAX_M2,
        dict(
            hidden_size=192,
            intermediate_size=96,
            num_local_experts=40,
            num_experts_per_tok=8,
            rope_parameters={**YARN, "partial_rotary_factor": 0.25},
        ),
    ),
}


def random_model(shape: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose logits have a standard deviation near 1 and whose norms are not all one."""
    torch.manual_seed(seed)
    family, changes = SHAPES[shape]
    # transformers' own generate must not stop early: no end token.
    model = family.model(family.config(**{**family.base, **changes})).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.08)
            elif "norm" in name or "dt_bias" in name or name.endswith(".bias"):
                p.add_(torch.randn_like(p) * 0.1)
        for name, p in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                p.normal_(0, 0.1)  # about as far as scores are apart
    return model


def save(model: PreTrainedModel, folder: Path, layout: str, dtype: torch.dtype = torch.float32) -> Path:
    """Writes ``model`` as a checkpoint in a layout of its family."""
    folder.mkdir(parents=True)
    if layout == "fused":
        state = model.to(dtype).state_dict()
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
        model.config.save_pretrained(folder)
    elif layout == "wrapped":
        config = {"model_type": "qwen3_5_moe", "text_config": model.config.to_dict()}
        config["tie_word_embeddings"] = model.config.tie_word_embeddings
        config["text_config"]["dtype"] = str(dtype).removeprefix("torch.")
        tensors = {
            k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: v.to(dtype)
            for k, v in model.state_dict().items()
            if not (k == "lm_head.weight" and model.config.tie_word_embeddings)
        }
        # What a release carries besides the language model.
        tensors["mtp.fc.weight"] = torch.zeros(4, 4)
        tensors["model.visual.patch_embed.proj.weight"] = torch.zeros(4, 4)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    elif layout == "wrapped, released":
        model.to(dtype).save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = {f"language_model.{name}": t for name, t in load_file(file).items()}
        tensors["vision_tower.patch_embed.proj.weight"] = torch.zeros(4, 4)
        tensors["mm_projector.proj.0.weight"] = torch.zeros(4, 4)
        save_file(tensors, file)
        config = {
            "model_type": "kimi_k25",
            "text_config": {**released_config(model), "model_type": "kimi_k2"},
        }
        (folder / "config.json").write_text(json.dumps(config))
    else:
        model.to(dtype).save_pretrained(folder, max_shard_size="2MB")
        if layout == "released":
            (folder / "config.json").write_text(json.dumps(released_config(model)))
            left_out = family_of(model).left_out
            if left_out is not None:
                save_file({left_out: torch.zeros(4, 4)}, folder / "left_out.safetensors")
                index = json.loads((folder / "model.safetensors.index.json").read_text())
                index["weight_map"][left_out] = "left_out.safetensors"
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def family_of(model: PreTrainedModel) -> Family:
    return next(family for family, _ in SHAPES.values() if family.model is type(model))


def released_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json as it is published: names that transformers has changed since."""
    config = {**model.config.to_dict(), **family_of(model).released}
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope["rope_type"] == "yarn" else None
    config["torch_dtype"] = config.pop("dtype")
    for theirs, published in family_of(model).named.items():
        if theirs in config:
            config[published] = config.pop(theirs)
    if isinstance(model, MiniMaxM2ForCausalLM):
        config["rotary_dim"] = int(config.pop("partial_rotary_factor", 1) * config["head_dim"])
    if config.pop("layer_types", None) and "linear_conv_kernel_dim" in config:
        config["full_attention_interval"] = 4
    return {name: value for name, value in config.items() if value is not ...}


def dequantized_state(folder: Path) -> dict[str, torch.Tensor]:
    """A converted folder's weights under transformers' names: what the reference must compute with.

    Read independently of the runtime: blobs by the manifest's offsets, values by ``mx.dequantize``.
    """
    manifest = Manifest.load(folder)
    raw: dict[str, mx.array] = {}
    for entry in manifest.dense:
        raw.update(mx.load(str(folder / entry.file)))  # type: ignore[arg-type]
    state: dict[str, torch.Tensor] = {}
    for name, w in raw.items():
        path, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if part == "weight" and path in manifest.dense_quantization:
            q = manifest.dense_quantization[path]
            w = mx.dequantize(w, raw[f"{path}.scales"], raw[f"{path}.biases"], q.group_size, q.bits)
        if name.endswith("conv1d.weight"):
            w = w.moveaxis(1, 2)
        if manifest.model_type == "minimax_m2":
            name = name.replace(".gate.e_score", ".e_score")
        zero_centred = architecture(manifest.model_type).Model.norms_less_one and "linear_attn" not in name
        if name.endswith("norm.weight") and zero_centred:
            w = w.astype(mx.float32) - 1
        state[name] = to_torch(w)
    for entry in manifest.layers:
        layout = manifest.layout_of(entry)
        blobs = np.fromfile(folder / entry.file, np.uint8).reshape(entry.num_experts, layout.blob_size)
        stacks: dict[str, mx.array] = {}
        for name in PROJECTIONS:
            projection = layout.projections[name]
            parts = {}
            for part, c in projection.components.items():
                cut = np.ascontiguousarray(blobs[:, c.offset : c.offset + c.nbytes])
                dtype = getattr(mx, c.dtype)
                parts[part] = mx.array(cut).view(dtype).reshape(-1, *c.shape)
            stacks[name] = (
                mx.dequantize(
                    parts["weight"], parts["scales"], parts["biases"], projection.group_size, projection.bits
                )
                if "scales" in parts
                else parts["weight"]
            )
        at = f"model.layers.{entry.layer}.mlp.experts"
        state[f"{at}.gate_up_proj"] = to_torch(mx.concatenate([stacks["gate"], stacks["up"]], axis=1))
        state[f"{at}.down_proj"] = to_torch(stacks["down"])
    return state


def to_torch(w: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(w.astype(mx.float32)))


def with_weights(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A float32 copy of ``model`` that computes with ``state``."""
    copy = type(model)(model.config).eval().float()
    missing, unexpected = copy.load_state_dict(dict(state), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected
    if tied:
        copy.tie_weights()
    return copy


def reference_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()
