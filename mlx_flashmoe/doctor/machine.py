"""What this machine does in a second, measured with the code that will run: reads, products, a layer of the model.

Nothing of a model's weights is needed, only its shapes. Random experts are written to a file of some hundred MB on
the disk in question (and removed; where that cannot be, a converted model's own are read), and a few layers of the
model's own shapes are run with weights of zero: what they take longer than the bytes of their weights do is what a
layer takes apart from its weights.
"""

from __future__ import annotations

import errno
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_flashmoe import kernels, memory, system
from mlx_flashmoe.bench.kernels import memory_reader
from mlx_flashmoe.doctor.predict import Rates
from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.experts import Decode, ExpertStore, SlotArena, StreamedExperts
from mlx_flashmoe.experts.slab import make_slab
from mlx_flashmoe.experts.store import ReadRequest
from mlx_flashmoe.external.model import ExternalConfig
from mlx_flashmoe.kernels.random_slab import random_slab
from mlx_flashmoe.layout import (
    MANIFEST,
    PROJECTIONS,
    BlobLayout,
    LayerEntry,
    Manifest,
    Quantization,
    expert_file,
)
from mlx_flashmoe.models import architecture
from mlx_flashmoe.models.quantized import quantize
from mlx_flashmoe.models.together import join

STAND_IN = "qwen3_moe"  # for models of libraries, which cannot be made smaller
PROBE_BYTES = 256 * 10**6  # of experts that are written, read and computed with, about
LAYERS = 4  # that are timed, at most: as many as it takes until kinds of layers repeat
SMALL_VOCABULARY, SMALL_EXPERTS, FEW_EXPERTS = (
    128,
    128,
    64,
)  # of the model whose layers are timed: next to nothing
PROMPT_TOKENS = 64  # that products and layers are timed with
ROWS = 8  # of each expert; a prompt of 400 tokens has as many with 10 of 512 experts
LEAST_WIDTH = 2048  # of dense products: narrower ones measure nothing but calls
MOST_READS = 100  # of a token's experts in a layer, in one measurement
REPEATS = 5
PROMPT_REPEATS = 3  # a prompt takes a CPU a second


@dataclass(frozen=True)
class Machine:
    """Attributes:
    room: its memory.
    disk_free: bytes.
    copying, reading: bytes a second that copying memory copies, and that the device reads from its own.
    """

    room: memory.Room
    disk_free: int
    copying: float
    reading: float


