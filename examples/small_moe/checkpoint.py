"""The shape of the small model, and its checkpoint as Hugging Face publishes such models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

SHARD = 15_000_000  # bytes of a file at most

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "hidden_act": "silu",
    "num_hidden_layers": 8,
    "layer_types": 2 * [*3 * ["linear_attention"], "full_attention"],
    "full_attention_interval": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,
    "attn_output_gate": True,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}


def text_config(tokenizer: Tokenizer) -> Qwen3_5MoeTextConfig:
    return Qwen3_5MoeTextConfig(
        vocab_size=tokenizer.get_vocab_size(), eos_token_id=tokenizer.token_to_id("<|im_end|>"), **SHAPE
    )


def save(model: Qwen3_5MoeForCausalLM, config: Qwen3_5MoeTextConfig, folder: Path) -> None:
    """config.json, generation_config.json and bfloat16 weights under the names of the published checkpoints."""
    text = {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        **SHAPE,
    }
    _write(
        folder / "config.json",
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": True,
            "text_config": text,
        },
    )
    _write(folder / "generation_config.json", {"do_sample": False, "eos_token_id": config.eos_token_id})
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, p in model.named_parameters():
        tensor = p.detach().to("cpu", torch.bfloat16).contiguous()
        if size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        size += tensor.nbytes
        shards[-1][name.replace("model.", "model.language_model.", 1)] = tensor
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for shard in shards for t in shard.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
