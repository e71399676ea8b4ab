"""A library's model as the runtime uses one: with the functions and the settings of ``models``' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.external import experts as expert_modules
from mlx_flashmoe.external import probe
from mlx_flashmoe.external.cache import ExternalCache
from mlx_flashmoe.external.library import Library
from mlx_flashmoe.models.cache import Cache

CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "model_max_length")


def run(model: nn.Module, tokens: mx.array, caches: list[Any] | None) -> mx.array:
    """tokens [B, T] -> logits [B, T, V]; caches are updated."""
    output = model(tokens, cache=caches)
    logits: mx.array = getattr(output, "logits", output)
    return logits


class ExternalConfig:
    """The settings that the runtime asks an architecture for, of a library's model.

    Attributes:
        vocab_size, num_experts_per_tok: as the model's graph has them.
        experts, unused: the layers' experts that text goes through, and those that it does not.
        context_length: tokens of prompt and answer; None if config.json does not say.
        dtype: of the checkpoint's weights, by config.json; "" if it does not say.
    """

    def __init__(self, library: Library, config: dict[str, Any]):
        self.library = library
        model = library.build(config)
        found = expert_modules.find(model)
        if not found:
            raise FormatError(
                f"{library.name}'s {type(model).__module__} holds no experts that could be streamed: it has no "
                "SwitchGLU or SwitchMLP layers"
            )
        probed = probe.probe(model, found, lambda tokens, caches: run(model, tokens, caches))
        self.experts = [one for one in found if one.path in probed.used]
        self.unused = [one for one in found if one.path not in probed.used]
        self.num_experts_per_tok, self.vocab_size = probed.top_k, probed.vocabulary
        self.num_experts = max(one.count for one in self.experts)
        self.hidden_size = self.experts[0].hidden_size
        self.num_hidden_layers = len(getattr(model, "layers", self.experts))
        self.moe_layers = layer_numbers([one.path for one in self.experts])
        self._model = model
        inner = config.get("text_config")
        text = {**config, **(inner if isinstance(inner, dict) else {})}
        given = [text[name] for name in CONTEXT if type(text.get(name)) is int and text[name] > 0]
        self.context_length: int | None = given[0] if given else None
        self.dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16")
        self._growth: dict[mx.Dtype, list[probe.Growth]] = {}

    def check(self, converted: dict[int, tuple[str | None, int]]) -> None:
        """Raises FormatError unless these are the modules with experts: by layer, path and number of experts."""
        have = {n: (one.path, one.count) for n, one in zip(self.moe_layers, self.experts)}
        if converted != have:
            raise FormatError(
                f"{self.library.name} {self.library.version} builds this model with other experts than the version "
                "that converted it; convert the checkpoint again"
            )

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        """Bytes of the caches of one sequence of ``tokens`` tokens."""
        if dtype not in self._growth:
            self._model.set_dtype(dtype)  # of lazy weights: what the graph stores then has it too
            self._growth[dtype] = probe.growth(self._model, lambda t, c: run(self._model, t, c))
        return sum(cache.nbytes(tokens) for cache in self._growth[dtype])

    @cached_property
    def _widest(self) -> int:
        """Values of a token in the widest place between two layers: an output of a Linear, or the experts' of one."""
        widths = [m.weight.shape[0] for _, m in self._model.named_modules() if isinstance(m, nn.Linear)]
        return max([*(w for w in widths if w != self.vocab_size), self.hidden_size])

    def activation_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes a prompt's token takes while a chunk goes through a layer."""
        # The chosen experts' outputs by row, then by token, and the rows of their inputs.
        routed = 3 * self.num_experts_per_tok * self.hidden_size * dtype.size
        return routed + 8 * self._widest * dtype.size + self.vocab_size * dtype.size

    def mixing_bytes(self, dtype: mx.Dtype) -> int:
        return 0  # all of a chunk mixes at once, which ``activation_bytes`` counts


def layer_numbers(paths: list[str]) -> list[int]:
    """A number for each layer of experts, ascending: the layer's own where paths have exactly one, else its place."""
    numbers = [[int(part) for part in path.split(".") if part.isdigit()] for path in paths]
    own = [ns[0] for ns in numbers if len(ns) == 1]
    return own if len(own) == len(paths) and own == sorted(set(own)) else list(range(len(paths)))


class ExternalModel(nn.Module):
    """A library's language model with streamed experts.

    Args:
        settings: of the model.
        experts: (layer number, activation) -> the layer's experts, a callable (x, ids) -> outputs [..., K, D].
    """

    def __init__(
        self, settings: ExternalConfig, config: dict[str, Any], experts: Callable[[int, Any], nn.Module]
    ):
        super().__init__()
        self.config = settings
        self.language_model = settings.library.build(config)
        for layer, one in zip(settings.moe_layers, settings.experts):
            probe.replace(self.language_model, one, experts(layer, one.activation))
        for one in settings.unused:
            probe.replace(self.language_model, one, probe.Unused())

    def __call__(self, tokens: mx.array, cache: list[Cache] | None = None) -> mx.array:
        """tokens [B, T] -> logits [B, T, vocab]; ``cache`` (of ``make_cache``) is updated."""
        if cache is None:
            return run(self.language_model, tokens, None)
        (own,) = cache
        assert isinstance(own, ExternalCache)
        logits = run(self.language_model, tokens, own.theirs)
        own.offset += tokens.shape[1]
        return logits

    def hidden(self, tokens: mx.array, cache: list[Cache] | None) -> mx.array:
        """As a call: where a library's model has its head is not known. Logits that nobody uses are not computed."""
        return self(tokens, cache)

    def head(self, x: mx.array) -> mx.array:
        """What ``hidden`` returned."""
        return x

    def make_cache(self) -> list[Cache]:
        return [ExternalCache(probe.caches(self.language_model))]
