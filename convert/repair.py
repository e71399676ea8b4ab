"""Mending a converted folder: what is damaged is made again from the checkpoint, and nothing else is read of it.

Each mended file must have the manifest's checksum before it is written, and must have it again when the disk is read.

A blob is written where it is. Killed in the middle, every byte of it is the old one or the right one, and it is
still in the record of damage (damage.py). Any other file is made in ``.conversion`` and takes its place when it is
whole; one of a wrong size moves there first, so that it is no part of the model while it is half mended.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import mlx.core as mx

from mlx_flashmoe.convert.checks import compare, expected, in_order, open_file, where
from mlx_flashmoe.convert.damage import (
    Damage,
    Fault,
    damage_of,
    described,
    evident,
    load_record,
    recorded_files,
    save_record,
    sizes,
)
from mlx_flashmoe.convert.destination import SHARDS, Destination, OutputFile
from mlx_flashmoe.convert.original import Original, open_original
from mlx_flashmoe.convert.units import ExpertsJob, Job, Scratch
from mlx_flashmoe.errors import ConversionError, FormatError, SourceError
from mlx_flashmoe.layout import MANIFEST, Manifest

WORKERS = max(4, min(8, os.cpu_count() or 4))

Progress = Callable[[int, int, str], None]
Note = Callable[[str], None]


def mend(
    out: Destination,
    manifest: Manifest,
    source: str | os.PathLike[str],
    progress: Progress,
    note: Note,
) -> bool:
    """Mends what the record of damage lists, and what is evident without it.

    Args:
        out: the converted folder, entered.
        source: the checkpoint it was made from, a folder or an id.
        progress: called with (bytes written, bytes in all, what is being done).
        note: called with lines: what is mended.

    Returns:
        True if anything was damaged.

    Raises:
        SourceError: ``source`` cannot be read.
        FormatError: ``source`` is not what the folder was made from.
        ConversionError: the folder cannot be written.
    """
    out.moving = True
    damage = load_record(out.folder, manifest)
    for name, experts in damage_of(evident(out.folder, manifest)).items():
        damage.setdefault(name, set()).update(experts)
    damage = _still_damaged(out, manifest, damage)
    if damage:
        note(f"mending {described(damage, manifest)} from {source}")
        out.check_space(_space(out, manifest, damage))
        with open_original(out.folder, manifest, source, out.state / SHARDS, in_ranges=True) as original:
            _Mending(out, manifest, original, source, damage, progress).run()
        note("mended, and read back as it should be")
    save_record(out.folder, {})
    return bool(damage)


def _still_damaged(out: Destination, manifest: Manifest, damage: Damage) -> Damage:
    """The damage without what is right: an earlier run may have mended it, or the record may be older."""
    large = sizes(manifest)
    left: Damage = {}
    for name, experts in damage.items():
        path = out.folder / name
        if name not in large or not path.is_file() or path.stat().st_size != large[name]:
            if name in large or any(fault.file == name for fault in evident(out.folder, manifest)):
                left[name] = set()
            continue
        with ExitStack() as stack:
            fd = open_file(path, stack)
            parts: list[int | None] = [*sorted(experts)] if experts else [None]
            if name in {entry.file for entry in manifest.layers} and not experts:
                parts = [*range(large[name] // _blob_size(manifest, name))]
            wrong = [e for e in parts if compare(out.folder, fd, manifest, name, e)]
            if wrong:
                left[name] = {e for e in wrong if e is not None}
    return left


def _space(out: Destination, manifest: Manifest, damage: Damage) -> int:
    """Bytes of disk that mending takes: dense files are made anew, what expert files have of blobs is kept."""
    needed, layers = 0, {entry.file for entry in manifest.layers}
    for name, size in sizes(manifest).items():
        if name in damage and not damage[name]:
            path = out.folder / name
            needed += size - (min(size, path.stat().st_size) if name in layers and path.is_file() else 0)
    return needed


def _blob_size(manifest: Manifest, file: str) -> int:
    return expected(manifest, file, 0)[1]


class _Mending:
    """Makes again what is damaged."""

    def __init__(
        self,
        out: Destination,
        manifest: Manifest,
        original: Original,
        source: str | os.PathLike[str],
        damage: Damage,
        progress: Progress,
    ) -> None:
        self._out = out
        self._manifest = manifest
        self._original = original
        self._source = source
        self._damage = damage
        self._progress = progress
        self._scratch = Scratch(mx.default_device())
        self._sizes = sizes(manifest)
        self._experts = {entry.file: entry.num_experts for entry in manifest.layers}
        self._written = 0
        self._total = sum(
            len(experts) * _blob_size(manifest, name) if experts else self._sizes.get(name, 0)
            for name, experts in damage.items()
        )

    def run(self) -> None:
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="mend") as pool:
            for name, experts in sorted(self._damage.items()):
                if name in self._experts:
                    self._expert_file(pool, name, experts)
                elif name in self._sizes:
                    self._dense_file(pool, name)
                else:
                    self._small_file(name)

    def _jobs(self, name: str) -> list[Job]:
        return [job for unit in self._original.units if unit.file == name for job in unit.jobs]

    def _expert_file(self, pool: ThreadPoolExecutor, name: str, experts: set[int]) -> None:
        jobs = [job for job in self._jobs(name) if isinstance(job, ExpertsJob)]
        if experts:
            self._blobs(pool, name, self._out.file(name, self._sizes[name]), jobs, sorted(experts))
            return
        # Before the file is touched: is this the source at all?
        self._blob(name, jobs, 0)
        file = self._out.aside(name, self._sizes[name], keep=True)
        lacking = [e for e in range(self._experts[name]) if self._differs(file, name, e)]
        self._total -= (self._experts[name] - len(lacking)) * _blob_size(self._manifest, name)
        self._blobs(pool, name, file, jobs, lacking)
        self._out.place(name)

    def _blobs(
        self,
        pool: ThreadPoolExecutor,
        name: str,
        file: OutputFile,
        jobs: list[ExpertsJob],
        experts: list[int],
    ) -> None:
        size = _blob_size(self._manifest, name)

        def make(e: int) -> list[Fault]:
            file.write_at(e * size, self._blob(name, jobs, e))
            return []

        for _ in in_order(pool, ((e, partial(make, e)) for e in experts)):
            self._report(size, name)
        file.sync()
        for e in experts:
            if self._differs(file, name, e):
                raise _unreliable(where(self._out.folder, self._manifest, name, e))

    def _blob(self, name: str, jobs: list[ExpertsJob], e: int) -> memoryview:
        """An expert's blob, made again. Raises FormatError if it is not the one that the manifest means."""
        offset, size, crc = expected(self._manifest, name, e)
        blob = bytearray(size)
        for job in jobs:
            if job.start <= e < job.stop:
                one = replace(job, start=e, stop=e + 1)
                for (begin, nbytes), data in zip(one.spans, one.make(self._scratch)):
                    blob[begin - offset : begin - offset + nbytes] = data
        if zlib.crc32(blob) != crc:
            raise self._another_source(where(self._out.folder, self._manifest, name, e))
        return memoryview(blob)

    def _differs(self, file: OutputFile, name: str, e: int | None) -> bool:
        offset, nbytes, crc = expected(self._manifest, name, e)
        return file.crc32(offset, nbytes) != crc

    def _dense_file(self, pool: ThreadPoolExecutor, name: str) -> None:
        file = self._out.aside(name, self._sizes[name])

        def make(job: Job) -> list[Fault]:
            for (offset, _), data in zip(job.spans, job.make(self._scratch)):
                file.write_at(offset, data)
            return []

        jobs = self._jobs(name)
        for job, _ in in_order(pool, ((job, partial(make, job)) for job in jobs)):
            self._report(sum(nbytes for _, nbytes in job.spans), name)
        file.sync()
        if self._differs(file, name, None):
            self._out.discard(name)
            raise self._another_source(f"{self._out.folder / name}")
        self._out.place(name)

    def _small_file(self, name: str) -> None:
        path = next((p for p in self._original.checkpoint.side_files if p.name == name), None)
        if path is None:
            raise SourceError(f"{self._source} has no {name}, which is damaged in {self._out.folder}")
        try:
            data = path.read_bytes()
        except OSError as e:
            raise SourceError(f"{path} cannot be read: {e.strerror}") from None
        recorded = recorded_files(self._out.folder, self._manifest)
        if recorded is not None and zlib.crc32(data) != recorded[name]:
            raise self._another_source(f"{self._out.folder / name}")
        file = self._out.aside(name, len(data))
        file.write_at(0, data)
        file.sync()
        if file.crc32(0, len(data)) != zlib.crc32(data):
            raise _unreliable(f"{self._out.folder / name}")
        self._out.place(name)

    def _another_source(self, what: str) -> FormatError:
        return FormatError(
            f"{what}: {self._source} gives other bytes than the checksum in {MANIFEST} is of: it is not what this was "
            "made from, or another version of MLX quantizes otherwise. Give the same source, or convert into a new "
            "folder"
        )

    def _report(self, nbytes: int, name: str) -> None:
        self._written += nbytes
        self._progress(self._written, self._total, name)


def _unreliable(what: str) -> ConversionError:
    return ConversionError(
        f"{what}: the disk does not give back what was written. Check the disk, and convert into another folder"
    )
