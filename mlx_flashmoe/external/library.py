"""The libraries that a model's modules can come from: which architectures they have, and how they build one."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_flashmoe.errors import FormatError


@dataclass(frozen=True)
class Library:
    """A package of MLX models.

    Attributes:
        name: the package's, and the extra's that installs it.
        build: a whole config.json -> (the language model, the prefix of its paths in the library's own tree); weights
            are random and lazy, nothing is computed.
        read: a checkpoint folder -> the language model with the checkpoint's weights, lazily; and that prefix.
        knows: a config.json -> the name of the module that describes its architecture; None if there is none.
        aliases: model types that are other names of an architecture, and its own.
    """

    name: str
    build: Callable[[dict[str, Any]], tuple[nn.Module, str]]
    read: Callable[[Path], tuple[nn.Module, str]]
    knows: Callable[[dict[str, Any]], str | None]
    aliases: Callable[[], dict[str, str]]

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """The installed package's version; "" if it is not installed."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return ""


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _lm_knows(config: dict[str, Any]) -> str | None:
    from mlx_lm import utils

    kind = str(config.get("model_type"))
    architectures = config.get("architectures") or ()
    remapped = getattr(utils, "MODEL_ARCHITECTURE_REMAPPING", {})
    names = [architectures] if isinstance(architectures, str) else architectures
    for architecture in names:
        if (kind, architecture) in remapped:
            kind = remapped[kind, architecture]
            break
    else:
        kind = utils.MODEL_REMAPPING.get(kind, kind)
    name = f"mlx_lm.models.{kind}"
    return name if kind.isidentifier() and _found(name) and _describes(name, "ModelArgs") else None


def _describes(name: str, settings: str) -> bool:
    """Tells whether a module describes an architecture; helpers stand in the same folder."""
    module = importlib.import_module(name)
    return hasattr(module, "Model") and hasattr(module, settings)


def _lm_aliases() -> dict[str, str]:
    from mlx_lm.utils import MODEL_REMAPPING

    return dict(MODEL_REMAPPING)


def _lm_build(config: dict[str, Any]) -> tuple[nn.Module, str]:
    name = _lm_knows(config)
    assert name is not None
    module = importlib.import_module(name)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    return model, ""


def _lm_read(folder: Path) -> tuple[nn.Module, str]:
    from mlx_lm.utils import load_model

    return load_model(folder, lazy=True)[0], ""


def _vlm_knows(config: dict[str, Any]) -> str | None:
    from mlx_vlm.utils import get_model_type

    kind = get_model_type(config)
    name = f"mlx_vlm.models.{kind}"
    known = kind is not None and str(kind).isidentifier() and _found(name)
    return name if known and _describes(name, "ModelConfig") else None


def _vlm_aliases() -> dict[str, str]:
    from mlx_vlm.utils import MODEL_REMAPPING

    return dict(MODEL_REMAPPING)


def _vlm_build(config: dict[str, Any]) -> tuple[nn.Module, str]:
    from mlx_vlm.utils import update_module_configs

    name = _vlm_knows(config)
    assert name is not None
    module, config = importlib.import_module(name), copy.deepcopy(config)
    config.setdefault("text_config", config.pop("llm_config", {}))
    config.setdefault("vision_config", {})
    config.setdefault("audio_config", {})
    settings = module.ModelConfig.from_dict(config)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    settings = update_module_configs(settings, module, config, parts)
    return _language_model(module.Model(settings))


def _vlm_read(folder: Path) -> tuple[nn.Module, str]:
    from mlx_vlm.utils import load_model

    return _language_model(load_model(folder, lazy=True))


def _language_model(model: nn.Module) -> tuple[nn.Module, str]:
    inner = getattr(model, "language_model", None)
    if not isinstance(inner, nn.Module):
        raise FormatError(f"mlx-vlm's {type(model).__module__} has no language model that could be run alone")
    return inner, "language_model."


LIBRARIES = {
    "mlx-lm": Library("mlx-lm", _lm_build, _lm_read, _lm_knows, _lm_aliases),
    "mlx-vlm": Library("mlx-vlm", _vlm_build, _vlm_read, _vlm_knows, _vlm_aliases),
}
"""In the order in which they are asked for an architecture."""


def find(config: dict[str, Any]) -> Library | None:
    """The installed library that knows the architecture of a config.json; None if none does."""
    if not isinstance(config.get("model_type"), str):
        return None
    for library in LIBRARIES.values():
        if library.installed and library.knows(config) is not None:
            return library
    return None


def named(name: str) -> Library:
    """The library of that name.

    Raises:
        FormatError: it is not known, or not installed.
    """
    if name not in LIBRARIES:
        raise FormatError(f"a model of {name!r} cannot be run; {' and '.join(LIBRARIES)} are known")
    library = LIBRARIES[name]
    if not library.installed:
        raise FormatError(
            f"this model runs on the modules of {name}, which is not installed: pip install 'mlx-flashmoe[{name}]'"
        )
    return library
