"""The checkpoint that a converted folder was made from, opened to make parts of the folder again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_flashmoe.convert.binding import bind
from mlx_flashmoe.convert.plan import Plan, make_plan
from mlx_flashmoe.convert.recipe import Recipe
from mlx_flashmoe.convert.source import Checkpoint, HubShards, open_checkpoint
from mlx_flashmoe.convert.units import Unit, cut
from mlx_flashmoe.errors import ConversionError, FormatError
from mlx_flashmoe.layout import MANIFEST, Manifest


@dataclass(frozen=True)
class Original:
    """A checkpoint and the plan of the conversion, the same as a folder's manifest describes."""

    checkpoint: Checkpoint
    plan: Plan
    units: list[Unit]


@contextlib.contextmanager
def open_original(
    folder: Path, manifest: Manifest, source: str | os.PathLike[str], downloads: Path, *, in_ranges: bool
) -> Iterator[Original]:
    """Opens ``source`` as what ``folder`` was made from, with the bits that were asked for then.

    Args:
        downloads: a folder for shards from the hub.
        in_ranges: read from the hub just what is asked for, rather than shard by shard.

    Raises:
        SourceError, ConversionError: ``source`` cannot be read.
        FormatError: converting it does not give files of the same shapes.
    """
    asked = manifest.source.get("asked", {})
    recipe = Recipe.from_json(asked.get("recipe", {}), str(folder / MANIFEST))
    revision = None if Path(source).is_dir() else manifest.source.get("revision")
    with open_checkpoint(source, revision, downloads=downloads) as checkpoint:
        if in_ranges and isinstance(checkpoint.storage, HubShards):
            for name, shard in checkpoint.shards.items():
                shard.reader = checkpoint.storage.reader(name)
        bound = bind(checkpoint)
        try:
            plan = make_plan(bound, recipe)
        except ConversionError:
            # Its advice is about options of convert, which were others if this was the source.
            raise FormatError(
                f"{folder} is not a conversion of {source}: the bits and group sizes that were asked for do not fit it"
            ) from None
        layouts = {entry.layer: manifest.layout_of(entry) for entry in manifest.layers}
        planned = {p.experts.layer: plan.layouts[p.layout] for p in plan.layers}
        sizes = {f.name: f.nbytes for f in plan.dense}
        if layouts != planned or sizes != {d.file: d.size for d in manifest.dense}:
            raise FormatError(f"{folder} is not a conversion of {source}: shapes or quantization differ")
        yield Original(checkpoint, plan, cut(plan, list(checkpoint.shards)))
