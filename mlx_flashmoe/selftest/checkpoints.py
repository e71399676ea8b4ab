"""Random checkpoints, as small as all of an architecture's parts allow.

An architecture's own modules say which tensors there are, so that new ones need nothing here but the fields of their
config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_flashmoe.models import architecture

VOCABULARY = 512
LAYERS, EXPERTS, ACTIVE = 4, 16, 4


def config_of(model_type: str) -> dict[str, Any]:
    """config.json. Every architecture reads the fields that it knows."""
    return {
        "model_type": model_type,
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "hidden_act": "silu",
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": False,
        # Every other layer, so that both kinds come twice; heads as wide as the delta rule's kernels want them.
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
        "num_experts_per_tok": ACTIVE,
        "norm_topk_prob": True,
        "moe_intermediate_size": 128,
        "intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    }


def write_checkpoint(folder: Path, model_type: str) -> None:
    """Writes config.json and bfloat16 weights as published, an expert's matrices apart. The same ones every time."""
    config = config_of(model_type)
    arch = architecture(model_type)
    settings = arch.Config.from_dict(config)
    rng = np.random.default_rng(0)
    with mx.stream(mx.cpu):
        model = arch.Model(settings, lambda layer: None)  # it is never called
        parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
        tensors = {name: _tensor(rng, name, value.shape) for name, value in parameters}
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        for layer in settings.moe_layers:
            for expert in range(EXPERTS):
                for name, shape in {
                    "gate": (inner, hidden),
                    "up": (inner, hidden),
                    "down": (hidden, inner),
                }.items():
                    path = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                    tensors[path] = _tensor(rng, path, shape)
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> mx.array:
    """Values that keep activations about as large as they are."""
    if name.endswith("conv1d.weight"):
        # [channels, kernel, 1] in MLX, published as [channels, 1, kernel]
        shape = (shape[0], shape[2], shape[1])
    values = rng.standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    elif len(shape) > 1 and "embed" not in name:
        values *= shape[-1] ** -0.5
    return mx.array(values).astype(mx.bfloat16)
