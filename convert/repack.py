"""The conversion itself: experts into blobs, the rest into safetensors, the manifest last.

The plan is cut into units (units.py), and a unit into jobs of a few megabytes. A thread takes a job from its first
read to its last write, so that reading, quantizing and writing of different jobs overlap, and memory is bounded by
the number of threads, whatever the model. Behind them, one thread flushes finished units to the disk, one after
the other, notes them in the journal, and lets go of shards that no unit needs any more.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flashmoe.checksum import crc32_of
from mlx_flashmoe.convert.binding import Bound, bind
from mlx_flashmoe.convert.destination import (
    JOURNAL,
    SHARDS,
    Destination,
    OutputFile,
    is_checkpoint,
    new_folder,
)
from mlx_flashmoe.convert.estimate import Needs, disk_needs, expected_time
from mlx_flashmoe.convert.hub import Unreachable
from mlx_flashmoe.convert.journal import Beginning, Journal
from mlx_flashmoe.convert.plan import Plan, make_plan
from mlx_flashmoe.convert.recipe import Choice, Recipe, check, read_recipe
from mlx_flashmoe.convert.repair import mend
from mlx_flashmoe.convert.source import Checkpoint, LocalFolder, open_checkpoint
from mlx_flashmoe.convert.units import FLUSHING, Job, Scratch, Unit, cut, fingerprint
from mlx_flashmoe.errors import ConversionError, SourceError
from mlx_flashmoe.layout import (
    BITS,
    GROUP_SIZES,
    MANIFEST,
    UNQUANTIZED,
    DenseEntry,
    LayerEntry,
    Manifest,
    expert_file,
)
from mlx_flashmoe.sizes import counted, show_size

MLX_CACHE = 64 << 20  # freed buffers are of no use to the next job beyond this
WORKERS = max(4, min(8, os.cpu_count() or 4))  # they wait for the disk as much as they work

Progress = Callable[[int, int, str], None]
Note = Callable[[str], None]


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    q_group_size: int | None = None,
    q_bits: int | None = None,
    revision: str | None = None,
    *,
    q_bits_gate_up: int | None = None,
    q_bits_down: int | None = None,
    recipe: str | os.PathLike[str] | None = None,
    delete_source: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Manifest:
    """Repacks a checkpoint for streaming; resumes a conversion that was interrupted, mends one that is damaged.

    Args:
        hf_path: a checkpoint folder, or a Hugging Face id ("org/name"), whose shards are then downloaded one or two
            at a time, and removed when they are repacked.
        mlx_path: the folder to write; new or empty, or of the same conversion, interrupted or complete. Of a complete
            one, files that are missing or of a wrong size, and what ``verify`` found damaged, are made again.
        q_group_size: 32, 64 or 128. Default: the checkpoint's own if it is quantized, else 64.
        q_bits: 2, 3, 4, 6 or 8 for experts, embeddings and dense linears (routers and shared-expert gates: 8);
            16 keeps all as published. Default: as published if the checkpoint is quantized, else 4. A checkpoint
            quantized at the asked bits is repacked byte for byte; fewer bits quantize its dequantized values anew.
        revision: branch, tag or commit of a Hugging Face id.
        q_bits_gate_up, q_bits_down: bits of the experts' gate_proj and up_proj, and of their down_proj.
        recipe: a TOML file of the same, layer by layer if need be (recipe.py); other arguments come before what it
            says of the whole model, not before its layers.
        delete_source: remove each shard of the folder ``hf_path`` once every tensor of it is in place, flushed to
            the disk and read back. Shards with tensors that are not converted stay.
        progress: called with (bytes of the checkpoint done, bytes in all, what is being done), often.
        note: called with single lines worth reading: what is left out, what will be written.

    Returns:
        The manifest of the converted folder.

    Raises:
        SourceError: the checkpoint is missing, malformed, truncated, changed or unsupported.
        ConversionError: the options do not fit the checkpoint, or those that the conversion was begun with;
            ``mlx_path`` is in use; no space is left. What was done so far stays, and is not done again.
    """
    note = note or (lambda line: None)
    wanted = _recipe(q_bits, q_group_size, q_bits_gate_up, q_bits_down, recipe)
    local = Path(hf_path).is_dir()
    if local and is_checkpoint(Path(hf_path)) and os.path.realpath(hf_path) == os.path.realpath(mlx_path):
        raise ConversionError(
            f"{hf_path} is the checkpoint itself: --mlx-path takes a new folder, for example "
            f"{new_folder(Path(hf_path))}"
        )
    if delete_source and not local:
        raise ConversionError("--delete-source is for folders; what is downloaded is removed anyway")
    asked = {
        "path": os.path.abspath(hf_path) if local else str(hf_path),
        "revision": revision,
        "recipe": wanted.to_json(),
    }
    with Destination(Path(mlx_path)) as out:
        made = _made_already(out, asked)
        if made is not None:
            if not mend(out, made, hf_path, progress or (lambda done, total, what: None), note):
                note(f"{out.folder} is complete already; nothing to do")
            out.clean()
            return made
        notes = Journal(out.state / JOURNAL)
        try:
            begun = _begun(notes, out, asked)
            with open_checkpoint(hf_path, revision, downloads=out.state / SHARDS, begun=begun) as checkpoint:
                return _convert(checkpoint, wanted, asked, out, notes, delete_source, progress, note)
        except Unreachable as e:
            if notes.beginning is None:
                raise
            raise Unreachable(f"{e}: the same command resumes") from None
        finally:
            notes.close()


def _recipe(
    q_bits: int | None,
    q_group_size: int | None,
    q_bits_gate_up: int | None,
    q_bits_down: int | None,
    file: str | os.PathLike[str] | None,
) -> Recipe:
    bits = (*BITS, UNQUANTIZED)
    check("q_bits", q_bits, bits)
    check("q_group_size", q_group_size, GROUP_SIZES)
    check("q_bits_gate_up", q_bits_gate_up, bits)
    check("q_bits_down", q_bits_down, bits)
    written = read_recipe(file) if file is not None else Recipe()
    return Recipe(
        Choice(q_bits, q_group_size, q_bits_gate_up, q_bits_down).over(written.model), written.layers
    )


def _made_already(out: Destination, asked: dict[str, Any]) -> Manifest | None:
    """The manifest, if this very conversion is complete."""
    if not (out.folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(out.folder)
    if {"path": manifest.source.get("path"), **manifest.source.get("asked", {})} != asked:
        raise ConversionError(
            f"{out.folder} is a converted model already, of another source or with other options; choose another "
            "folder, or remove it first"
        )
    return manifest


def _begun(notes: Journal, out: Destination, asked: dict[str, Any]) -> Beginning | None:
    """How an earlier run of this conversion began; None if this is the first."""
    begun = notes.beginning
    if begun is None:
        return None
    out.keep()
    out.moving = notes.moving
    if begun.asked != asked:
        raise ConversionError(
            f"{out.folder} holds an unfinished conversion of {begun.asked['path']} with other options "
            f"({_options(begun.asked)}); start it with those again, or remove {out.folder} to start over"
        )
    return begun


def _options(asked: dict[str, Any]) -> str:
    options = {"revision": asked["revision"], **asked["recipe"]}
    return ", ".join(f"{k} {v}" for k, v in options.items() if v is not None) or "none"


def _convert(
    checkpoint: Checkpoint,
    recipe: Recipe,
    asked: dict[str, Any],
    out: Destination,
    notes: Journal,
    delete_source: bool,
    progress: Progress | None,
    note: Note,
) -> Manifest:
    for line in checkpoint.notes:
        note(line)
    bound = bind(checkpoint)
    plan = make_plan(bound, recipe)
    for line in plan.notes:
        note(line)
    sizes = {f.name: f.nbytes for f in plan.dense}
    for p in plan.layers:
        sizes[expert_file(p.experts.layer)] = p.experts.num_experts * plan.layouts[p.layout].blob_size
    units = cut(plan, list(checkpoint.shards))
    beginning = Beginning(
        asked=asked,
        source=checkpoint.identity,
        plan=fingerprint(units),
        units=dict(Counter(u.file for u in units)),
        shards=checkpoint.recorded(),
    )
    if notes.beginning is None:
        out.check_empty()
    elif notes.beginning != beginning:
        raise ConversionError(
            f"{out.folder} was begun by another version of this program, or its source has changed; remove it to "
            "start over"
        )
    # Done is what the journal says, as long as the file is still what it was.
    done = {
        u.name: notes.done[u.name] for u in units if u.name in notes.done and out.has(u.file, sizes[u.file])
    }
    todo = [u for u in units if u.name not in done]
    if delete_source:
        assert isinstance(checkpoint.storage, LocalFolder)
        checkpoint.storage.remove_when_done(_removable(checkpoint, bound, note))
    for unit in todo:
        for shard in unit.shards:
            if shard not in checkpoint.present:
                raise SourceError(f"{checkpoint.folder / shard} is missing; not all of it was converted yet")

    side_files = [(path.name, _read(path)) for path in checkpoint.side_files]
    checksums = 12 * sum(p.experts.num_experts for p in plan.layers)
    needs = disk_needs(todo, checkpoint, checksums + sum(len(data) for _, data in side_files))
    free = out.check_space(needs.peak)
    for line in _expectations(needs, free, units, todo, plan, checkpoint, out):
        note(line)

    if notes.beginning is None:
        notes.begin(beginning)
        out.keep()
    for name, data in side_files:
        out.write(name, data)
    files = {name: out.file(name, size) for name, size in sizes.items()}
    _Run(units, done, checkpoint, files, notes, progress or (lambda done, total, what: None)).run()

    manifest = _manifest(bound, plan, checkpoint, asked, units, done, side_files)
    out.check_names()
    notes.move()
    out.complete(manifest)
    return manifest


def _removable(checkpoint: Checkpoint, bound: Bound, note: Note) -> set[str]:
    """The shards that are nothing but tensors that are converted."""
    converted = {t.name for d in bound.dense for t in d.matrix.parts.values()}
    for layer in bound.layers:
        for e in range(layer.num_experts):
            converted.update(t.name for m in layer.expert(e).values() for t in m.parts.values())
    keep = {n for n, file in checkpoint.shards.items() if not file.tensors.keys() <= converted}
    if keep:
        note(
            "not deleted, because they hold tensors that are left out or are not copied as they are: "
            f"{', '.join(sorted(keep))}"
        )
    return set(checkpoint.shards) - keep


def _expectations(
    needs: Needs,
    free: int,
    units: Sequence[Unit],
    todo: Sequence[Unit],
    plan: Plan,
    checkpoint: Checkpoint,
    out: Destination,
) -> list[str]:
    lines = []
    if len(todo) < len(units):
        lines.append(
            f"resuming an interrupted conversion: {len(units) - len(todo)} of {counted(len(units), 'part')} done"
        )
    lines.append(
        f"to read {show_size(needs.read)}, to write {show_size(needs.written)}; disk space needed "
        f"{show_size(needs.peak)} of {show_size(free)} free"
    )
    if todo:
        lines.append(expected_time(needs, todo, plan.quantizes, checkpoint, out))
    return lines


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}") from None


class _Run:
    """Does what is not done. ``done``: unit name -> crc32 of each of its spans; complete after ``run``."""

    def __init__(
        self,
        units: list[Unit],
        done: dict[str, list[int]],
        checkpoint: Checkpoint,
        files: dict[str, OutputFile],
        notes: Journal,
        progress: Progress,
    ) -> None:
        self._units = units
        self._done = done
        self._todo = [u for u in units if u.name not in done]
        self._checkpoint = checkpoint
        self._files = files
        self._notes = notes
        self._progress = progress
        self._total = sum(u.source_bytes for u in units)
        self._read = self._total - sum(u.source_bytes for u in self._todo)
        self._scratch = Scratch(mx.default_device())
        self._left = Counter(shard for unit in self._todo for shard in unit.shards)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="convert")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        # Jobs under way, and units being flushed, oldest first.
        self._jobs: deque[tuple[Unit, Job, Future[list[int]]]] = deque()
        self._flushing: deque[Future[None]] = deque()
        self._crcs: list[int] = []

    def run(self) -> None:
        cache_limit = mx.set_cache_limit(MLX_CACHE)
        try:
            self._report(0, self._todo[0].what if self._todo else "")
            # A run before this one may have been stopped just before it let go of a shard.
            for shard in self._checkpoint.shards:
                if not self._left[shard]:
                    self._flushing.append(self._flusher.submit(self._let_go, shard))
            self._go()
        finally:
            # Nothing may still be writing when the files are closed.
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._flusher.shutdown(wait=True, cancel_futures=True)
            mx.set_cache_limit(cache_limit)
            mx.clear_cache()

    def _go(self) -> None:
        storage = self._checkpoint.storage
        order = list(dict.fromkeys(name for unit in self._todo for name in unit.shards))
        fetched = 0
        for unit in self._todo:
            for shard in unit.shards:
                if order.index(shard) < fetched:
                    continue
                fetched = order.index(shard) + 1
                if storage.temporary:
                    # Before another comes, those that are done with must be gone.
                    self._drain(0, 0)
                    for name in order[fetched - 1 : fetched + 1]:
                        storage.prefetch(name)
                storage.fetch(shard, lambda what: self._report(0, what))
            for job in unit.jobs:
                self._drain(WORKERS + 1, FLUSHING)
                self._jobs.append((unit, job, self._pool.submit(self._work, unit, job)))
        self._drain(0, 0)

    def _work(self, unit: Unit, job: Job) -> list[int]:
        """A job from its first read to its last write; returns the checksums of its spans."""
        file, crcs = self._files[unit.file], []
        for (offset, _), data in zip(job.spans, job.make(self._scratch)):
            file.write_at(offset, data)
            crcs.append(zlib.crc32(data))
        return crcs

    def _drain(self, jobs: int, flushing: int) -> None:
        """Waits until there are no more than so many jobs under way and units being flushed."""
        while len(self._jobs) > jobs:
            unit, job, future = self._jobs.popleft()
            self._crcs += future.result()
            self._report(job.source_bytes, unit.what)
            if job is unit.jobs[-1]:
                self._flushing.append(self._flusher.submit(self._finish, unit, self._crcs))
                self._crcs = []
        while self._flushing and (len(self._flushing) > flushing or self._flushing[0].done()):
            self._flushing.popleft().result()

    def _finish(self, unit: Unit, crcs: list[int]) -> None:
        self._files[unit.file].sync()
        self._notes.finish(unit.name, crcs)
        self._done[unit.name] = crcs
        for shard in unit.shards:
            self._checkpoint.shards[shard].forget()
            self._left[shard] -= 1
            if not self._left[shard]:
                self._let_go(shard)

    def _let_go(self, shard: str) -> None:
        """No unit needs the shard any more. It is removed only if the disk gives back what was made of it."""
        self._checkpoint.shards[shard].close()
        if not self._checkpoint.storage.may_drop(shard):
            return
        for unit in self._units:
            if shard not in unit.shards:
                continue
            file = self._files[unit.file]
            for (offset, nbytes), crc in zip(unit.spans, self._done[unit.name]):
                if file.crc32(offset, nbytes) != crc:
                    raise ConversionError(
                        f"{file.path}: the disk does not give back what was written at byte {offset}; "
                        f"{shard} is kept. Check the disk, and convert into another folder"
                    )
        self._checkpoint.storage.drop(shard)

    def _report(self, nbytes: int, what: str) -> None:
        self._read += nbytes
        self._progress(self._read, self._total, what)


def _manifest(
    bound: Bound,
    plan: Plan,
    checkpoint: Checkpoint,
    asked: dict[str, Any],
    units: list[Unit],
    done: dict[str, list[int]],
    side_files: list[tuple[str, bytes]],
) -> Manifest:
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for unit in units:
        spans = [(offset, n, crc) for (offset, n), crc in zip(unit.spans, done[unit.name])]
        parts.setdefault(unit.file, []).extend(spans)
    layers = []
    for p in plan.layers:
        size, count = plan.layouts[p.layout].blob_size, p.experts.num_experts
        blobs: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
        for offset, nbytes, crc in parts[expert_file(p.experts.layer)]:
            blobs[offset // size].append((offset % size, nbytes, crc))
        crcs = tuple(crc32_of(size, blob) for blob in blobs)
        layers.append(LayerEntry(p.experts.layer, count, p.layout, crcs, p.experts.module))
    return Manifest(
        model_type=bound.model_type,
        source={
            "path": asked["path"],
            "revision": checkpoint.revision,
            "asked": {"revision": asked["revision"], "recipe": asked["recipe"]},
            "files": {name: zlib.crc32(data) for name, data in sorted(side_files)},
            **({"library_version": bound.library_version} if bound.library is not None else {}),
        },
        dense_quantization={m.path: m.quantization for m in plan.modules() if m.quantization.quantized},
        layouts=tuple(plan.layouts),
        layers=tuple(layers),
        dense=tuple(DenseEntry(f.name, f.nbytes, crc32_of(f.nbytes, parts[f.name])) for f in plan.dense),
        library=bound.library,
    )
