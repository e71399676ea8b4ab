"""The conversion itself: experts into blobs, the rest into safetensors, the manifest last.

Work is cut into pieces of a few megabytes (some experts of a layer, some rows of a dense matrix). A thread takes
a piece from its first read to its last write, so that reading, quantizing and writing of different pieces
overlap, and memory is bounded by the number of threads, whatever the model.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_flashmoe.convert import transform
from mlx_flashmoe.convert.destination import Destination, OutputFile
from mlx_flashmoe.convert.families import bind
from mlx_flashmoe.convert.plan import DenseFile, DensePlan, LayerPlan, Plan, make_plan
from mlx_flashmoe.convert.safetensors import Tensor, read_tensors
from mlx_flashmoe.convert.source import Checkpoint, open_checkpoint
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import BlobLayout, DenseEntry, LayerEntry, Manifest, expert_file

PIECE = 32 << 20  # bytes, of source or of blobs, whichever is more
MLX_CACHE = 64 << 20  # freed buffers are of no use to the next piece beyond this
WORKERS = max(2, min(8, os.cpu_count() or 2))

Progress = Callable[[int, int, str], None]
Note = Callable[[str], None]
Written = tuple[LayerPlan, OutputFile, int, int, list[int]]
Read = tuple[DensePlan, int, int, dict[str, transform.Bytes]]
T = TypeVar("T")


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    q_group_size: int | None = None,
    q_bits: int | None = None,
    revision: str | None = None,
    *,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Manifest:
    """Repacks a checkpoint for streaming.

    Args:
        hf_path: a checkpoint folder, or a Hugging Face id ("org/name").
        mlx_path: the folder to write; new or empty.
        q_group_size: 32, 64 or 128. Default: the checkpoint's own if it is quantized, else 64.
        q_bits: 2, 3, 4, 6 or 8 for experts, embeddings and dense linears (routers and shared-expert gates: 8);
            16 keeps all as published. Default: as published if the checkpoint is quantized, else 4. A checkpoint
            quantized at the asked bits is repacked byte for byte; fewer bits quantize its dequantized values anew.
        revision: branch, tag or commit of a Hugging Face id.
        progress: called with (bytes of the checkpoint done, bytes in all, what is being done), often.
        note: called with single lines worth reading: what is left out, what will be written.

    Returns:
        The manifest of the converted folder.

    Raises:
        SourceError: the checkpoint is missing, malformed, truncated or unsupported.
        ConversionError: the options do not fit the checkpoint, ``mlx_path`` is in use, no space is left.
        Whatever is raised, files made so far are removed.
    """
    destination = Path(mlx_path)
    Destination.check_unused(destination)
    with open_checkpoint(hf_path, revision) as checkpoint:
        bound = bind(checkpoint)
        plan = make_plan(bound, q_bits, q_group_size)
        for line in plan.notes:
            if note is not None:
                note(line)
        side_files = checkpoint.side_files()
        checksums = 12 * sum(p.experts.num_experts for p in plan.layers)
        needed = plan.dense_bytes + plan.expert_bytes + sum(p.stat().st_size for p in side_files) + checksums
        Destination.check_space(destination, needed)
        with Destination(destination) as out:
            for path in side_files:
                _copy(path, out)
            dense, layers = _write(plan, out, progress or (lambda done, total, what: None))
            manifest = Manifest(
                model_type=bound.model_type,
                source=_source(checkpoint),
                dense_quantization={
                    m.path: m.quantization for m in plan.modules() if m.quantization.quantized
                },
                layouts=tuple(plan.layouts),
                layers=layers,
                dense=dense,
            )
            out.save(manifest)
    return manifest


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"path": checkpoint.origin, "revision": checkpoint.revision}


def _copy(path: Path, out: Destination) -> None:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}") from None
    file = out.create(path.name)
    file.append(data)
    file.finish()


def _write(
    plan: Plan, out: Destination, progress: Progress
) -> tuple[tuple[DenseEntry, ...], tuple[LayerEntry, ...]]:
    """Writes all files but the manifest."""
    total, done = plan.source_bytes, 0

    def report(nbytes: int, what: str) -> None:
        nonlocal done
        done += nbytes
        progress(done, total, what)

    device = mx.default_device()
    cache_limit = mx.set_cache_limit(MLX_CACHE)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="convert")
    try:
        report(0, "dense part")
        dense = tuple(
            _write_dense(f, out, pool, device, lambda n: report(n, "dense part")) for f in plan.dense
        )
        layers = _write_experts(plan, out, pool, device, report)
    finally:
        # Nothing may still be writing when the destination removes its files.
        pool.shutdown(wait=True, cancel_futures=True)
        mx.set_cache_limit(cache_limit)
        mx.clear_cache()
    return dense, layers


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Results of the jobs, in order; a few are under way or waiting to be taken at any time."""
    pending: deque[Future[T]] = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) > WORKERS + 1:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _write_dense(
    plan: DenseFile,
    out: Destination,
    pool: ThreadPoolExecutor,
    device: mx.Device,
    done: Callable[[int], None],
) -> DenseEntry:
    file = out.create(plan.name)
    file.append(plan.header)

    def jobs() -> Iterator[Callable[[], Read]]:
        for module in plan.modules:
            for start, stop in _pieces(module.dense.matrix.weight.shape[0], module.dense.matrix.nbytes):
                yield partial(_dense_piece, module, start, stop, device)

    # Weights go to the file as they come; scales and biases, a sixteenth of them, wait for their turn.
    waiting: dict[str, list[transform.Bytes]] = {}
    for module, start, stop, parts in _in_order(pool, jobs()):
        file.append(memoryview(parts.pop("weight")))
        for part, data in parts.items():
            waiting.setdefault(part, []).append(data)
        if stop == module.dense.matrix.weight.shape[0]:
            for part in ("scales", "biases"):
                for data in waiting.pop(part, []):
                    file.append(memoryview(data))
        done(module.dense.matrix.rows(start, stop).nbytes)
    file.finish()
    return DenseEntry(plan.name, file.size, file.crc32)


