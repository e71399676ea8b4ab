"""Small random Qwen3.5-MoE checkpoints in every published layout, written with numpy alone.

The same seed gives the same model in each layout: what differs is names, stacking, and whether norms hold
weight - 1 and convolutions are [C, 1, K].
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS = ("fused", "per_expert", "stacked")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")


@dataclass(frozen=True)
class Array:
    """An array as safetensors stores it: dtype by its name there, and bytes. numpy knows no bfloat16."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def float32(self) -> np.ndarray:
        if self.dtype == "BF16":
            values = (np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(self.data, {"F16": np.float16, "F32": np.float32}[self.dtype])
        return values.astype(np.float32).reshape(self.shape)


def array(values: np.ndarray, dtype: str) -> Array:
    """Rounds float32 values to BF16 (nearest, ties to even), F16 or F32; keeps U32 as it is."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    else:
        kind = {"F16": np.float16, "F32": np.float32, "U32": np.uint32}[dtype]
        data = np.ascontiguousarray(values, kind).tobytes()
    return Array(dtype, tuple(values.shape), data)


def save_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, a in tensors.items():
        end = position + len(a.data)
        header[name] = {"dtype": a.dtype, "shape": list(a.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.data for a in tensors.values()))


@dataclass
class Spec:
    """A small model. The defaults have both kinds of attention and dims that 32 and 64 divide."""

    hidden: int = 128
    inner: int = 64
    shared: int = 64
    experts: int = 4
    per_token: int = 2
    layers: int = 2
    vocab: int = 96
    heads: int = 2
    kv_heads: int = 1
    head: int = 32
    key_heads: int = 1
    value_heads: int = 2
    key_head: int = 32
    value_head: int = 32
    kernel: int = 4
    tied: bool = False
    attention_bias: bool = False
    interval: int = 2
    dtype: str = "BF16"
    seed: int = 0
    text_only: bool = False  # model_type qwen3_5_moe_text: a flat config.json, no vision, no wrapping names
    extras: bool = True  # vision and MTP tensors too
    overrides: dict[str, Any] = field(default_factory=dict)  # into the text configuration

    def config(self) -> dict[str, Any]:
        text = {
            "attention_bias": self.attention_bias,
            "eos_token_id": 1,
            "head_dim": self.head,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "layer_types": [
                "linear_attention" if (i + 1) % self.interval else "full_attention"
                for i in range(self.layers)
            ],
            "linear_conv_kernel_dim": self.kernel,
            "linear_key_head_dim": self.key_head,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "linear_value_head_dim": self.value_head,
            "max_position_embeddings": 4096,
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000.0,
                "rope_type": "default",
            },
            "shared_expert_intermediate_size": self.shared,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            **self.overrides,
        }
        if self.text_only:
            return {"architectures": ["Qwen3_5MoeForCausalLM"], **text}
        return {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "text_config": text,
            "tie_word_embeddings": self.tied,
            "vision_config": {"depth": 1, "model_type": "qwen3_5_moe"},
        }

    def weights(self) -> dict[str, Array]:
        """All of the language model by the names of the converted folder, norms as weight - 1, conv [C, 1, K].

        Experts are ``model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight``.
        """
        rng = np.random.default_rng(self.seed)
        out: dict[str, Array] = {}

        def add(name: str, *shape: int, scale: float | None = None) -> None:
            scale = shape[-1] ** -0.5 if scale is None else scale
            out[name] = array((rng.standard_normal(shape) * scale).astype(np.float32), self.dtype)

        keys, values = self.key_heads * self.key_head, self.value_heads * self.value_head
        add("model.embed_tokens.weight", self.vocab, self.hidden, scale=1.0)
        add("model.norm.weight", self.hidden, scale=0.1)
        if not self.tied:
            add("lm_head.weight", self.vocab, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            if (i + 1) % self.interval:
                at = f"{layer}.linear_attn"
                add(f"{at}.in_proj_qkv.weight", 2 * keys + values, self.hidden)
                add(f"{at}.in_proj_z.weight", values, self.hidden)
                add(f"{at}.in_proj_a.weight", self.value_heads, self.hidden)
                add(f"{at}.in_proj_b.weight", self.value_heads, self.hidden)
                add(f"{at}.out_proj.weight", self.hidden, values)
                add(f"{at}.conv1d.weight", 2 * keys + values, 1, self.kernel)
                add(f"{at}.A_log", self.value_heads, scale=1.0)
                add(f"{at}.dt_bias", self.value_heads, scale=1.0)
                add(f"{at}.norm.weight", self.value_head, scale=1.0)
            else:
                at = f"{layer}.self_attn"
                shapes = {
                    "q_proj": (2 * self.heads * self.head, self.hidden),
                    "k_proj": (self.kv_heads * self.head, self.hidden),
                    "v_proj": (self.kv_heads * self.head, self.hidden),
                    "o_proj": (self.hidden, self.heads * self.head),
                }
                for name, shape in shapes.items():
                    add(f"{at}.{name}.weight", *shape)
                    if self.attention_bias:
                        add(f"{at}.{name}.bias", shape[0], scale=0.1)
                add(f"{at}.q_norm.weight", self.head, scale=0.1)
                add(f"{at}.k_norm.weight", self.head, scale=0.1)
            add(f"{layer}.input_layernorm.weight", self.hidden, scale=0.1)
            add(f"{layer}.post_attention_layernorm.weight", self.hidden, scale=0.1)
            add(f"{layer}.mlp.gate.weight", self.experts, self.hidden)
            add(f"{layer}.mlp.shared_expert.gate_proj.weight", self.shared, self.hidden)
            add(f"{layer}.mlp.shared_expert.up_proj.weight", self.shared, self.hidden)
            add(f"{layer}.mlp.shared_expert.down_proj.weight", self.hidden, self.shared)
            add(f"{layer}.mlp.shared_expert_gate.weight", 1, self.hidden)
            for e in range(self.experts):
                at = f"{layer}.mlp.experts.{e}"
                add(f"{at}.gate_proj.weight", self.inner, self.hidden)
                add(f"{at}.up_proj.weight", self.inner, self.hidden)
                add(f"{at}.down_proj.weight", self.hidden, self.inner)
        return out

    def published(self, layout: str) -> dict[str, Array]:
        """The tensors as a checkpoint of that layout has them (stacked: unquantized, as mlx-lm writes them)."""
        weights = self.weights()
        if layout == "fused":
            weights = stack(weights, self, fuse=True)
        elif layout == "stacked":
            weights = {name: self._mlx(name, a) for name, a in stack(weights, self, fuse=False).items()}
        named = {self._publish(name, layout): a for name, a in weights.items()}
        if self.extras and not self.text_only:
            extra = array(np.ones((3, 5), np.float32), self.dtype)
            vision = "vision_tower" if layout == "stacked" else "model.visual"
            named[f"{vision}.blocks.0.attn.qkv.weight"] = extra
            named[f"{vision}.pos_embed.weight"] = extra
            if layout != "stacked":
                named["mtp.fc.weight"] = extra
        return named

    def _publish(self, name: str, layout: str) -> str:
        if layout == "stacked":
            return f"language_model.{name}"
        if self.text_only or not name.startswith("model."):
            return name
        return "model.language_model." + name.removeprefix("model.")

    def _mlx(self, name: str, a: Array) -> Array:
        if name.endswith("conv1d.weight"):
            return Array(a.dtype, (a.shape[0], a.shape[2], 1), a.data)
        if name.endswith(NORMS) or name == "model.norm.weight":
            return array(a.float32() + 1, a.dtype)
        return a


def stack(weights: dict[str, Array], spec: Spec, *, fuse: bool) -> dict[str, Array]:
    """Experts of a layer in one tensor: gate_up_proj and down_proj (fuse), or switch_mlp's three."""
    out = {name: a for name, a in weights.items() if ".mlp.experts." not in name}
    for i in range(spec.layers):
        at = f"model.layers.{i}.mlp"

        def stacked(*projections: str, at: str = at) -> Array:
            parts = [
                [weights[f"{at}.experts.{e}.{p}_proj.weight"] for p in projections]
                for e in range(spec.experts)
            ]
            rows = sum(a.shape[0] for a in parts[0])
            shape = (spec.experts, rows, parts[0][0].shape[1])
            return Array(spec.dtype, shape, b"".join(a.data for expert in parts for a in expert))

        if fuse:
            out[f"{at}.experts.gate_up_proj"] = stacked("gate", "up")
            out[f"{at}.experts.down_proj"] = stacked("down")
        else:
            for p in ("gate", "up", "down"):
                out[f"{at}.switch_mlp.{p}_proj.weight"] = stacked(p)
    return out


def write_checkpoint(
    folder: Path,
    spec: Spec | None = None,
    layout: str = "fused",
    *,
    shards: int = 1,
    tensors: dict[str, Array] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint folder: config.json, a tokenizer stand-in, and one file, or shards and an index."""
    spec = spec or Spec()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = spec.published(layout) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(spec.config() if config is None else config, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    if shards == 1:
        save_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_safetensors(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def quantized(
    tensors: dict[str, Array], bits: int, group_size: int, exceptions: dict[str, tuple[int, int] | None]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """A stacked checkpoint quantized as mlx-lm does it, and the ``quantization`` of its config.json.

    Routers and shared-expert gates are at 8 bits in groups of 64. ``exceptions``: module path, or the end of
    one -> (bits, group size), or None for unquantized.
    """
    import mlx.core as mx

    out: dict[str, Array] = {}
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "mode": "affine"}
    for name, a in tensors.items():
        path = name.removesuffix(".weight")
        matrix = len(a.shape) > 1 and not path.endswith("conv1d") and not name.startswith("vision_tower")
        if not matrix:
            out[name] = a
            continue
        mine: tuple[int, int] | None = (bits, group_size)
        if path.endswith(("mlp.gate", "shared_expert_gate")):
            mine = (8, 64)
        mine = next((q for end, q in exceptions.items() if path.endswith(end)), mine)
        if mine is None:
            settings[path] = False
            out[name] = a
            continue
        if mine != (bits, group_size):
            settings[path] = {"bits": mine[0], "group_size": mine[1]}
        for part, value in zip(("weight", "scales", "biases"), mx.quantize(to_mlx(a), mine[1], mine[0])):
            kind = "U32" if part == "weight" else a.dtype
            out[f"{path}.{part}"] = Array(kind, tuple(value.shape), to_bytes(value))
    return out, settings


def to_mlx(a: Array) -> Any:
    """The same array as an mx.array, bit for bit."""
    import mlx.core as mx

    carrier, dtype = {
        "BF16": (np.uint16, mx.bfloat16),
        "F16": (np.uint16, mx.float16),
        "F32": (np.uint32, mx.float32),
        "U32": (np.uint32, mx.uint32),
    }[a.dtype]
    return mx.array(np.frombuffer(a.data, carrier).reshape(a.shape)).view(dtype)


def to_bytes(value: Any) -> bytes:
    """The bytes of an mx.array of 2- or 4-byte elements."""
    import mlx.core as mx

    return np.array(value.view(mx.uint16 if value.dtype.size == 2 else mx.uint32)).tobytes()


def random_weights(config: dict[str, Any], dtype: str = "F32", seed: int = 0) -> dict[str, Array]:
    """Weights of any architecture, by the names that its modules have, one tensor an expert's matrix."""
    from mlx_flashmoe.convert.binding import describe

    rng = np.random.default_rng(seed)
    architecture = describe(config["model_type"], config, "config.json")

    def random(shape: tuple[int, ...]) -> Array:
        values = rng.standard_normal(shape).astype(np.float32)
        return array(1 + values / 10 if len(shape) == 1 else values * shape[-1] ** -0.5, dtype)

    out = {}
    for module in architecture.modules:
        name = module.path if module.kind == "plain" else f"{module.path}.weight"
        out[name] = random(module.shape)
    shapes = [(architecture.intermediate_size, architecture.hidden_size)] * 2
    shapes.append((architecture.hidden_size, architecture.intermediate_size))
    for layer in architecture.moe_layers:
        for e in range(architecture.num_experts):
            for p, shape in zip(("gate", "up", "down"), shapes, strict=True):
                out[f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"] = random(shape)
    return out
