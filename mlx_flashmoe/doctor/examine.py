"""What a model takes, from its headers alone: a converted folder's, a checkpoint's, or a repository's on the hub.

A checkpoint counts as ``convert`` would make it, with its default bits. Of a repository on the hub only config.json,
the index and the headers are fetched, over HTTP range requests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flashmoe.architectures import described
from mlx_flashmoe.convert.binding import bind
from mlx_flashmoe.convert.estimate import disk_needs
from mlx_flashmoe.convert.hub import Repository
from mlx_flashmoe.convert.plan import make_plan
from mlx_flashmoe.convert.recipe import Recipe
from mlx_flashmoe.convert.safetensors import DTYPE_BITS, Header, SafetensorsFile
from mlx_flashmoe.convert.source import Checkpoint, open_checkpoint
from mlx_flashmoe.convert.units import cut
from mlx_flashmoe.convert.weights import json_object
from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.fetch import published, read_manifest, wanted_files
from mlx_flashmoe.layout import MANIFEST, STATE, BlobLayout, Manifest, Quantization
from mlx_flashmoe.loader import read_config
from mlx_flashmoe.sizes import show_size

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
EMBEDDING = "model.embed_tokens."  # a token reads one row of it


@dataclass(frozen=True)
class Needs:
    """What a model takes.

    Attributes:
        state: "converted", or how it would be.
        library: whose modules the model is made of; None for those of ``models``.
        settings: an architecture's.
        layout: of the largest expert.
        layers: with experts.
        expert_bytes, dense_bytes: on disk.
        dense_in_memory: bytes, as they are held.
        dense_read: bytes of them that a token goes through, and ``dense_parameters`` numbers.
        converted: whether it can be run as it is, from a folder or fetched from the hub.
        download: bytes that convert, or --model, would fetch from the hub; files in the hub's cache are not fetched.
        conversion_space: bytes of free disk that convert needs at its worst moment.
        notes: lines about what is unusual.
    """

    model_type: str
    library: str | None
    state: str
    settings: Any
    layout: BlobLayout
    layers: int
    expert_bytes: int
    dense_bytes: int
    dense_in_memory: int
    dense_read: int
    dense_parameters: int
    converted: bool
    download: int = 0
    conversion_space: int = 0
    notes: tuple[str, ...] = ()


def examine(model: str, dtype: mx.Dtype) -> Needs:
    """Reads the headers of ``model``: a folder, or the name of a repository on the Hugging Face hub.

    Args:
        dtype: of the activations, in which unquantized numbers of the dense part are held.

    Raises:
        FlashMoEError: it is not there, or not a model that is supported.
    """
    folder = Path(model)
    if (folder / MANIFEST).exists() or (folder / STATE).exists():
        return _in_folder(folder, dtype)
    if (repository := published(model)) is not None:
        return _on_hub(repository, dtype)
    with open_checkpoint(model) as checkpoint:
        return _to_convert(checkpoint, dtype)


def _in_folder(folder: Path, dtype: mx.Dtype) -> Needs:
    manifest = Manifest.load(folder)
    headers = []
    for entry in manifest.dense:
        with contextlib.closing(SafetensorsFile(folder / entry.file)) as file:
            headers.append(file.header)
    return _converted(manifest, headers, read_config(folder), dtype)


def _on_hub(repository: Repository, dtype: mx.Dtype) -> Needs:
    manifest = read_manifest(repository)
    names = [file.name for file in wanted_files(repository, manifest)]
    if "config.json" not in names:
        raise FormatError(f"{repository.name}: config.json is not among the files of the model")
    headers = [repository.header(entry.file) for entry in manifest.dense]
    config = json_object(repository.small_file("config.json"), "")
    needs = _converted(manifest, headers, config, dtype)
    size = sum(repository.files[name].size for name in names)
    return replace(needs, state=f"converted, on the hub: {show_size(size)} to fetch", download=size)


def _converted(manifest: Manifest, headers: list[Header], config: dict[str, Any], dtype: mx.Dtype) -> Needs:
    files = zip(manifest.dense, headers)
    tensors = [
        (t.name, t.dtype, t.shape)
        for entry, header in files
        for t in SafetensorsFile(Path(entry.file), header).tensors.values()
    ]
    return _needs(
        manifest.model_type,
        manifest.library,
        "converted",
        config,
        tensors,
        manifest.dense_quantization,
        manifest.layouts,
        len(manifest.layers),
        manifest.expert_bytes,
        manifest.dense_bytes,
        dtype,
        converted=True,
    )


def _to_convert(checkpoint: Checkpoint, dtype: mx.Dtype) -> Needs:
    bound = bind(checkpoint)
    plan = make_plan(bound, Recipe())
    modules = list(plan.modules())
    bits = {p.bits for layout in plan.layouts for p in layout.projections.values()}
    needs = _needs(
        bound.model_type,
        bound.library,
        f"as convert would make it, {' and '.join(map(str, sorted(bits)))} bits",
        checkpoint.config,
        [tensor for module in modules for tensor in module.outputs],
        {m.path: m.quantization for m in modules if m.quantization.quantized},
        plan.layouts,
        len(plan.layers),
        plan.expert_bytes,
        plan.dense_bytes,
        dtype,
        converted=False,
    )
    units, storage = cut(plan, list(checkpoint.shards)), checkpoint.storage
    shards = {name for unit in units for name in unit.shards if storage.temporary and storage.may_drop(name)}
    return replace(
        needs,
        download=sum(checkpoint.shards[name].header.file_size for name in shards),
        conversion_space=disk_needs(units, checkpoint, other_files=0).peak,
        notes=tuple(checkpoint.notes),
    )


def _needs(
    model_type: str,
    library: str | None,
    state: str,
    config: dict[str, Any],
    tensors: list[tuple[str, str, tuple[int, ...]]],
    quantization: dict[str, Quantization],
    layouts: Iterable[BlobLayout],
    layers: int,
    expert_bytes: int,
    dense_bytes: int,
    dtype: mx.Dtype,
    converted: bool,
) -> Needs:
    arch = described(model_type, library, config)
    settings = arch.settings
    tied = not any("lm_head" in name for name, _, _ in tensors)  # the head then reads all of the embedding
    in_memory = embedding = parameters = 0
    for name, stored, shape in tensors:
        count = math.prod(shape)
        size = count * DTYPE_BITS[stored] // 8
        if stored in FLOATS:
            size = count * arch.dtype_of(name, FLOATS[stored], dtype).size
        in_memory += size
        path, _, part = name.rpartition(".")
        if name.startswith(EMBEDDING) and not tied:
            embedding += size
        elif part == "weight":
            parameters += count * 32 // quantization[path].bits if path in quantization else count
    return Needs(
        model_type=model_type,
        library=library,
        state=state,
        settings=settings,
        layout=max(layouts, key=lambda layout: layout.blob_size),
        layers=layers,
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        dense_in_memory=in_memory,
        dense_read=in_memory - embedding,
        dense_parameters=parameters,
        converted=converted,
    )