def _dense_piece(plan: DensePlan, start: int, stop: int, device: mx.Device) -> Read:
    """Reads and converts some rows of a dense module. Returns its arguments, and what to write of each part."""
    matrix = plan.dense.matrix.rows(start, stop)
    if plan.quantization != matrix.quantization:
        parts = dict(
            zip(("weight", "scales", "biases"), transform.quantize(matrix, plan.quantization, device))
        )
    elif plan.dense.kind == "norm":
        parts = {"weight": transform.one_plus(matrix.weight)}
    else:
        parts = {part: tensor.read() for part, tensor in matrix.parts.items()}
    return plan, start, stop, parts


def _pieces(rows: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cuts ``rows`` rows of ``nbytes`` bytes together into ranges of about PIECE bytes."""
    step = max(1, rows * PIECE // max(nbytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _write_experts(
    plan: Plan,
    out: Destination,
    pool: ThreadPoolExecutor,
    device: mx.Device,
    report: Callable[[int, str], None],
) -> tuple[LayerEntry, ...]:
    blobs = _Blobs(device)

    def jobs() -> Iterator[Callable[[], Written]]:
        for layer in plan.layers:
            count, layout = layer.experts.num_experts, plan.layouts[layer.layout]
            file = out.create(expert_file(layer.experts.layer))
            for start, stop in _pieces(count, count * max(layer.source_bytes, layout.blob_size)):
                yield partial(blobs.write, layer, layout, file, start, stop)

    entries = []
    crcs: list[int] = []
    finishing: list[Future[None]] = []
    for layer, file, start, stop, written in _in_order(pool, jobs()):
        crcs += written
        if stop == layer.experts.num_experts:
            entries.append(LayerEntry(layer.experts.layer, stop, layer.layout, tuple(crcs)))
            crcs = []
            finishing.append(pool.submit(file.finish))
        report(
            (stop - start) * layer.source_bytes, f"layer {len(entries) + bool(crcs)} of {len(plan.layers)}"
        )
    for future in finishing:
        future.result()
    return tuple(entries)


class _Blobs:
    """Makes blobs and writes them. Every thread keeps its buffer from one piece to the next."""

    def __init__(self, device: mx.Device) -> None:
        self._device = device
        self._own = threading.local()

    def write(self, plan: LayerPlan, layout: BlobLayout, file: OutputFile, start: int, stop: int) -> Written:
        """Writes the blobs of experts start to stop. Returns its arguments, and the checksums."""
        blobs = self._buffer(layout, stop - start)
        copied: list[tuple[Tensor, memoryview]] = []
        for e in range(start, stop):
            for name, matrix in plan.experts.expert(e).items():
                components = layout.projections[name].components
                room = {
                    part: blobs[e - start, c.offset : c.offset + c.nbytes] for part, c in components.items()
                }
                if plan.quantization[name] == matrix.quantization:
                    copied += [(tensor, memoryview(room[part])) for part, tensor in matrix.parts.items()]
                    continue
                made = transform.quantize(matrix, plan.quantization[name], self._device)
                for part, data in zip(("weight", "scales", "biases"), made):
                    room[part][:] = data
        read_tensors(copied)
        crcs = [zlib.crc32(blob) for blob in blobs]
        file.write_at(start * layout.blob_size, memoryview(blobs.reshape(-1)))
        return plan, file, start, stop, crcs

    def _buffer(self, layout: BlobLayout, count: int) -> transform.Bytes:
        kept: tuple[BlobLayout, transform.Bytes] | None = getattr(self._own, "kept", None)
        if kept is None or kept[0] != layout or len(kept[1]) < count:
            # Zeros, so that the gaps between components are.
            kept = self._own.kept = (layout, np.zeros((count, layout.blob_size), dtype=np.uint8))
        return kept[1][:count]
