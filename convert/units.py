"""The plan cut into units: what is read from the same shards and written to the same file, about a gigabyte each.

A unit is what the journal counts, and what is done again if a conversion is killed in the middle of it. It needs
nothing but its shards, so that shards can come and go one by one: where the parts of an expert are spread over
shards, each unit fills its parts of the blobs, wherever in the file they are. Within a unit, jobs of a few
megabytes are what a thread does at once.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_flashmoe.convert import transform
from mlx_flashmoe.convert.binding import Matrix
from mlx_flashmoe.convert.plan import DenseFile, DensePlan, LayerPlan, Plan
from mlx_flashmoe.convert.safetensors import DTYPE_BITS, Tensor, read_tensors
from mlx_flashmoe.layout import BlobLayout, Quantization, expert_file

UNIT = 1 << 30  # bytes of the source or of the result, whichever are more
PIECE = 32 << 20  # likewise, of a job
FLUSHING = 2  # units being flushed to the disk while the next is worked on, at most

Span = tuple[int, int]  # offset in the file, bytes


class Scratch:
    """What jobs work with: the device, and buffers that every thread keeps from one job to the next."""

    def __init__(self, device: mx.Device) -> None:
        self.device = device
        self._own = threading.local()

    def blobs(self, layout: BlobLayout, count: int) -> transform.Bytes:
        """uint8 [count, blob_size]; what no component covers is zero."""
        kept: tuple[BlobLayout, transform.Bytes] | None = getattr(self._own, "kept", None)
        if kept is None or kept[0] != layout or len(kept[1]) < count:
            kept = self._own.kept = (layout, np.zeros((count, layout.blob_size), dtype=np.uint8))
        return kept[1][:count]


class Job(Protocol):
    """Some megabytes of a file.

    Attributes:
        spans: where they go.
        source_bytes: what is read for them.
    """

    @property
    def spans(self) -> list[Span]: ...

    @property
    def source_bytes(self) -> int: ...

    def make(self, scratch: Scratch) -> list[memoryview]:
        """The contents of the spans, valid until this thread's next job."""
        ...


@dataclass(frozen=True)
class Unit:
    """Jobs for one file from the same shards. ``name`` is unique in a plan; ``what`` is for people."""

    name: str
    file: str
    what: str
    shards: tuple[str, ...]
    jobs: list[Job]

    @property
    def spans(self) -> list[Span]:
        return [span for job in self.jobs for span in job.spans]

    @property
    def source_bytes(self) -> int:
        return sum(job.source_bytes for job in self.jobs)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(nbytes for _, nbytes in self.spans)


@dataclass(frozen=True)
class HeaderJob:
    """The header of a dense file."""

    data: bytes
    source_bytes: int = 0

    @property
    def spans(self) -> list[Span]:
        return [(0, len(self.data))]

    def make(self, scratch: Scratch) -> list[memoryview]:
        return [memoryview(self.data)]


@dataclass(frozen=True)
class DenseJob:
    """Rows [start, stop) of a dense module, whose first byte in the file is ``offset``."""

    plan: DensePlan
    offset: int
    start: int
    stop: int

    @property
    def spans(self) -> list[Span]:
        spans, offset = [], self.offset
        for _, dtype, shape in self.plan.outputs:
            rows = _rows(shape)
            row = math.prod(shape[1:]) * DTYPE_BITS[dtype] // 8
            spans.append((offset + self.start * row, (self.stop - self.start) * row))
            offset += rows * row
        return spans

    @property
    def source_bytes(self) -> int:
        return self.plan.dense.matrix.rows(self.start, self.stop).nbytes

    def make(self, scratch: Scratch) -> list[memoryview]:
        matrix = self.plan.dense.matrix.rows(self.start, self.stop)
        if self.plan.dense.kind == "norm":
            return [transform.one_plus(matrix.weight).data]
        if copied(matrix, self.plan.quantization):
            return [tensor.read().data for tensor in matrix.parts.values()]
        return [data.data for data in transform.convert(matrix, self.plan.quantization, scratch.device)]


def _rows(shape: tuple[int, ...]) -> int:
    """The rows of an array; a scalar is one."""
    return shape[0] if shape else 1


# What of an expert a job brings: a part of a projection as it is, or a projection converted (None).
Piece = tuple[str, str | None]


@dataclass(frozen=True)
class ExpertsJob:
    """The same pieces of the blobs of experts [start, stop). ``runs``: the bytes of a blob they fill."""

    plan: LayerPlan
    layout: BlobLayout
    pieces: tuple[Piece, ...]
    runs: list[tuple[int, int]]
    start: int
    stop: int
    source_bytes: int

    @property
    def spans(self) -> list[Span]:
        size = self.layout.blob_size
        return [(e * size + a, b - a) for e in range(self.start, self.stop) for a, b in self.runs]

    def make(self, scratch: Scratch) -> list[memoryview]:
        blobs = scratch.blobs(self.layout, self.stop - self.start)
        reads: list[tuple[Tensor, memoryview]] = []
        for blob, e in zip(blobs, range(self.start, self.stop)):
            matrices = self.plan.experts.expert(e)
            for name, part in self.pieces:
                matrix, components = matrices[name], self.layout.projections[name].components
                if part is not None:
                    c = components[part]
                    reads.append((matrix.parts[part], memoryview(blob[c.offset : c.offset + c.nbytes])))
                    continue
                made = transform.convert(matrix, self.plan.quantization[name], scratch.device)
                for c, data in zip(components.values(), made):
                    blob[c.offset : c.offset + c.nbytes] = data
        read_tensors(reads)
        return [memoryview(blob[a:b]) for blob in blobs for a, b in self.runs]


