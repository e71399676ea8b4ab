"""What the architectures have in common: embedding, a stack of pre-norm layers, head."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.models.attention import Attention
from mlx_flashmoe.models.cache import Cache
from mlx_flashmoe.models.config import BaseConfig, mixed_at_once
from mlx_flashmoe.models.latent_attention import LatentAttention
from mlx_flashmoe.models.moe import MLP, MoE
from mlx_flashmoe.models.norm import RMSNorm


class DecoderLayer(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm(x)). What mixes tokens has its own name in every subclass."""

    def __init__(self, config: BaseConfig, mlp: MoE | MLP):
        super().__init__()
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def mix(self, x: mx.array, cache: Any) -> mx.array:
        raise NotImplementedError

    def make_cache(self) -> Cache:
        raise NotImplementedError

    def __call__(self, x: mx.array, cache: Cache | None, following: DecoderLayer | None) -> mx.array:
        x, normed = self.post_attention_layernorm.after_adding(x, self._mixed(x, cache))
        likely = None
        if following is not None and self.mlp.wants_guess(x):
            likely = following.guess(x)
        return self.mlp(x, normed, likely)

    def _mixed(self, x: mx.array, cache: Cache | None) -> mx.array:
        """mix(norm(x)), of a prompt that goes into a cache a slice at a time."""
        tokens, step = x.shape[1], mixed_at_once()
        if cache is None or tokens <= step:
            return self.mix(self.input_layernorm(x), cache)
        slices = []
        for start in range(0, tokens, step):
            slices.append(self.mix(self.input_layernorm(x[:, start : start + step]), cache))
            mx.eval(slices[-1], cache.state)  # or what all slices hold would be held at once
        return mx.concatenate(slices, axis=1)

    def guess(self, x: mx.array) -> mx.array | None:
        """The experts this layer will probably want, from an earlier residual x: ids [..., K]; None if it has none."""
        if not isinstance(self.mlp, MoE):
            return None
        return self.mlp.route(self.mlp.gate(self.post_attention_layernorm(x)))[0]


class AttentionLayer(DecoderLayer):
    def __init__(self, config: BaseConfig, attention: Attention | LatentAttention, mlp: MoE | MLP):
        super().__init__(config, mlp)
        self.self_attn = attention

    def mix(self, x: mx.array, cache: Any) -> mx.array:
        return self.self_attn(x, cache)

    def make_cache(self) -> Cache:
        return self.self_attn.make_cache()


class Decoder(nn.Module):
    def __init__(self, config: BaseConfig, layers: list[DecoderLayer]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list[Cache] | None) -> mx.array:
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            following = self.layers[i + 1] if i + 1 < len(self.layers) else None
            x = layer(x, cache[i] if cache is not None else None, following)
        return self.norm(x)


class CausalLM(nn.Module):
    """A language model. Every architecture's own is ``Model(config, experts, active_experts)``, with

    config: its Config, of the checkpoint;
    experts: layer number -> that layer's routed experts, a callable (x, ids, weights) -> y;
    active_experts: routed experts a token uses; the checkpoint's own number if None.

    Attributes:
        renamed: parts of published names -> what they are here; each is looked for in turn.
        refused: parts of published names -> why such a checkpoint cannot be converted, and what can.
        routers: last parts of the paths of Linear modules that choose experts: they are quantized to 8 bits.
        norms_less_one: published checkpoints hold weight - 1 of every RMSNorm.
    """

    renamed: ClassVar[dict[str, str]] = {}
    refused: ClassVar[dict[str, str]] = {}
    routers: ClassVar[tuple[str, ...]] = ("gate", "shared_expert_gate")
    norms_less_one: ClassVar[bool] = False

    def __init__(self, config: BaseConfig, layers: list[DecoderLayer]):
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: list[Cache] | None = None) -> mx.array:
        """tokens [B, T] -> logits [B, T, vocab]; ``cache`` (of ``make_cache``) is updated."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: mx.array, cache: list[Cache] | None) -> mx.array:
        """tokens [B, T] -> what ``head`` takes, [B, T, hidden]."""
        x: mx.array = self.model(tokens, cache)
        return x

    def head(self, x: mx.array) -> mx.array:
        """Outputs of ``model`` [B, T, hidden] -> logits [B, T, vocab]."""
        return self.model.embed_tokens.as_linear(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        return [layer.make_cache() for layer in self.model.layers]

    @classmethod
    def unused(cls, config: Any) -> tuple[str, ...]:
        """Beginnings of the names of tensors in published checkpoints that text generation does not use.

        The names are without what wraps the language model, and renamed.
        """
        return ()

    @staticmethod
    def keep_float32(path: str) -> bool:
        """Whether a parameter stays in float32 whatever the activations' dtype."""
        return False
