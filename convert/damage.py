"""Damage to a converted folder: what is evident without reading it all, and the record that verify leaves.

``.damaged.json`` lists what verify found, so that convert knows what to mend. It is on the disk before a byte is
mended and goes when all is: a blob that was half written when the power failed is still listed.
"""

from __future__ import annotations

import json
import os
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_flashmoe import system
from mlx_flashmoe.convert.destination import sync_folder, writing
from mlx_flashmoe.convert.source import is_side_file
from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.layout import MANIFEST, Manifest
from mlx_flashmoe.sizes import counted
from mlx_flashmoe.tokenizer import Tokenizer

RECORD = ".damaged.json"

# Relative path of a file -> its damaged experts. Of a file that is missing or of a wrong size, and of a file that
# is not an expert file, the set is empty: all of it has to be looked at.
Damage = dict[str, set[int]]


@dataclass(frozen=True)
class Fault:
    """A line about what is wrong, and the file and the expert that it is about."""

    text: str
    file: str
    expert: int | None = None


def damage_of(faults: Iterable[Fault]) -> Damage:
    """The damage that the faults amount to."""
    damage: Damage = {}
    for fault in faults:
        damage.setdefault(fault.file, set()).update(() if fault.expert is None else (fault.expert,))
    return damage


def evident(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Files that are missing or of a wrong size, and small files that are not what was written.

    Raises:
        FormatError: the manifest's list of small files is malformed.
    """
    yield from _small_files(folder, manifest)
    for name, size in sizes(manifest).items():
        try:
            actual = os.stat(folder / name).st_size
        except OSError:
            yield Fault(f"{folder / name}: is missing", name)
            continue
        if actual != size:
            yield Fault(f"{folder / name}: has {actual:,} bytes, but should have {size:,}", name)


def sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of every dense file and every expert file, by relative path."""
    dense = {d.file: d.size for d in manifest.dense}
    return dense | {e.file: e.num_experts * manifest.layout_of(e).blob_size for e in manifest.layers}


def load_record(folder: Path, manifest: Manifest) -> Damage:
    """The damage that verify has found in the folder; empty if it found nothing or has not been run.

    Raises:
        FormatError: the record is malformed, or it is about files that the manifest does not have.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise FormatError(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError):
        data = None
    experts = {entry.file: entry.num_experts for entry in manifest.layers}
    files = recorded_files(folder, manifest)
    large = sizes(manifest)

    def is_known(name: str) -> bool:
        return name in large or (is_side_file(name) if files is None else name in files)

    if not isinstance(data, dict) or not all(
        is_known(name) and isinstance(ids, list) and all(_is_id(e, experts.get(name, 0)) for e in ids)
        for name, ids in data.items()
    ):
        raise FormatError(f"{path}: malformed; python -m mlx_flashmoe verify writes it anew")
    return {name: set(ids) for name, ids in data.items()}


def _is_id(value: Any, count: int) -> bool:
    return type(value) is int and 0 <= value < count


def save_record(folder: Path, damage: Damage) -> None:
    """Leaves the record on the disk for good; removes it if nothing is damaged. Raises ConversionError."""
    path = folder / RECORD
    if not damage and not path.exists():
        return
    with writing(path):
        if damage:
            temporary = path.with_name(RECORD + ".part")
            with open(temporary, "w", encoding="utf-8") as f:
                json.dump({name: sorted(ids) for name, ids in sorted(damage.items())}, f)
                f.flush()
                system.flush(f.fileno())
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
        sync_folder(folder)


def described(damage: Damage, manifest: Manifest) -> str:
    """Words for the damage: "2 experts of layer 3, model.safetensors, config.json"."""
    layers = {entry.file: entry for entry in manifest.layers}
    words = []
    for name, ids in sorted(damage.items()):
        entry = layers.get(name)
        if entry is None or not ids:
            words.append(name)
        else:
            which = f"expert {min(ids)}" if len(ids) == 1 else counted(len(ids), "expert")
            words.append(f"{which} of layer {entry.layer}")
    return ", ".join(words[:5]) + (f" and {counted(len(words) - 5, 'other file')}" if len(words) > 5 else "")


def mending_command(folder: Path, manifest: Manifest, against: str | os.PathLike[str] | None) -> str:
    """The command that mends what verify has found.

    Args:
        against: a checkpoint that is known to be there, if there is one.
    """
    asked = manifest.source.get("asked", {})
    source = str(manifest.source.get("path", ""))
    there = bool(source) and (Path(source).is_dir() or not os.path.isabs(source))
    options = convert_options(asked.get("recipe", {}))
    if there and options is not None and asked.get("revision") is None:
        return convert_command(source, folder, options)
    if not there:
        source = str(against) if against is not None else "SRC"
    return f"python -m mlx_flashmoe verify --model {shlex.quote(str(folder))} --repair --against {shlex.quote(source)}"


def convert_command(source: str, folder: Path, options: str) -> str:
    """The command that converts ``source`` into ``folder``; ``options`` begin with a space, or are empty."""
    paths = f"--hf-path {shlex.quote(source)} --mlx-path {shlex.quote(str(folder))}"
    return f"python -m mlx_flashmoe convert {paths}{options}"


def convert_options(recipe: dict[str, Any]) -> str | None:
    """Options of convert that ask for this recipe again; None if it names layers, which takes a file."""
    flags = {
        "bits": "--q-bits",
        "group_size": "--q-group-size",
        "gate_up": "--q-bits-gate-up",
        "down": "--q-bits-down",
    }
    if "layers" in recipe:
        return None
    return "".join(f" {flag} {recipe[name]}" for name, flag in flags.items() if name in recipe)


# Small files


def recorded_files(folder: Path, manifest: Manifest) -> dict[str, int] | None:
    """The small files that the manifest lists, name -> crc32; None if it is of before they were listed.

    Raises:
        FormatError: the list is malformed.
    """
    recorded = manifest.source.get("files")
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or not all(
        is_side_file(name) and type(crc) is int for name, crc in recorded.items()
    ):
        raise FormatError(f"{folder / MANIFEST}: malformed manifest (source: files)")
    return recorded


def _small_files(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Faults of the files that are kept as published: config.json, the tokenizer's, and so on."""
    recorded = recorded_files(folder, manifest)
    if recorded is not None:
        for name, crc in recorded.items():
            yield from small_file(folder, name, partial(_has_crc32, crc), "differs from what was written")
        return
    # The folder was converted before checksums of them were kept: they can be read, or they cannot.
    yield from small_file(folder, "config.json", _is_object, "is not a JSON object")
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            Tokenizer.load(folder)
        except FormatError as e:
            # The loader reads several: which one is at fault is in its message alone.
            named = (
                path.name for path in folder.iterdir() if str(path) in str(e) and is_side_file(path.name)
            )
            yield Fault(str(e), next(named, "tokenizer.json"))


def small_file(folder: Path, name: str, is_right: Callable[[bytes], bool], otherwise: str) -> list[Fault]:
    """Faults of one of them; ``otherwise`` is said of contents that are not right."""
    path = folder / name
    try:
        return [] if is_right(path.read_bytes()) else [Fault(f"{path}: {otherwise}", name)]
    except FileNotFoundError:
        return [Fault(f"{path}: is missing", name)]
    except OSError as e:
        return [Fault(f"{path}: cannot be read: {e.strerror}", name)]


def _has_crc32(crc: int, data: bytes) -> bool:
    return zlib.crc32(data) == crc


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False
