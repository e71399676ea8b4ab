"""Grouped-query attention, plain and with an output gate."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.models.cache import KVCache
from mlx_flashmoe.models.config import BaseConfig
from mlx_flashmoe.models.fused import gated
from mlx_flashmoe.models.norm import RMSNorm
from mlx_flashmoe.models.rope import RotaryEmbedding
from mlx_flashmoe.models.together import Together


class Attention(nn.Module):
    """x [B, T, D] -> [B, T, D].

    Args:
        output_bias: of ``o_proj``; as the other projections if None.
        normalized: what of queries and of keys has an RMS norm of its own: each head, all heads together, or nothing.
    """

    def __init__(
        self,
        config: BaseConfig,
        output_bias: bool | None = None,
        normalized: Literal["head", "heads"] | None = "head",
    ):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        dims, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(dims, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dims, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dims, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(
            self.heads * self.head_dim, dims, bias=bias if output_bias is None else output_bias
        )
        self._normalized = normalized
        if normalized is not None:
            queries, keys = (self.heads, self.kv_heads) if normalized == "heads" else (1, 1)
            self.q_norm = RMSNorm(queries * self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(keys * self.head_dim, config.rms_norm_eps)
        self.rope = RotaryEmbedding(config.rope)
        self._projections = Together(self, "q_proj", "k_proj", "v_proj")

    def __call__(self, x: mx.array, cache: KVCache | None) -> mx.array:
        q, k, v = self._projections(x)
        return self.o_proj(self.attend(q.reshape(*x.shape[:2], self.heads, -1), k, v, cache))

    def make_cache(self) -> KVCache:
        return KVCache()

    def attend(self, q: mx.array, k: mx.array, v: mx.array, cache: KVCache | None) -> mx.array:
        """Queries [B, T, heads, head_dim] against keys and values [B, T, kv_heads * head_dim] and what came before.

        Returns:
            [B, T, heads * head_dim].
        """
        B, T, _ = k.shape
        k = k.reshape(B, T, self.kv_heads, -1)
        v = v.reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)
        offset = cache.offset if cache is not None else 0
        if self._normalized == "heads":
            q = self.q_norm(q.flatten(-2)).reshape(q.shape)
            k = self.k_norm(k.flatten(-2)).reshape(k.shape)
        elif self._normalized == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.rope(q.transpose(0, 2, 1, 3), offset)
        k = self.rope(k.transpose(0, 2, 1, 3), offset)
        if cache is not None:
            k, v = cache.update(k, v)
        y = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=self.head_dim**-0.5, mask="causal" if T > 1 else None
        )
        return y.transpose(0, 2, 1, 3).reshape(B, T, -1)


class GatedAttention(Attention):
    """Attention whose output is multiplied by the sigmoid of a gate that ``q_proj`` gives beside the queries."""

    def __init__(self, config: BaseConfig):
        super().__init__(config)
        # Each head's query and gate lie next to each other.
        queries_and_gates = 2 * self.heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries_and_gates, bias=config.attention_bias)

    def __call__(self, x: mx.array, cache: KVCache | None) -> mx.array:
        B, T, _ = x.shape
        q, k, v = self._projections(x)
        q, gate = mx.split(q.reshape(B, T, self.heads, -1), 2, axis=-1)
        return self.o_proj(gated(self.attend(q, k, v, cache), gate.reshape(B, T, -1)))
