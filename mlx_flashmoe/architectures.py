"""Builds a model: an architecture of ``models``, or a library's modules with streamed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe import models
from mlx_flashmoe.errors import FormatError, MemoryPlanError
from mlx_flashmoe.experts import Decode, StreamedExperts, StreamedOutputs
from mlx_flashmoe.external.library import named
from mlx_flashmoe.external.model import ExternalConfig, ExternalModel
from mlx_flashmoe.layout import LayerEntry


class Architecture(Protocol):
    """How the model of a config.json is built.

    Attributes:
        settings: sizes and bytes, by config.json.
        code: the libraries whose modules compute, with their versions.
        lazy: a call evaluates nothing; and layers guess the experts of the next.
    """

    settings: Any
    code: list[str]
    lazy: bool

    def active(self, asked: int | None) -> int:
        """Experts of a token. Raises MemoryPlanError if there cannot be as many as were asked for."""
        ...

    def dtype_of(self, name: str, stored: mx.Dtype, activations: mx.Dtype) -> mx.Dtype:
        """The dtype in which a floating parameter is held."""
        ...

    def ffn_experts(self, active: int) -> int:
        """Experts whose outputs one call of a kernel adds up, where a token uses ``active``."""
        ...

    def check(self, layers: tuple[LayerEntry, ...]) -> None:
        """Raises FormatError if these are not the layers with experts that the model has."""
        ...

    def build(self, decode: Decode, active: int) -> nn.Module:
        """The model, with random lazy weights."""
        ...

    def tree(self, model: nn.Module) -> nn.Module:
        """The modules whose paths are the names of the dense tensors."""
        ...


class Own:
    """An architecture of ``models``."""

    def __init__(self, model_type: str, config: dict[str, Any]):
        self._module = models.architecture(model_type)
        self.settings = self._module.Config.from_dict(config)
        self.code: list[str] = []
        self.lazy = True

    def active(self, asked: int | None) -> int:
        s = self.settings
        if asked is not None and not 1 <= asked <= s.selectable_experts:
            most = s.selectable_experts
            has = "has" if most == s.num_experts else "lets a token choose from"
            raise MemoryPlanError(
                f"--active-experts {asked}: a layer of this model {has} {most} experts; give 1 to {most}"
            )
        return int(asked or s.num_experts_per_tok)

    def dtype_of(self, name: str, stored: mx.Dtype, activations: mx.Dtype) -> mx.Dtype:
        return mx.float32 if self._module.Model.keep_float32(name) else activations

    def ffn_experts(self, active: int) -> int:
        return active

    def check(self, layers: tuple[LayerEntry, ...]) -> None:
        numbers = sorted(entry.layer for entry in layers)
        if numbers != self.settings.moe_layers:
            raise FormatError(
                f"experts for layers {numbers}, but by config.json the layers {self.settings.moe_layers} have some"
            )
        for entry in layers:
            if entry.num_experts != self.settings.num_experts:
                raise FormatError(
                    f"layer {entry.layer} has {entry.num_experts} experts, but config.json says "
                    f"{self.settings.num_experts}"
                )

    def build(self, decode: Decode, active: int) -> nn.Module:
        make: Callable[[int], StreamedExperts] = lambda layer: StreamedExperts(decode, layer)  # noqa: E731
        model: nn.Module = self._module.Model(self.settings, make, active)
        return model

    def tree(self, model: nn.Module) -> nn.Module:
        return model


class External:
    """An architecture of a library."""

    def __init__(self, library: str, config: dict[str, Any]):
        self._config = config
        self._library = named(library)
        self.settings = ExternalConfig(self._library, config)
        self.code = [library, self._library.version]
        self.lazy = False  # a library's model may evaluate arrays between layers
        if mx.default_device() == mx.cpu:
            # The libraries compile small functions, which on a CPU takes a C++ compiler of the user's.
            mx.disable_compile()

    def active(self, asked: int | None) -> int:
        own = self.settings.num_experts_per_tok
        if asked not in (None, own):
            raise MemoryPlanError(
                f"--active-experts {asked}: a model of {self._library.name} always uses {own} experts for a token"
            )
        return own

    def dtype_of(self, name: str, stored: mx.Dtype, activations: mx.Dtype) -> mx.Dtype:
        return mx.float32 if stored == mx.float32 else activations  # as the checkpoint mixes them

    def ffn_experts(self, active: int) -> int:
        return 1  # every output is returned by itself

    def check(self, layers: tuple[LayerEntry, ...]) -> None:
        self.settings.check({entry.layer: (entry.module, entry.num_experts) for entry in layers})

    def build(self, decode: Decode, active: int) -> nn.Module:
        return ExternalModel(
            self.settings, self._config, lambda layer, activation: StreamedOutputs(decode, layer, activation)
        )

    def tree(self, model: nn.Module) -> nn.Module:
        tree: nn.Module = model.language_model
        return tree


def described(model_type: str, library: str | None, config: dict[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Args:
        library: whose modules the model is made of; None for those of ``models``.

    Raises:
        FormatError: it is not supported, or the library is not installed.
    """
    return Own(model_type, config) if library is None else External(library, config)
