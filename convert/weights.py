"""Which files of a checkpoint hold its tensors: those that the index names, one file, or numbered shards.

Copies are often incomplete in ways that do no harm: an index that was left behind when shards were joined into one
file, or shards whose index was not copied. These are read, with a note. A set that lacks a shard is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Any

from mlx_flashmoe.convert.safetensors import SafetensorsFile, Tensor
from mlx_flashmoe.errors import SourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"([^/]+-)(\d{1,9})-of-(\d{1,9})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Weights:
    """The files with tensors.

    Attributes:
        files: their names, in order.
        index: where it is, if it is to be followed.
        weight_map: what it says, tensor name -> file name; empty without an index.
        note: a line about what is unusual, None if all is as published.
    """

    files: list[str]
    index: Path | None
    weight_map: dict[str, str]
    note: str | None

    def tensors(self, shards: Mapping[str, SafetensorsFile]) -> dict[str, Tensor]:
        """Every tensor, by name.

        Args:
            shards: the files, by name.

        Raises:
            SourceError: the index and the files contradict each other, or two files have the same tensor.
        """
        if self.index is not None:
            return _listed(self.index, self.weight_map, shards)
        found: dict[str, Tensor] = {}
        for file in self.files:
            for name, tensor in shards[file].tensors.items():
                if name in found:
                    raise SourceError(
                        f"{tensor} is in {found[name].file.path.name} too, and no {INDEX} says which one counts"
                    )
                found[name] = tensor
        return found


def choose(there: Collection[str], index: Path | None, where: str, advice: str) -> Weights:
    """Which files to read.

    Args:
        there: names of the files that can be had.
        index: the checkpoint's index, if it has one.
        where: the folder or repository, for errors.
        advice: what to do if a file is missing, for errors.

    Raises:
        SourceError: a file is missing, the index is malformed, or it is unclear which files count.
    """
    weight_map = {} if index is None else _weight_map(index)
    named = sorted(set(weight_map.values()))
    missing = [name for name in named if name not in there]
    if index is not None and not missing:
        return Weights(named, index, weight_map, None)
    # Files that the index names too are no substitute for those that it names and that are missing.
    single = SINGLE in there and SINGLE not in named
    files = [SINGLE] if single else _numbered(there, named, where, advice)
    if index is not None and not files:
        raise SourceError(f"{where}: {_are_missing(missing)}, but {INDEX} names {_them(missing)}; {advice}")
    if not files:
        raise SourceError(
            f"{where} has neither {SINGLE} nor {INDEX} nor numbered shards; only safetensors checkpoints are read"
        )
    read = (
        f"{files[0]} is" if len(files) == 1 else f"{files[0]} and the other {len(files) - 1} of its set are"
    )
    note = None
    if index is not None:
        note = f"{where}: {_are_missing(missing)}, though {INDEX} names {_them(missing)}; {read} read instead"
    elif not single:
        note = f"{where}: {INDEX} is missing; {read} read without it"
    return Weights(files, None, {}, note)


def _numbered(there: Collection[str], named: Collection[str], where: str, advice: str) -> list[str]:
    """The one complete set of numbered shards, of which the index names none; empty if it names all there are.

    Raises:
        SourceError: there is no index, and no set is complete; or more than one set is.
    """
    sets: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in sorted(there):
        match = _NUMBERED.fullmatch(name)
        if match and name not in named and 1 <= int(match[2]) <= int(match[3]):
            sets[match[1], match[3]][int(match[2])] = name
    complete = [files for (_, total), files in sets.items() if len(files) == int(total)]
    if len(complete) > 1:
        listed = " and ".join(min(files.values()) for files in complete[:2])
        raise SourceError(
            f"{where}: {listed} each begin a complete set of shards, and no {INDEX} says which one counts; "
            "remove one set"
        )
    if complete:
        return sorted(complete[0].values())
    if sets and not named:
        (stem, total), files = max(sets.items(), key=lambda item: len(item[1]) / int(item[0][1]))
        lacking = (n for n in range(1, int(total) + 1) if n not in files)
        names = [f"{stem}{n:0{len(total)}d}-of-{total}.safetensors" for n in islice(lacking, 3)]
        count = int(total) - len(files)
        raise SourceError(
            f"{where}: {_are_missing(names, count)}: {len(files)} of {total.lstrip('0')} shards are there, and no "
            f"{INDEX}; {advice}"
        )
    return []


def _some(names: list[str], count: int | None = None) -> str:
    """The first of ``count`` names, and how many more there are."""
    count = len(names) if count is None else count
    shown = names if count <= 3 else names[:2]
    more = [f"{count - 2} more"] if count > 3 else []
    *first, last = shown + more
    return f"{', '.join(first)} and {last}" if first else last


def _are_missing(names: list[str], count: int | None = None) -> str:
    return f"{_some(names, count)} {'is' if (count or len(names)) == 1 else 'are'} missing"


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, checked to be a file name in the index's own folder."""
    weight_map = json_object(path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise SourceError(
                f"{path}: tensor {short(name)} is in {short(file)}, which is not the name of a file in this folder"
            )
    return weight_map


def _listed(
    index: Path, weight_map: dict[str, str], shards: Mapping[str, SafetensorsFile]
) -> dict[str, Tensor]:
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise SourceError(f"{shards[file].path}: tensor {name!r} is not in it, but {index.name} says so")
        tensors[name] = shards[file].tensors[name]
    return tensors


def _plain_name(name: str) -> bool:
    if name in ("", ".", "..") or not name.isprintable() or not name.endswith(".safetensors"):
        return False
    return "/" not in name and "\\" not in name and ":" not in name and len(os.fsencode(name)) < 256


def json_object(path: Path, hint: str) -> dict[str, Any]:
    """A file's JSON object; ``hint`` is said if it is missing. Raises SourceError."""
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
