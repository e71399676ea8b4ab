"""The libraries that a model's modules can come from: which architectures they have, and how they build one."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_flashmoe.errors import FormatError


@dataclass(frozen=True)
class Library:
    """A package of MLX models.

    Attributes:
        name: the package's, and the extra's that installs it.
        whole: a config.json -> the model with all its parts; weights are random and lazy, nothing is computed.
        loaded: a checkpoint folder -> the same with the checkpoint's weights, lazily.
        knows: a config.json -> the name of the module that describes its architecture; None if there is none.
        aliases: model types that are other names of an architecture, and its own.
        language: a whole model -> the part that computes logits from tokens.
    """

    name: str
    whole: Callable[[dict[str, Any]], nn.Module]
    loaded: Callable[[Path], nn.Module]
    knows: Callable[[dict[str, Any]], str | None]
    aliases: Callable[[], dict[str, str]]
    language: Callable[[nn.Module], nn.Module]

    def build(self, config: dict[str, Any]) -> nn.Module:
        """The language model of a config.json with random lazy weights."""
        return self.language(self.whole(config))

    def read(self, folder: Path) -> nn.Module:
        """The language model of a checkpoint, lazily."""
        return self.language(self.loaded(folder))

    def wrote(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        """Tells whether a checkpoint's tensors have the names of this library's own tree, and no others."""
        own = {str(item[0]) for item in tree_flatten(self.whole(config).parameters())}
        of_quantization = (".scales", ".biases")
        return all(name in own or name.endswith(of_quantization) for name in names)

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


def _lm_whole(config: dict[str, Any]) -> nn.Module:
    name = _lm_knows(config)
    assert name is not None
    module = importlib.import_module(name)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    return model


def _lm_loaded(folder: Path) -> nn.Module:
    from mlx_lm.utils import load_model

    return load_model(folder, lazy=True)[0]


def _all_of_it(model: nn.Module) -> nn.Module:
    return model


def _vlm_knows(config: dict[str, Any]) -> str | None:
    from mlx_vlm.utils import get_model_type

    kind = get_model_type(config)
    name = f"mlx_vlm.models.{kind}"
    known = kind is not None and str(kind).isidentifier() and _found(name)
    return name if known and _describes(name, "ModelConfig") else None


def _vlm_aliases() -> dict[str, str]:
    from mlx_vlm.utils import MODEL_REMAPPING

    return dict(MODEL_REMAPPING)


def _vlm_whole(config: dict[str, Any]) -> nn.Module:
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
    model: nn.Module = module.Model(settings)
    return model


def _vlm_loaded(folder: Path) -> nn.Module:
    from mlx_vlm.utils import load_model

    return load_model(folder, lazy=True)


# Language models of mlx-vlm that compute something else of tokens than the whole model: what they do.
WRONG_ALONE = {"granitemoe": "does not apply embedding_multiplier to the tokens of an answer"}


def _language_model(model: nn.Module) -> nn.Module:
    """The part that computes logits from tokens; in a model of several, the first part that has one."""
    kind = type(model).__module__.split(".")[2]
    if kind in WRONG_ALONE:
        raise FormatError(
            f"mlx-vlm's {kind} {WRONG_ALONE[kind]}; mlx-lm's does: convert a checkpoint that it reads"
        )
    for part in (model, *model.children().values()):
        inner = getattr(part, "language_model", None)
        if isinstance(inner, nn.Module):
            return inner
    raise FormatError(f"mlx-vlm's {type(model).__module__} has no language model that could be run alone")


LIBRARIES = {
    "mlx-lm": Library("mlx-lm", _lm_whole, _lm_loaded, _lm_knows, _lm_aliases, _all_of_it),
    "mlx-vlm": Library("mlx-vlm", _vlm_whole, _vlm_loaded, _vlm_knows, _vlm_aliases, _language_model),
}
"""In the order in which they are asked for an architecture, and tried with a checkpoint of it."""


def find(config: dict[str, Any], names: Iterable[str] = ()) -> list[Library]:
    """The installed libraries that know the architecture of a config.json, in the order in which they are tried.

    What a library wrote is read by the same library: another may take its tensors for those that were published, and
    change them a second time.

    Args:
        names: of the checkpoint's tensors.
    """
    if not isinstance(config.get("model_type"), str):
        return []
    found = [one for one in LIBRARIES.values() if one.installed and one.knows(config) is not None]
    return found if len(found) < 2 else sorted(found, key=lambda one: not _wrote(one, config, names))


def _wrote(library: Library, config: dict[str, Any], names: Iterable[str]) -> bool:
    try:
        return library.wrote(config, names)
    except Exception:  # whatever a library's code does with settings that it cannot build a model of
        return False


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