def copied(matrix: Matrix, quantization: Quantization) -> bool:
    """Whether a matrix stays byte for byte as published."""
    return quantization == matrix.quantization and not matrix.fp8 and not matrix.symmetric


def cut(plan: Plan, shards: Sequence[str]) -> list[Unit]:
    """All units, in the order in which they can be done when the shards come one after the other."""
    rank = {name: i for i, name in enumerate(shards)}
    builder = _Builder(shards)
    for file in plan.dense:
        _cut_dense(file, rank, builder)
    for number, layer in enumerate(plan.layers, 1):
        what = f"layer {number} of {len(plan.layers)}"
        _cut_layer(layer, plan.layouts[layer.layout], what, rank, builder)
    return sorted(builder.units, key=lambda u: max((rank[s] for s in u.shards), default=-1))


def fingerprint(units: Iterable[Unit]) -> str:
    """Tells apart plans that write anything else, or elsewhere, or in another order."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(f"{unit.name} {unit.shards} {unit.spans}\n".encode())
    return digest.hexdigest()


@dataclass
class _Builder:
    """Collects jobs into units of about UNIT bytes."""

    shards: Sequence[str]
    units: list[Unit] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, file: str, what: str, ranks: tuple[int, ...], jobs: Iterable[Job]) -> None:
        pending: list[Job] = []
        size = 0
        for job in jobs:
            pending.append(job)
            size += max(job.source_bytes, sum(n for _, n in job.spans))
            if size >= UNIT:
                self._unit(file, what, ranks, pending)
                pending, size = [], 0
        if pending:
            self._unit(file, what, ranks, pending)

    def _unit(self, file: str, what: str, ranks: tuple[int, ...], jobs: list[Job]) -> None:
        name = f"{file}#{self._counts[file]}"
        self._counts[file] += 1
        self.units.append(Unit(name, file, what, tuple(self.shards[r] for r in ranks), jobs))


def _ranks(tensors: Iterable[Tensor], rank: dict[str, int]) -> tuple[int, ...]:
    return tuple(sorted({rank[t.file.path.name] for t in tensors}))


def _cut_dense(file: DenseFile, rank: dict[str, int], builder: _Builder) -> None:
    groups: dict[tuple[int, ...], list[Job]] = {(): [HeaderJob(file.header)]}
    offset = len(file.header)
    for module in file.modules:
        matrix = module.dense.matrix
        jobs = groups.setdefault(_ranks(matrix.parts.values(), rank), [])
        rows = _rows(matrix.weight.shape)
        for start, stop in _ranges(rows, max(matrix.nbytes, module.nbytes)):
            jobs.append(DenseJob(module, offset, start, stop))
        offset += module.nbytes
    for ranks, jobs in groups.items():
        builder.add(file.name, "dense part", ranks, jobs)


def _ranges(rows: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cuts ``rows`` rows of ``nbytes`` bytes together into ranges of about PIECE bytes."""
    step = max(1, rows * PIECE // max(nbytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _cut_layer(
    layer: LayerPlan, layout: BlobLayout, what: str, rank: dict[str, int], builder: _Builder
) -> None:
    groups: dict[tuple[int, ...], list[tuple[int, tuple[Piece, ...]]]] = {}
    for e in range(layer.experts.num_experts):
        matrices = layer.experts.expert(e)
        found: dict[tuple[int, ...], list[Piece]] = {}
        for name, matrix in matrices.items():
            if not copied(matrix, layer.quantization[name]):
                found.setdefault(_ranks(matrix.parts.values(), rank), []).append((name, None))
                continue
            for part, tensor in matrix.parts.items():
                found.setdefault(_ranks([tensor], rank), []).append((name, part))
        for ranks, pieces in found.items():
            groups.setdefault(ranks, []).append((e, tuple(pieces)))
    first = layer.experts.expert(0)
    for ranks, experts in groups.items():
        builder.add(
            expert_file(layer.experts.layer), what, ranks, _expert_jobs(layer, layout, experts, first)
        )


def _expert_jobs(
    layer: LayerPlan,
    layout: BlobLayout,
    experts: list[tuple[int, tuple[Piece, ...]]],
    first: dict[str, Matrix],
) -> Iterator[Job]:
    i = 0
    while i < len(experts):
        start, pieces = experts[i]
        runs = _runs(layout, pieces)
        each = sum(
            first[name].nbytes if part is None else first[name].parts[part].nbytes for name, part in pieces
        )
        most = max(1, PIECE // max(each, sum(b - a for a, b in runs), 1))
        n = 1
        while n < most and i + n < len(experts) and experts[i + n] == (start + n, pieces):
            n += 1
        yield ExpertsJob(layer, layout, pieces, runs, start, start + n, n * each)
        i += n


def _runs(layout: BlobLayout, pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    """The ranges of a blob that the pieces fill: from component to component, gaps between them included."""
    runs: list[tuple[int, int]] = []
    components = [(name, part, c) for name, part, c in layout.components()]
    bounds = [c.offset for _, _, c in components[1:]] + [layout.blob_size]
    for (name, part, c), bound in zip(components, bounds):
        if (name, part) not in pieces and (name, None) not in pieces:
            continue
        if runs and runs[-1][1] == c.offset:
            runs[-1] = (runs[-1][0], bound)
        else:
            runs.append((c.offset, bound))
    return runs
