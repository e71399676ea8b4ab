"""Where tensors come from: a local checkpoint folder, or a Hugging Face id that becomes one."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flashmoe.convert.safetensors import SafetensorsFile, Tensor
from mlx_flashmoe.errors import ConversionError, SourceError
from mlx_flashmoe.layout import MANIFEST

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What is copied as published: settings, tokenizer, chat template, licence. Not the index, not the weights.
_SIDE_FILES = re.compile(
    r"[^.].*\.json|.*\.jinja|tokenizer[^/]*|vocab[^/]*|merges\.txt|.*\.tiktoken|LICEN[SC]E[^/]*"
)
_HUB_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "LICEN*",
]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its config.json, and every tensor it lists, by published name."""

    folder: Path
    origin: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def side_files(self) -> list[Path]:
        """The files that a converted folder keeps as published."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and _SIDE_FILES.fullmatch(path.name) and not path.name.endswith(".index.json")
        )


@contextlib.contextmanager
def open_checkpoint(hf_path: str | os.PathLike[str], revision: str | None = None) -> Iterator[Checkpoint]:
    """Opens a checkpoint and checks that its files are whole.

    Args:
        hf_path: a folder with config.json and model.safetensors, or shards and their index; or the id of a
            Hugging Face repository ("org/name"), which is downloaded into the hub's cache.
        revision: of the repository: a branch, tag or commit. Not for a folder.

    Raises:
        SourceError: not found, not a checkpoint, or a file missing, truncated or malformed.
        ConversionError: a revision was given with a folder.
    """
    folder, commit = _locate(hf_path, revision)
    if (folder / MANIFEST).exists():
        raise SourceError(f"{folder} is a converted model already ({MANIFEST} is in it); nothing to convert")
    config = _json_object(folder / "config.json", "a checkpoint needs it; is this a model's folder?")
    with contextlib.ExitStack() as stack:

        def shard(name: str) -> SafetensorsFile:
            return stack.enter_context(contextlib.closing(SafetensorsFile(folder / name)))

        if (folder / INDEX).exists():
            tensors = _indexed(folder / INDEX, shard)
        elif (folder / SINGLE).exists():
            tensors = dict(shard(SINGLE).tensors)
        else:
            raise SourceError(
                f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read"
            )
        yield Checkpoint(folder, str(hf_path), commit, config, tensors)


def _indexed(path: Path, shard: Any) -> dict[str, Tensor]:
    """The tensors an index lists, out of the shards it names."""
    weight_map = _json_object(path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: no weight_map in it")
    shards: dict[str, SafetensorsFile] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise SourceError(
                f"{path}: tensor {name!r} is in {file!r}, which is not the name of a file in this folder"
            )
        if file not in shards:
            if not (path.parent / file).exists():
                raise SourceError(f"{path.parent / file} is missing, but {path.name} names it")
            shards[file] = shard(file)
        if name not in shards[file].tensors:
            raise SourceError(f"{path.parent / file}: tensor {name!r} is not in it, but {path.name} says so")
        tensors[name] = shards[file].tensors[name]
    return tensors


def _plain_name(name: str) -> bool:
    if name in ("", ".", "..") or not name.isprintable() or not name.endswith(".safetensors"):
        return False
    return "/" not in name and "\\" not in name and ":" not in name and len(os.fsencode(name)) < 256


def _json_object(path: Path, hint: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing; {hint}") from None
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: not a JSON object")
    return data


def _locate(hf_path: str | os.PathLike[str], revision: str | None) -> tuple[Path, str | None]:
    """The checkpoint's folder, and the commit it is of if it came from the hub."""
    folder = Path(hf_path)
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(
                f"a revision ({revision}) is for Hugging Face ids, but {folder} is a folder"
            )
        return folder, None
    if folder.exists():
        raise SourceError(f"{folder} is a file; give the checkpoint's folder")
    name = str(hf_path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise SourceError(f"{name}: no such folder, and not a Hugging Face id (org/name)")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
    # The hub's client raises its own, requests', httpx's and the system's errors: all mean the same here.
    except Exception as e:
        reason = " ".join(str(e).split())
        raise SourceError(
            f"{name}: no such folder, and downloading it from Hugging Face failed: {type(e).__name__}: {reason[:300]}"
        ) from None
    # The cache names a snapshot's folder by its commit.
    return snapshot, snapshot.name
