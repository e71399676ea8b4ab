"""Multi-head latent attention of DeepSeek-V2 (arXiv:2405.04434): all heads' keys and values come from one latent.

A token leaves its normalized latent and one rotated key behind, whatever the number of heads. ``kv_b_proj`` makes a
head's key and value from the latent: k = K c, v = V c. There are two ways to attend, equal but for rounding:

    expanded  scores = q . (K c),      output = sum of weight * (V c):  keys and values of every token so far are made
    absorbed  scores = (K^T q) . c,    output = V (sum of weight * c):  queries go into the latent space, and come back
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import head_products, matmul, quantized_matmul
from mlx_flashmoe.models.cache import LatentCache
from mlx_flashmoe.models.config import BaseConfig, mixed_at_once
from mlx_flashmoe.models.norm import RMSNorm
from mlx_flashmoe.models.rope import RotaryEmbedding
from mlx_flashmoe.models.together import Together

LATENT_EPS = 1e-6  # of the norms within attention, whatever rms_norm_eps says; as in transformers
HELD = 1 << 25  # bytes of the heads computed at once: their keys, values, scores and what goes with them


@dataclass(frozen=True)
class LatentConfig(BaseConfig):
    """The settings of latent attention, with their names in config.json.

    Attributes:
        q_lora_rank: dims of the latent that queries come from; None if they come from the residual.
        kv_lora_rank: dims of the latent that keys and values come from.
        qk_nope_head_dim: dims of a head's query and key that come from latents, and are not rotated.
        qk_rope_head_dim: dims that are rotated; of the key they are the same for all heads.
        rope_interleave: dims 2i and 2i + 1 are rotated together.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        # What is rotated is a head of its own to the rotary embedding, and every head has its own key and value.
        own = {"head_dim": text["qk_rope_head_dim"], "num_key_value_heads": text["num_attention_heads"]}
        interleave = text.get("rope_interleave")
        return {
            **super().derive({**text, **own}),
            **own,
            "q_lora_rank": text.get("q_lora_rank"),
            "rope_interleave": interleave is None or interleave,
        }

    @property
    def cached(self) -> int:
        """Values that a token leaves behind in a layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        # In a long context a single head's keys, values and scores are more than HELD.
        head = self.held(mixed_at_once(), tokens, absorbed=False)
        return super().kv_bytes(tokens, dtype) + max(0, head * dtype.size - HELD)

    def _layer_kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        held = -(-tokens // LatentCache.step) * LatentCache.step
        return self.cached * dtype.size * held

    def mixing_bytes(self, dtype: mx.Dtype) -> int:
        # Queries as projected and rotated; outputs by head, and as they leave.
        width = self.qk_nope_head_dim + 2 * self.qk_rope_head_dim + 2 * self.v_head_dim
        return self.num_attention_heads * width * dtype.size + HELD // mixed_at_once()

    def held(self, tokens: int, keys: int, absorbed: bool) -> int:
        """Values that a head holds while ``tokens`` attend to ``keys``."""
        scores = 3 * tokens * keys  # masked, and their softmax
        if absorbed:  # queries and outputs in the latent space, one by one and together
            return scores + tokens * 2 * (self.cached + self.kv_lora_rank)
        made = self.qk_nope_head_dim + self.v_head_dim
        return (
            scores + keys * (2 * made + self.qk_rope_head_dim) + tokens * 2 * (made + self.qk_rope_head_dim)
        )

    def absorbs(self, tokens: int, keys: int) -> bool:
        """Tells whether absorbing takes no more multiplications than expanding, where ``tokens`` attend to ``keys``.

        For each pair of a token and a key the latent is several times wider than a head, but a head's keys and values
        have to be made for every call: they are not kept. At the shape of DeepSeek-V3, up to 170 tokens absorb where
        the context is long, up to 46 in a prompt of 64.
        """
        made = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        wider = 2 * self.kv_lora_rank - self.qk_nope_head_dim - self.v_head_dim
        return tokens * (wider * keys + made) <= made * keys


class LatentAttention(nn.Module):
    """x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LatentConfig):
        super().__init__()
        self._config = config
        dims, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.key_dim = config.qk_nope_head_dim
        queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(dims, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(dims, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dims, config.cached, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (self.key_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, dims, bias=bias)
        self.rope = RotaryEmbedding(config.rope, config.rope_interleave)
        yarn = config.rope.yarn
        self._scale = (queries // heads) ** -0.5 * (yarn.score_factor if yarn is not None else 1.0)
        self._projections = Together(
            self, "q_proj" if config.q_lora_rank is None else "q_a_proj", "kv_a_proj_with_mqa"
        )

    def __call__(self, x: mx.array, cache: LatentCache | None) -> mx.array:
        B, T, _ = x.shape
        offset = cache.offset if cache is not None else 0
        q, latents = self._projections(x)
        if self._config.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.reshape(B, T, self._config.num_attention_heads, -1).transpose(0, 2, 1, 3)
        q, rotated = mx.split(q, [self.key_dim], axis=-1)
        latent, key = mx.split(latents[:, None], [self._config.kv_lora_rank], axis=-1)
        latents = mx.concatenate([self.kv_a_layernorm(latent), self.rope(key, offset)], axis=-1)
        if cache is not None:
            latents = cache.update(latents)
        y = self._attend(q, self.rope(rotated, offset), latents)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(B, T, -1))

    def make_cache(self) -> LatentCache:
        return LatentCache()

    def _attend(self, q: mx.array, rotated: mx.array, latents: mx.array) -> mx.array:
        """Queries [B, heads, T, …], what is not rotated and what is, against latents [B, 1, S, latent + rotated].

        As many heads at once as HELD allows, and at least one.

        Returns:
            [B, heads, T, v_head_dim].
        """
        B, heads, T, _ = q.shape
        keys = latents.shape[2]
        absorbs = self._config.absorbs(T, keys)
        attend: Callable[..., mx.array] = self._absorbed if absorbs else self._expanded
        step = max(1, HELD // (B * self._config.held(T, keys, absorbs) * q.dtype.size))
        ys = []
        for first in range(0, heads, step):
            some = slice(first, first + step)
            ys.append(attend(q[:, some], rotated[:, some], latents, some))
            if T > 1 and step < heads:  # one token's layers are evaluated together: see Decode
                mx.eval(ys[-1])
        return ys[0] if len(ys) == 1 else mx.concatenate(ys, axis=1)

    def _absorbed(self, q: mx.array, rotated: mx.array, latents: mx.array, heads: slice) -> mx.array:
        B, count, T, _ = q.shape
        q = mx.concatenate([self._per_head(q, heads, keys=True), rotated], axis=-1)
        # All heads are rows of one product, so that latents are read once.
        y = self._weighted(
            q.reshape(B, 1, count * T, -1), latents, latents[..., : self._config.kv_lora_rank], T
        )
        return self._per_head(y.reshape(B, count, T, -1), heads, keys=False)

    def _expanded(self, q: mx.array, rotated: mx.array, latents: mx.array, heads: slice) -> mx.array:
        B, count, T, _ = q.shape
        latent, key = mx.split(latents, [self._config.kv_lora_rank], axis=-1)
        made = self._made(latent[:, 0], heads).reshape(B, latents.shape[2], count, -1).transpose(0, 2, 1, 3)
        k, v = mx.split(made, [self.key_dim], axis=-1)
        k = mx.concatenate([k, mx.broadcast_to(key, (*k.shape[:3], key.shape[-1]))], axis=-1)
        return self._weighted(mx.concatenate([q, rotated], axis=-1), k, v, T)

    def _weighted(self, q: mx.array, k: mx.array, v: mx.array, tokens: int) -> mx.array:
        """Returns v [B, h, S, e] weighted by the products of q [B, h, rows, d] with k [B, h, S, d]: [B, h, rows, e].

        By plain products: on Metal MLX has no fused kernel for many tokens where keys and values differ in width, nor
        for heads as wide as a latent.

        Args:
            tokens: the rows are those of the last tokens, head after head.
        """
        scores = matmul(self._scale * q, k.swapaxes(-1, -2))
        if tokens > 1:
            shape, keys = scores.shape, k.shape[2]
            seen = mx.arange(keys) <= mx.arange(keys - tokens, keys)[:, None]
            scores = scores.reshape(*shape[:2], -1, tokens, keys)
            scores = mx.where(seen, scores, mx.array(-mx.inf, scores.dtype)).reshape(shape)
        return matmul(mx.softmax(scores, axis=-1, precise=True), v)

    def _made(self, latent: mx.array, heads: slice) -> mx.array:
        """Keys, without what is rotated, and values of some heads.

        Args:
            latent: [B, S, kv_lora_rank].

        Returns:
            [B, S, heads * (key + value)], each head's key before its value.
        """
        m = self.kv_b_proj
        each = self.key_dim + self._config.v_head_dim
        rows = slice(heads.start * each, heads.stop * each)
        if isinstance(m, nn.QuantizedLinear):
            assert m.biases is not None  # affine quantization has them
            parts = m.weight[rows], m.scales[rows], m.biases[rows]
            return quantized_matmul(latent, *parts, m.group_size, m.bits)
        return matmul(latent, m.weight[rows].T)

    def _per_head(self, x: mx.array, heads: slice, keys: bool) -> mx.array:
        """x [B, heads, T, …] times a matrix of each head: of queries into the latent space by what makes ``keys``, or
        of outputs there into values."""
        m, rows = self.kv_b_proj, slice(self.key_dim) if keys else slice(self.key_dim, None)

        def cut(part: mx.array) -> mx.array:
            return part.reshape(self._config.num_attention_heads, -1, part.shape[-1])[heads, rows]

        if isinstance(m, nn.QuantizedLinear):
            assert m.biases is not None
            parts = cut(m.weight), cut(m.scales), cut(m.biases)
            return head_products(x, *parts, m.group_size, m.bits, transpose=not keys)
        weight = cut(m.weight)
        return matmul(x, weight if keys else weight.swapaxes(-1, -2))
