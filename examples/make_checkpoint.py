"""Writes a small Qwen3.5-MoE checkpoint with random weights, to try the tools on without downloading anything.

    python examples/make_checkpoint.py demo/checkpoint

The architecture, the tensor names and the file formats are those of the published checkpoints: gated delta net
layers with full attention every fourth layer, routed experts stacked in one tensor per layer, a shared expert,
a byte-level tokenizer with the family's special tokens, a ChatML template with thinking. The weights are random
numbers, the same ones every time: the model answers with gibberish.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# How the family splits text before merging bytes.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""

TEXT = """\
A mixture of experts is a model with many small parts, and a token uses only a few of them. The router looks at
the token and picks the experts that suit it. The others are not needed for this token, so they need not be in
memory. They can stay on the disk until they are picked.

The lighthouse keeper wrote a letter every evening. He wrote about the weather, about the ships that went by, and
about the birds that came to rest on the rocks. When the wind was strong he wrote two letters, because there was
more to say. In the morning the boat came and took the letters away.

To make a good soup, cut the onions and the carrots into small pieces. Put them into a pot with a little oil, and
let them cook slowly. Add water, salt and herbs. After half an hour it is ready; with bread it is a whole meal.

How far is it from the earth to the moon? It is about 384,000 kilometres. Light needs a little more than one
second for the way. A train at 100 kilometres an hour would need 160 days.

    def mean(values):
        return sum(values) / len(values)

First, read the question. Second, think about what is asked. Third, write the answer down, and check it once more.
What did you see? I saw three red boats, two green ones, and a small white one that was not there yesterday.
Können Sie mir helfen? Où est la gare? ¿Qué hora es? 你好，世界。 今日はいい天気です。
"""

HIDDEN = 128
LAYERS = 4
EXPERTS = 32
ACTIVE_EXPERTS = 4
EXPERT_SIZE = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
KEY_HEADS, VALUE_HEADS, LINEAR_DIM, KERNEL = 2, 4, 32, 4


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the text above."""
    return train_tokenizer([TEXT], 700, MARKS)


def train_tokenizer(texts: Iterable[str], vocabulary: int, marks: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of the family: ``vocabulary`` learned tokens, then ``SPECIAL``, then ``marks``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in marks])
    return tokenizer


def build_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json, with the fields of the published one."""
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "dtype": "bfloat16",
            "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
            "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "hidden_size": HIDDEN,
            "hidden_act": "silu",
            "num_hidden_layers": LAYERS,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "full_attention_interval": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "attention_bias": False,
            "attn_output_gate": True,
            "linear_num_key_heads": KEY_HEADS,
            "linear_num_value_heads": VALUE_HEADS,
            "linear_key_head_dim": LINEAR_DIM,
            "linear_value_head_dim": LINEAR_DIM,
            "linear_conv_kernel_dim": KERNEL,
            "num_experts": EXPERTS,
            "num_experts_per_tok": ACTIVE_EXPERTS,
            "moe_intermediate_size": EXPERT_SIZE,
            "shared_expert_intermediate_size": EXPERT_SIZE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
            },
        },
    }


def build_weights(config: dict[str, Any]) -> dict[str, mx.array]:
    """Every tensor of the language model, by its published name, in bfloat16."""
    text = config["text_config"]
    random = np.random.default_rng(2026)
    weights: dict[str, mx.array] = {}

    def put(name: str, values: np.ndarray) -> None:
        weights[name] = mx.array(values.astype(np.float32)).astype(mx.bfloat16)

    def matrix(name: str, *shape: int) -> None:
        put(name, random.standard_normal(shape, np.float32) / np.sqrt(shape[-1]))

    def norm(name: str, size: int) -> None:
        put(name, 0.1 * random.standard_normal(size))  # norms are published as weight - 1

    matrix("model.language_model.embed_tokens.weight", text["vocab_size"], HIDDEN)
    for layer, kind in enumerate(text["layer_types"]):
        prefix = f"model.language_model.layers.{layer}."
        norm(prefix + "input_layernorm.weight", HIDDEN)
        norm(prefix + "post_attention_layernorm.weight", HIDDEN)
        attention = _linear_attention if kind == "linear_attention" else _full_attention
        attention(prefix, put, matrix, norm, random)
        mlp = prefix + "mlp."
        matrix(mlp + "gate.weight", EXPERTS, HIDDEN)
        matrix(mlp + "experts.gate_up_proj", EXPERTS, 2 * EXPERT_SIZE, HIDDEN)
        matrix(mlp + "experts.down_proj", EXPERTS, HIDDEN, EXPERT_SIZE)
        matrix(mlp + "shared_expert.gate_proj.weight", EXPERT_SIZE, HIDDEN)
        matrix(mlp + "shared_expert.up_proj.weight", EXPERT_SIZE, HIDDEN)
        matrix(mlp + "shared_expert.down_proj.weight", HIDDEN, EXPERT_SIZE)
        matrix(mlp + "shared_expert_gate.weight", 1, HIDDEN)
    norm("model.language_model.norm.weight", HIDDEN)
    matrix("lm_head.weight", text["vocab_size"], HIDDEN)
    return weights


Put = Callable[[str, np.ndarray], None]
Matrix = Callable[..., None]
Norm = Callable[[str, int], None]


def _linear_attention(prefix: str, put: Put, matrix: Matrix, norm: Norm, random: np.random.Generator) -> None:
    keys, values = KEY_HEADS * LINEAR_DIM, VALUE_HEADS * LINEAR_DIM
    prefix += "linear_attn."
    matrix(prefix + "in_proj_qkv.weight", 2 * keys + values, HIDDEN)
    matrix(prefix + "in_proj_z.weight", values, HIDDEN)
    matrix(prefix + "in_proj_a.weight", VALUE_HEADS, HIDDEN)
    matrix(prefix + "in_proj_b.weight", VALUE_HEADS, HIDDEN)
    matrix(prefix + "conv1d.weight", 2 * keys + values, 1, KERNEL)
    matrix(prefix + "out_proj.weight", HIDDEN, values)
    put(prefix + "A_log", np.log(random.uniform(1, 16, VALUE_HEADS)))
    put(prefix + "dt_bias", np.ones(VALUE_HEADS))
    put(prefix + "norm.weight", 1 + 0.1 * random.standard_normal(LINEAR_DIM))


def _full_attention(prefix: str, put: Put, matrix: Matrix, norm: Norm, random: np.random.Generator) -> None:
    prefix += "self_attn."
    matrix(prefix + "q_proj.weight", 2 * HEADS * HEAD_DIM, HIDDEN)  # queries and their gates
    matrix(prefix + "k_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN)
    matrix(prefix + "v_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN)
    matrix(prefix + "o_proj.weight", HIDDEN, HEADS * HEAD_DIM)
    norm(prefix + "q_norm.weight", HEAD_DIM)
    norm(prefix + "k_norm.weight", HEAD_DIM)


def write_checkpoint(folder: Path) -> None:
    """Writes the whole checkpoint into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for name, content in {
        "config.json": config,
        "generation_config.json": {"eos_token_id": eos},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), build_weights(config), {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("folder", type=Path, help="where to write it")
    folder = parser.parse_args().folder
    write_checkpoint(folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: a random Qwen3.5-MoE model, {size / 1e6:.1f} MB, {EXPERTS} experts in {LAYERS} layers")


if __name__ == "__main__":
    main()
