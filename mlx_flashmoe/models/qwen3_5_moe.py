"""Qwen3.5-MoE: gated delta net layers, every fourth gated attention, each followed by routed experts.

Checked against ``Qwen3_5MoeForCausalLM`` of Hugging Face transformers. The gated delta rule is that of Yang
et al., "Gated Delta Networks" (arXiv:2412.06464). Parameter paths are the names in a converted folder's
safetensors files; the routed experts are not parameters, they come from ``experts``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.kernels.gated_delta import gated_delta_update
from mlx_flashmoe.models.cache import Cache, KVCache, RecurrentCache
from mlx_flashmoe.models.fused import decay_and_beta, gated, plus_gated, scale_and_gate, silu, swiglu


class Experts(Protocol):
    """What this model asks of a layer's routed experts; see ``StreamedExperts``."""

    def __call__(
        self, x: mx.array, ids: mx.array, weights: mx.array, likely: mx.array | None = None
    ) -> mx.array: ...

    def wants_guess(self, tokens: int) -> bool: ...


@dataclass(frozen=True)
class Config:
    """The fields of config.json's text_config that matter. Nothing has a default that a checkpoint sets."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rms_norm_eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_dims: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    shared_expert_intermediate_size: int
    layer_types: tuple[str, ...]
    attention_bias: bool
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Config:
        """From a whole config.json (with a text_config) or the text model's own."""
        text = {**config, **config.get("text_config", {})}
        try:
            rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
            layers = int(text["num_hidden_layers"])
            if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
                raise FormatError(f"config.json: rope type {rope.get('rope_type')!r} is not supported")
            if text.get("hidden_act", "silu") != "silu":
                raise FormatError(
                    f"config.json: hidden_act {text['hidden_act']!r} is not supported, only silu"
                )
            interval = int(text.get("full_attention_interval", 4))
            pattern = text.get("layer_types") or [
                "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)
            ]
            partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
            derived: dict[str, Any] = {
                "rope_theta": float(rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]),
                "rope_dims": int(int(text["head_dim"]) * partial),
                "layer_types": tuple(pattern),
                "attention_bias": bool(text.get("attention_bias", False)),
                "tie_word_embeddings": bool(
                    config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
                ),
                "dtype": str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"),
            }
            given: dict[str, Any] = {f.name: text[f.name] for f in fields(cls) if f.name not in derived}
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(f"config.json: {e!r} is missing or malformed") from None
        if len(pattern) != layers or not set(pattern) <= {"linear_attention", "full_attention"}:
            raise FormatError(f"config.json: layer_types does not describe {layers} layers")
        return cls(**given, **derived)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / rms(x) * weight in float32, in x's dtype."""
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


class RMSNorm(nn.Module):
    """Zero-centred in the checkpoint; here ``weight`` is 1 + that, held in float32 because bfloat16 has no
    room for it."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """rms_norm(x) * weight, then times silu(gate) in float32."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return scale_and_gate(rms_norm(x, None, self.eps), self.weight, gate)


class GatedDeltaNet(nn.Module):
    """Linear attention with a recurrent state: x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Config):
        super().__init__()
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        channels = 2 * keys + values
        self.splits = [keys, 2 * keys]
        self.in_proj_qkv = nn.Linear(config.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, values, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False
        )
        self.A_log = mx.zeros((self.value_heads,))
        self.dt_bias = mx.ones((self.value_heads,))
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, cache: RecurrentCache | None) -> mx.array:
        B, T, _ = x.shape
        mixed = self._convolve(self.in_proj_qkv(x), cache)
        q, k, v = mx.split(mixed, self.splits, axis=-1)
        q = l2_normalize(q.reshape(B, T, self.key_heads, self.key_dim), self.key_dim**-0.5)
        k = l2_normalize(k.reshape(B, T, self.key_heads, self.key_dim))
        v = v.reshape(B, T, self.value_heads, self.value_dim).astype(mx.float32)
        decay, beta = decay_and_beta(self.in_proj_a(x), self.in_proj_b(x), self.A_log, self.dt_bias)
        state = cache.recurrent if cache is not None else None
        if state is None:
            state = mx.zeros((B, self.value_heads, self.value_dim, self.key_dim))
        y, state = gated_delta_update(q, k, v, decay, beta, state)
        if cache is not None:
            cache.recurrent = state
            cache.offset += T
        z = self.in_proj_z(x).reshape(B, T, self.value_heads, self.value_dim)
        return self.out_proj(self.norm(y.astype(x.dtype), z).reshape(B, T, -1))

    def _convolve(self, x: mx.array, cache: RecurrentCache | None) -> mx.array:
        """Causal depthwise convolution and silu; [B, T, channels] -> the same."""
        past = self.conv1d.weight.shape[1] - 1
        before = cache.conv if cache is not None else None
        if before is None:
            before = mx.zeros((x.shape[0], past, x.shape[2]), dtype=x.dtype)
        x = mx.concatenate([before, x], axis=1)
        if cache is not None:
            # A copy: a slice would keep the whole prompt's activations alive.
            cache.conv = mx.contiguous(x[:, x.shape[1] - past :])
        return silu(self.conv1d(x))


def l2_normalize(x: mx.array, scale: float = 1.0) -> mx.array:
    """scale * x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32.

    As an RMS norm, which divides by the root of the mean instead of the sum.
    """
    dims = x.shape[-1]
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6 / dims) * (scale * dims**-0.5)


class Attention(nn.Module):
    """Grouped-query attention with an output gate and rotary embedding of the first dims of each head."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rope_dims = config.head_dim, config.rope_dims
        bias = config.attention_bias
        # Each head's query and gate lie next to each other.
        self.q_proj = nn.Linear(config.hidden_size, 2 * self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        exponent = mx.arange(0, self.rope_dims, 2, dtype=mx.float32) / self.rope_dims
        self._periods = config.rope_theta**exponent

    def __call__(self, x: mx.array, cache: KVCache | None) -> mx.array:
        B, T, _ = x.shape
        q, gate = mx.split(self.q_proj(x).reshape(B, T, self.heads, -1), 2, axis=-1)
        k = self.k_proj(x).reshape(B, T, self.kv_heads, -1)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)
        offset = cache.offset if cache is not None else 0
        q = self._rope(self.q_norm(q).transpose(0, 2, 1, 3), offset)
        k = self._rope(self.k_norm(k).transpose(0, 2, 1, 3), offset)
        if cache is not None:
            k, v = cache.update(k, v)
        y = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=self.head_dim**-0.5, mask="causal" if T > 1 else None
        )
        y = y.transpose(0, 2, 1, 3).reshape(B, T, -1)
        return self.o_proj(gated(y, gate.reshape(B, T, -1)))

    def _rope(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x, self.rope_dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )


