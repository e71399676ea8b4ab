"""The fields of config.json that matter to every architecture here, checked as they are read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import mlx.core as mx

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.cache import KVCache
from mlx_flashmoe.models.rope import Rope

C = TypeVar("C", bound="BaseConfig")


@dataclass(frozen=True)
class BaseConfig:
    """Fields have their names in config.json. None has a default that a checkpoint sets.

    Attributes:
        context_length: tokens of prompt and answer the model is made for, at most; None if config.json does not say.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rms_norm_eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    context_length: int | None
    num_experts: int
    num_experts_per_tok: int
    attention_bias: bool
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_dict(cls: type[C], config: dict[str, Any]) -> C:
        """From a whole config.json, whose text_config, if it has one, describes the language model.

        Raises:
            FormatError: a field is missing, malformed, or has a value that is not supported.
        """
        text = {**config, **config.get("text_config", {})}
        try:
            derived = cls.derive(text)
            # The model's own flag is the outer one; transformers goes by it, and so do published files.
            derived["tie_word_embeddings"] = bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            )
            given: dict[str, Any] = {f.name: text[f.name] for f in fields(cls) if f.name not in derived}
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise FormatError(f"config.json: {e!r} is missing or malformed") from None
        return cls(**given, **derived)

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        """The fields that are not simply looked up; architectures add theirs."""
        if text.get("hidden_act", "silu") != "silu":
            raise FormatError(f"config.json: hidden_act {text['hidden_act']!r} is not supported, only silu")
        # Layers without experts: published checkpoints of these architectures have none.
        if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
            raise FormatError(
                "config.json: layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"
            )
        rope = Rope.from_config(text)
        return {
            "rope": rope,
            "context_length": rope.context_length(text),
            "attention_bias": bool(text.get("attention_bias", False)),
            "dtype": str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"),
        }

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        """Bytes of the cache of one sequence of ``tokens`` tokens."""
        return self.num_hidden_layers * self._layer_kv_bytes(tokens, dtype)

    def _layer_kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        held = -(-tokens // KVCache.step) * KVCache.step
        return 2 * self.num_key_value_heads * self.head_dim * dtype.size * held

    def activation_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes a prompt's token takes while a chunk goes through a layer, but for its mixing."""
        # The residual before and after, its norm, a row of an expert; in float32 that row's result, weighted too, and
        # the sum of a token's experts, old and new; the router's scores.
        return self.hidden_size * (4 * dtype.size + 4 * 4) + 3 * 4 * self.num_experts

    def mixing_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes a token takes while it mixes with others, at the widest place of all."""
        # Queries, keys and values as projected, normalized and rotated, and attention's output.
        width = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        return (3 * width + self.num_attention_heads * self.head_dim) * dtype.size