def measure_machine(folder: Path) -> Machine:
    """``folder``: on the disk whose space counts."""
    room = memory.Room.here()  # before this takes some
    source, target = np.ones(PROBE_BYTES // 8), np.ones(PROBE_BYTES // 8)

    def copy() -> float:
        started = perf_counter()
        np.copyto(target, source)
        return source.nbytes / (perf_counter() - started)

    read = memory_reader(mx.zeros((PROBE_BYTES // 4,), dtype=mx.uint32), PROBE_BYTES)
    return Machine(
        room=room,
        disk_free=disk_free(folder),
        copying=_median(copy),
        reading=_median(read),
    )


def disk_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def measure_reads(layout: BlobLayout, active: int, folder: Path) -> tuple[float, float]:
    """Bytes a second of reading ``active`` experts at a time: from disk, and from the page cache.

    Args:
        folder: on the disk that is measured. If it cannot be written to, or is full, and is a converted model, then
            its own experts are read.

    Raises:
        FlashMoEError: ``folder`` cannot be written to, or is full, and is no converted model.
    """
    count = max(3 * active, PROBE_BYTES // layout.blob_size)
    own = None if _has_room(folder, count * layout.blob_size) else _own_experts(folder, active, count)
    written = nullcontext(own) if own else _on_disk(random_slab(layout, count), layout, folder)
    with written as (probe, manifest):
        page_cache = _reads(ExpertStore(probe, manifest), active, from_disk=False)
        return _reads(ExpertStore(probe, manifest), active, from_disk=True), page_cache


def measure_rates(model_type: str, settings: Any, layout: BlobLayout, active: int, folder: Path) -> Rates:
    """Everything that a prediction needs, in ten seconds or so.

    Args:
        model_type, settings: of the model; an architecture's Config.
        layout: of its experts.
        active: experts that a token uses of a layer.
        folder: on the disk whose reads are measured, as for ``measure_reads``.

    Raises:
        FlashMoEError: as ``measure_reads``.
    """
    dtype = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    disk, page_cache = measure_reads(layout, active, folder)
    dense, dense_flops = _dense_products(max(settings.hidden_size, LEAST_WIDTH), dtype)
    experts, expert_flops = _expert_products(layout, active, dtype)
    rates = Rates(disk, page_cache, dense, experts, dense_flops, expert_flops, 0.0, 0.0, 0.0)
    layer, resident_layer, prompt_token = _layers(model_type, settings, active, dtype, rates)
    return replace(rates, layer=layer, resident_layer=resident_layer, prompt_token=prompt_token)


def _has_room(folder: Path, nbytes: int) -> bool:
    return os.access(folder, os.W_OK) and disk_free(folder) > nbytes


def _own_experts(folder: Path, active: int, count: int) -> tuple[Path, Manifest] | None:
    """The first ``count`` experts of the folder's first layer, if it has one with ``active`` or more."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.load(folder)
    first = manifest.layers[0]
    if first.num_experts < active:
        return None
    few = replace(first, num_experts=min(first.num_experts, count))
    return folder, replace(manifest, layers=(few,))


@contextmanager
def _on_disk(slab: mx.array, layout: BlobLayout, folder: Path) -> Iterator[tuple[Path, Manifest]]:
    """The slab's experts as a converted folder of one layer, for a while."""
    count = slab.shape[0]
    manifest = Manifest("probe", {}, {}, (layout,), (LayerEntry(0, count, 0, (0,) * count),), ())
    try:
        with tempfile.TemporaryDirectory(prefix=".flashmoe-doctor-", dir=folder) as name:
            path = Path(name) / expert_file(0)
            path.parent.mkdir()
            with open(path, "wb") as f:
                f.write(np.asarray(slab).data)
                f.flush()
                system.flush(f.fileno())
            yield Path(name), manifest
    except OSError as e:
        advice = "free some space, or " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        elsewhere = (
            ", or run from a folder on the disk that will hold the model" if folder == Path.cwd() else ""
        )
        raise FlashMoEError(
            f"{folder}: {PROBE_BYTES // 10**6} MB cannot be written there to measure the disk: {e.strerror}; "
            f"{advice}say with --sim-disk how fast it reads{elsewhere}"
        ) from None


def _reads(store: ExpertStore, active: int, from_disk: bool) -> float:
    """Bytes a second when ``active`` experts are read at a time, from a page cache that has all of them or none."""
    layer = store.layers[0]
    layout, count = store.layout(layer), store.num_experts(layer)
    into = make_slab(active, layout.blob_size)
    groups = [range(i, i + active) for i in range(0, count - active + 1, active)][:MOST_READS]

    def read() -> float:
        if from_disk:
            store.drop_page_cache()
        started = perf_counter()
        for group in groups:
            store.start([ReadRequest(layer, expert, slot) for slot, expert in enumerate(group)], into).wait()
        return len(groups) * active * layout.blob_size / (perf_counter() - started)

    read()
    return _median(read)


def _layers(
    model_type: str, settings: Any, active: int, dtype: mx.Dtype, rates: Rates
) -> tuple[float, float, float]:
    """Seconds of a layer beyond what its weights take at ``rates``: for one token when experts may be missing, the
    same when all are known to be resident, and for each token of a prompt."""
    if isinstance(settings, ExternalConfig):
        model_type, settings = STAND_IN, _stand_in(settings)
    count = max(FEW_EXPERTS, active)
    few = {
        "vocab_size": SMALL_VOCABULARY,
        "num_hidden_layers": min(LAYERS, settings.num_hidden_layers),
        "layer_types": getattr(settings, "layer_types", ())[:LAYERS],
        "num_experts": count,
        "dense_layers": (),
        **dict.fromkeys(("n_group", "topk_group"), 1),  # few experts may not make as many groups
    }
    settings = replace(settings, **{name: v for name, v in few.items() if hasattr(settings, name)})
    layers = settings.num_hidden_layers
    q = Quantization(4, 64)
    layout = BlobLayout.build(settings.hidden_size, SMALL_EXPERTS, dict.fromkeys(PROJECTIONS, q), "bfloat16")
    entries = tuple(LayerEntry(i, count, 0, (0,) * count) for i in range(layers))
    with tempfile.TemporaryDirectory() as name:
        for entry in entries:
            path = Path(name) / entry.file
            path.parent.mkdir(exist_ok=True)
            path.touch()
            os.truncate(path, count * layout.blob_size)
        store = ExpertStore(name, Manifest(model_type, {}, {}, (layout,), entries, ()))
    arena = SlotArena(store, layers * count)
    arena.load_all()
    arena.resident = False  # the router's choice shall come to the host, as when experts may be missing
    decode = Decode(arena)
    model = architecture(model_type).Model(settings, lambda i: StreamedExperts(decode, i), active)
    model.set_dtype(dtype)
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.shape[-1] % q.group_size == 0
    ]
    quantize(model, {path: {"bits": q.bits, "group_size": q.group_size} for path in linear})
    model.update(tree_map(mx.zeros_like, model.parameters()))  # random ones would have to be computed first
    mx.eval(model.parameters())
    join(model)

    def prompt() -> float:
        tokens = mx.zeros((1, PROMPT_TOKENS), mx.int32)
        cache = model.make_cache()
        started = perf_counter()
        model.model(tokens, cache)
        mx.eval([c.state for c in cache])
        return (perf_counter() - started) / layers / PROMPT_TOKENS

    cache = model.make_cache()

    def token() -> float:
        started = perf_counter()
        mx.eval(model(mx.zeros((1, 1), mx.int32), cache))
        return (perf_counter() - started) / layers

    def tokens(resident: bool) -> float:
        arena.resident = resident
        token()
        return _median(token, 10 * REPEATS)

    prompt(), token()
    dense: list[mx.array] = [
        a for path, a in cast(Any, tree_flatten(model.parameters())) if "embed" not in path
    ]
    packed = sum(a.size for a in dense if a.dtype == mx.uint32)
    routed = sum(p.out_dims * p.in_dims for p in layout.projections.values())
    seconds = sum(a.nbytes for a in dense) / layers / rates.dense + active * layout.blob_size / rates.experts
    prompt_seconds = 2 * packed * 32 / q.bits / layers / rates.dense_flops + (
        2 * active * routed / rates.expert_flops
    )
    return (
        max(0.0, tokens(resident=False) - seconds),
        max(0.0, tokens(resident=True) - seconds),
        max(0.0, _median(prompt, PROMPT_REPEATS) - prompt_seconds),
    )


def _stand_in(external: ExternalConfig) -> Any:
    """Settings of an architecture of ours, as wide as a library's model: its layers take the host about as long."""
    head, width = 64, external.hidden_size
    return architecture(STAND_IN).Config.from_dict(
        {
            "hidden_size": width,
            "num_hidden_layers": external.num_hidden_layers,
            "vocab_size": external.vocab_size,
            "rms_norm_eps": 1e-6,
            "num_attention_heads": max(1, width // head),
            "num_key_value_heads": 1,
            "head_dim": head,
            "rope_theta": 1e6,
            "num_experts": external.num_experts,
            "num_experts_per_tok": external.num_experts_per_tok,
            "moe_intermediate_size": SMALL_EXPERTS,
            "norm_topk_prob": True,
        }
    )


def _dense_products(width: int, dtype: mx.Dtype) -> tuple[float, float]:
    """Bytes of weights a second with one token, and operations a second with a prompt's."""
    q = Quantization(4, 64)
    rng, groups = np.random.default_rng(0), mx.full((4 * width, width // q.group_size), 1e-3, dtype)
    weights = []
    for _ in range(3):  # in turn, so that none is left in a cache
        packed = rng.integers(0, 2**32, (4 * width, width * q.bits // 32), np.uint32)
        weights.append((mx.array(packed), groups + 0, groups + 0))
    nbytes = sum(part.nbytes for part in weights[0])
    mx.eval(weights)

    def seconds(tokens: int, calls: int) -> float:
        x = mx.random.normal((tokens, width)).astype(dtype)
        mx.eval(x)
        started = perf_counter()
        for i in range(calls):
            y = kernels.quantized_matmul(x, *weights[i % 3], q.group_size, q.bits)
            x = x + 1e-3 * y[:, :width]  # each works on the one before
        mx.eval(x)
        return (perf_counter() - started) / calls

    seconds(1, 3), seconds(PROMPT_TOKENS, 1)
    one, many = _median(lambda: seconds(1, 12)), _median(lambda: seconds(PROMPT_TOKENS, 3), 3)
    return nbytes / one, 2 * PROMPT_TOKENS * 4 * width * width / many


def _expert_products(layout: BlobLayout, active: int, dtype: mx.Dtype) -> tuple[float, float]:
    """Bytes of experts a second with one token, and operations a second with a few rows of each."""
    slab = random_slab(layout, max(3 * active, PROBE_BYTES // layout.blob_size))
    count, width = slab.shape[0], layout.hidden_size
    weights = mx.full((1, active), 1 / active)

    def token(calls: int = 6) -> float:
        x = mx.random.normal((1, width)).astype(dtype)
        started = perf_counter()
        for i in range(calls):
            slots = (mx.arange(i * active, (i + 1) * active, dtype=mx.int32) % count).reshape(1, -1)
            x = x + 1e-3 * kernels.expert_ffn(x, slab, slots, weights, layout)
        mx.eval(x)
        return (perf_counter() - started) / calls

    used = min(count, 16)
    slots = mx.array(np.repeat(np.arange(used, dtype=np.int32), ROWS))

    def rows() -> float:
        x = mx.random.normal((used * ROWS, width)).astype(dtype)
        mx.eval(x)
        started = perf_counter()
        mx.eval(kernels.expert_rows(x, slab, slots, layout))
        return perf_counter() - started

    token(1), rows()
    parameters = sum(p.out_dims * p.in_dims for p in layout.projections.values())
    return active * layout.blob_size / _median(token), 2 * used * ROWS * parameters / _median(rows, 3)


def _median(measure: Callable[[], float], repeats: int = REPEATS) -> float:
    return statistics.median(measure() for _ in range(repeats))