class SharedExpert(nn.Module):
    """The expert every token uses: down(silu(gate(x)) * up(x))."""

    def __init__(self, dims: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden, bias=False)
        self.up_proj = nn.Linear(dims, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class MoE(nn.Module):
    """Router, routed experts, shared expert: x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Config, experts: Experts, active: int):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.shared_expert = SharedExpert(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self._experts = experts
        self._active = active

    def __call__(self, x: mx.array, likely: mx.array | None = None) -> mx.array:
        ids, weights = self.route(x)
        shared = self.shared_expert(x)
        return plus_gated(self._experts(x, ids, weights, likely), shared, self.shared_expert_gate(x))

    def wants_guess(self, x: mx.array) -> bool:
        return self._experts.wants_guess(x.shape[0] * x.shape[1])

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token, ids and weights [..., K]: the K most probable, their weights summing to 1."""
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        ids = mx.argpartition(scores, kth=-self._active, axis=-1)[..., -self._active :]
        weights = mx.take_along_axis(scores, ids, axis=-1)
        return ids, weights / weights.sum(axis=-1, keepdims=True)


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, kind: str, experts: Experts, active: int):
        super().__init__()
        self.is_linear = kind == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.mlp = MoE(config, experts, active)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: Cache | None, following: DecoderLayer | None) -> mx.array:
        mix: Any = self.linear_attn if self.is_linear else self.self_attn
        x = x + mix(self.input_layernorm(x), cache)
        likely = None
        if following is not None and self.mlp.wants_guess(x):
            likely = following.guess(x)
        return x + self.mlp(self.post_attention_layernorm(x), likely)

    def guess(self, x: mx.array) -> mx.array:
        """The experts this layer will probably want, from an earlier residual x: ids [..., K]."""
        return self.mlp.route(self.post_attention_layernorm(x))[0]


class Decoder(nn.Module):
    def __init__(self, config: Config, experts: Callable[[int], Experts], active: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            DecoderLayer(config, kind, experts(i), active) for i, kind in enumerate(config.layer_types)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list[Cache] | None) -> mx.array:
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            following = self.layers[i + 1] if i + 1 < len(self.layers) else None
            x = layer(x, cache[i] if cache is not None else None, following)
        return self.norm(x)


class Model(nn.Module):
    """The language model.

    Args:
        config: of the checkpoint.
        experts: layer number -> that layer's routed experts, a callable (x, ids, weights) -> y.
        active_experts: routed experts a token uses; the checkpoint's own number if None.
    """

    def __init__(self, config: Config, experts: Callable[[int], Experts], active_experts: int | None = None):
        super().__init__()
        self.config = config
        self.model = Decoder(config, experts, active_experts or config.num_experts_per_tok)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: list[Cache] | None = None) -> mx.array:
        """tokens [B, T] -> logits [B, T, vocab]; ``cache`` (of ``make_cache``) is updated."""
        x = self.model(tokens, cache)
        return self.model.embed_tokens.as_linear(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        return [RecurrentCache() if layer.is_linear else KVCache() for layer in self.model.layers]

    @staticmethod
    def keep_float32(path: str) -> bool:
        """Whether a parameter stays in float32 whatever the activations' dtype."""
        return path.endswith((".A_log", ".dt_bias")) or (
            path.endswith("norm.weight") and not path.endswith("linear_attn.norm.weight")
        )


def kv_bytes(config: Config, tokens: int, dtype: mx.Dtype) -> int:
    """Bytes of the cache of one sequence of ``tokens`` tokens."""
    attention = 2 * config.num_key_value_heads * config.head_dim * dtype.size
    attention *= -(-tokens // KVCache.step) * KVCache.step
    values = config.linear_num_value_heads * config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim + values
    recurrent = values * config.linear_key_head_dim * 4
    recurrent += (config.linear_conv_kernel_dim - 1) * channels * dtype.size
    return sum(attention if kind == "full_attention" else recurrent for kind in config.layer_types)


def activation_bytes(config: Config, active: int, dtype: mx.Dtype) -> int:
    """Bytes a prompt's token takes while a chunk goes through a layer, at the widest place of all."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    # Before and after the convolution, and the delta rule's inputs and outputs in float32.
    mixing = (5 * (2 * keys + values) + 2 * values) * dtype.size + (2 * keys + 2 * values) * 4
    # One row for each of a token's experts, and their sum.
    experts = (active + 2) * config.hidden_size * dtype.size + 2 * config.hidden_size * 4
    return max(mixing, experts)
