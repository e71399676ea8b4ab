"""How a model is sampled if a command or a request does not say: by its checkpoint's generation_config.json.

One rule for generate, chat and serve. ``do_sample`` false is greedy, as is a file that says nothing about sampling, or
none at all: transformers and mlx-lm take the most likely token, too. Options of the command line override the
file, and fields of a request override both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_flashmoe.errors import FormatError, RequestError
from mlx_flashmoe.sampling import picking

FILE = "generation_config.json"
_DRAWN = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


def suggested_sampling(folder: Path) -> dict[str, Any]:
    """The sampling of generation_config.json, as arguments of ``picking``; empty if it says nothing.

    Raises:
        FormatError: it is not a JSON object, or a value is out of range.
    """
    path = folder / FILE
    config = _read(path)
    fields = {**_DRAWN, "repetition_penalty": "repetition_penalty"}
    sampling = {
        ours: _value(path, theirs, config) for ours, theirs in fields.items() if _says(config, theirs)
    }
    if config.get("do_sample") is False:
        sampling["temp"] = 0.0
    elif config.get("do_sample") is True or _DRAWN.keys() & sampling.keys():
        sampling.setdefault("temp", 1.0)
    try:
        picking(**sampling)
    except RequestError as e:
        raise FormatError(f"{path}: {e}") from None
    return sampling


def describe(suggested: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """One line: what answers are sampled with, and where that is from.

    Args:
        suggested: of :func:`suggested_sampling`.
        options: arguments of ``picking`` that were given as options of the command line; None if not given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    sampling = {**suggested, **given}
    words = ["the most likely token"]
    if sampling.get("temp"):
        words = [f"temperature {sampling['temp']:g}"]
        words += [
            _word(sampling, name, off) for name, off in (("top_p", (0, 1)), ("top_k", (0,)), ("min_p", (0,)))
        ]
    words.append(_word(sampling, "repetition_penalty", (0, 1)))
    words += [_word(sampling, name, (0,)) for name in ("presence_penalty", "frequency_penalty")]
    flags = [f"--{name.replace('_', '-')} {value:g}" for name, value in given.items() if name != "seed"]
    sources = [FILE if suggested else f"{FILE} says nothing", *flags]
    return f"sampling: {', '.join(filter(None, words))} ({'; '.join(sources)})"


def _word(sampling: Mapping[str, Any], name: str, off: tuple[float, ...]) -> str:
    value = sampling.get(name)
    if value is None or value in off:
        return ""
    return f"{name.replace('_', '-' if name.startswith(('top', 'min')) else ' ')} {value:g}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise FormatError(f"{path}: cannot be read: {e}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: should be a JSON object")
    return config


def _says(config: Mapping[str, Any], field: str) -> bool:
    return config.get(field) is not None


def _value(path: Path, field: str, config: Mapping[str, Any]) -> Any:
    value = config[field]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{path}: {field} should be a number, but is {json.dumps(value)}")
    if field == "top_k" and value == int(value):
        return int(value)
    return value
