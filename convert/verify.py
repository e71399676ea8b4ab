"""Re-reading a converted folder: is everything there, and is it what was written, or what the source says?"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import os
import shlex
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flashmoe.convert.destination import JOURNAL
from mlx_flashmoe.convert.families import bind
from mlx_flashmoe.convert.journal import Journal
from mlx_flashmoe.convert.plan import make_plan
from mlx_flashmoe.convert.recipe import Recipe
from mlx_flashmoe.convert.reread import crc32_on_disk
from mlx_flashmoe.convert.source import is_side_file, open_checkpoint
from mlx_flashmoe.convert.units import Job, Scratch, cut
from mlx_flashmoe.errors import ConversionError, FormatError, SourceError
from mlx_flashmoe.layout import MANIFEST, STATE, BlobLayout, Manifest, expert_file
from mlx_flashmoe.tokenizer import Tokenizer

THREADS = max(4, min(16, os.cpu_count() or 4))

Progress = Callable[[int, int, str], None]
# Says what is wrong, if anything. None in a check's place: those before it must be over before the next begins.
Check = Callable[[], str | None]


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> int:
    """Reads a converted folder again, from the disk rather than from the page cache, and compares.

    Args:
        path: what ``convert`` made.
        against: the checkpoint it was made from, a folder or an id: then every byte is compared with what a
            conversion would write now; without, checksums are compared with the manifest's. Of the small files a
            folder converted before the manifest had their checksums is only asked that they can be read.
        progress: called with (bytes done, bytes in all, what is being done), often.
        note: called with a line for each piece that is not as it should be.

    Returns:
        bytes compared, small files apart.

    Raises:
        FormatError: not a complete converted folder (says what is missing), or something in it is wrong.
        SourceError, ConversionError: ``against`` cannot be read, or does not fit.
    """
    folder = Path(path)
    note = note or (lambda line: None)
    _check_complete(folder)
    manifest = Manifest.load(folder)
    report = progress or (lambda done, total, what: None)
    wrong = 0
    for missing_or_changed in _small_files(folder, manifest) if against is None else ():
        wrong += 1
        note(missing_or_changed)
    done = 0
    total = manifest.expert_bytes + manifest.dense_bytes
    with contextlib.ExitStack() as stack:
        checks = (
            _checksums(folder, manifest, stack)
            if against is None
            else _comparisons(folder, manifest, against, stack)
        )
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="verify"))
        for nbytes, what, fault in _in_order(pool, checks):
            done += nbytes
            if fault is not None:
                wrong += 1
                note(fault)
            report(min(done, total), total, what)
    if wrong:
        raise FormatError(f"{folder}: damaged in {wrong} place{'s' if wrong > 1 else ''}; convert it again")
    return done


def _check_complete(folder: Path) -> None:
    """Raises FormatError for a folder whose conversion has not come to its end."""
    if (folder / MANIFEST).exists() or not (folder / STATE / JOURNAL).exists():
        return
    journal = Journal(folder / STATE / JOURNAL)
    journal.close()
    begun = journal.beginning
    units = begun.units if begun is not None else {}
    done = Counter(name.rpartition("#")[0] for name in journal.done)
    lacking = [f"{file} ({done[file]} of {n} parts)" for file, n in sorted(units.items()) if done[file] < n]
    missing = f"missing are {', '.join(lacking[:5])}{', …' if len(lacking) > 5 else ''}; " if lacking else ""
    source = begun.asked["path"] if begun is not None else "SRC"
    options = _options(begun.asked["recipe"]) if begun is not None else ""
    raise FormatError(
        f"{folder}: the conversion is not complete: {sum(done.values())} of {sum(units.values())} parts are done; "
        f"{missing}go on with: python -m mlx_flashmoe convert --hf-path {shlex.quote(source)} --mlx-path "
        f"{shlex.quote(str(folder))}{options}"
    )


def _options(recipe: dict[str, Any]) -> str:
    """Of convert, to ask for this recipe again. Which file named layers is not known."""
    flags = {
        "bits": "--q-bits",
        "group_size": "--q-group-size",
        "gate_up": "--q-bits-gate-up",
        "down": "--q-bits-down",
    }
    if "layers" in recipe:
        return " --recipe FILE, and other options as they were"
    return "".join(f" {flag} {recipe[name]}" for name, flag in flags.items() if name in recipe)


def _small_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files that are kept as published: config.json, the tokenizer's, and so on."""
    recorded = manifest.source.get("files")
    if recorded is None:
        # The folder was converted before checksums of them were kept: they can be read, or they cannot.
        faults = [_small_file(folder / "config.json", _is_object, "is not a JSON object")]
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            try:
                Tokenizer.load(folder)
            except FormatError as e:
                faults.append(str(e))
    elif isinstance(recorded, dict) and all(map(is_side_file, recorded)):
        faults = [
            _small_file(folder / name, partial(_has_crc32, crc), "differs from what was written")
            for name, crc in recorded.items()
        ]
    else:
        raise FormatError(f"{folder / MANIFEST}: malformed manifest (source: files)")
    yield from filter(None, faults)


def _small_file(path: Path, is_right: Callable[[bytes], bool], otherwise: str) -> str | None:
    try:
        return None if is_right(path.read_bytes()) else f"{path}: {otherwise}"
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as e:
        return f"{path}: cannot be read: {e.strerror}"


def _has_crc32(crc: int, data: bytes) -> bool:
    return zlib.crc32(data) == crc


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _in_order(
    pool: ThreadPoolExecutor, checks: Iterator[tuple[int, str, Check | None]]
) -> Iterator[tuple[int, str, str | None]]:
    """(bytes, what, fault) of each check, in order; a few are under way at any time."""
    pending: deque[tuple[int, str, Future[str | None]]] = deque()
    for nbytes, what, check in itertools.chain(checks, [(0, "", None)]):
        if check is not None:
            pending.append((nbytes, what, pool.submit(check)))
        while len(pending) > (2 * THREADS if check is not None else 0):
            nbytes, what, future = pending.popleft()
            yield nbytes, what, future.result()


def _checksums(
    folder: Path, manifest: Manifest, stack: contextlib.ExitStack
) -> Iterator[tuple[int, str, Check | None]]:
    for dense in manifest.dense:
        fd = _open(folder / dense.file, stack)
        yield (
            dense.size,
            "dense part",
            partial(_compare, fd, 0, dense.size, dense.crc32, f"{folder / dense.file}"),
        )
    for entry in manifest.layers:
        fd, size = _open(folder / entry.file, stack), manifest.layout_of(entry).blob_size
        for e, crc in enumerate(entry.crc32):
            what = f"{folder / entry.file}: layer {entry.layer}, expert {e}"
            yield size, f"layer {entry.layer}", partial(_compare, fd, e * size, size, crc, what)


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise FormatError(f"{path} cannot be opened: {e.strerror}") from None
    stack.callback(os.close, fd)
    return fd


def _compare(fd: int, offset: int, nbytes: int, crc: int, what: str) -> str | None:
    try:
        return None if crc32_on_disk(fd, offset, nbytes) == crc else f"{what}: differs from what was written"
    except OSError as e:
        return f"{what}: cannot be read: {e.strerror}"
    except EOFError as e:
        return f"{what}: {e}"


def _comparisons(
    folder: Path, manifest: Manifest, against: str | os.PathLike[str], stack: contextlib.ExitStack
) -> Iterator[tuple[int, str, Check | None]]:
    """What the converter would write now, against what is there."""
    asked = manifest.source.get("asked", {})
    recipe = Recipe.from_json(asked.get("recipe", {}), str(folder / MANIFEST))
    revision = downloads = None
    if not Path(against).is_dir():
        revision = manifest.source["revision"]
        downloads = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".verify-", dir=folder)))
    checkpoint = stack.enter_context(open_checkpoint(against, revision, downloads=downloads))
    bound = bind(checkpoint)
    try:
        plan = make_plan(bound, recipe)
    except ConversionError:
        # Its advice is about options of convert, which were others if this was the source.
        raise FormatError(
            f"{folder} is not a conversion of {against}: the bits and group sizes that were asked for do not fit it"
        ) from None
    layouts = {entry.layer: manifest.layout_of(entry) for entry in manifest.layers}
    planned = {p.experts.layer: plan.layouts[p.layout] for p in plan.layers}
    sizes = {f.name: f.nbytes for f in plan.dense}
    if layouts != planned or sizes != {d.file: d.size for d in manifest.dense}:
        raise FormatError(f"{folder} is not a conversion of {against}: shapes or quantization differ")
    for published in checkpoint.side_files:
        try:
            same = partial(operator.eq, published.read_bytes())
        except OSError as e:
            raise SourceError(f"{published} cannot be read: {e.strerror}") from None
        yield 0, "small files", partial(_small_file, folder / published.name, same, "differs from the source")
    scratch = Scratch(mx.default_device())
    units = cut(plan, list(checkpoint.shards))
    last = {shard: unit for unit in units for shard in unit.shards}
    for unit in units:
        for shard in unit.shards:
            checkpoint.storage.fetch(shard, lambda what: None)
        fd = _open(folder / unit.file, stack)
        layer = next((n for n in planned if unit.file == expert_file(n)), None)
        layout = planned[layer] if layer is not None else None
        for job in unit.jobs:
            what = f"{folder / unit.file}" if layer is None else f"{folder / unit.file}: layer {layer}"
            nbytes = sum(n for _, n in job.spans)
            yield nbytes, unit.what, partial(_remake, fd, job, scratch, layout, what)
        for shard in unit.shards:
            if last[shard] is unit and checkpoint.storage.temporary:
                yield 0, unit.what, None
                checkpoint.shards[shard].close()
                checkpoint.storage.drop(shard)


def _remake(fd: int, job: Job, scratch: Scratch, layout: BlobLayout | None, what: str) -> str | None:
    for (offset, nbytes), data in zip(job.spans, job.make(scratch)):
        if os.pread(fd, nbytes, offset) != data:
            where = f", expert {offset // layout.blob_size}" if layout is not None else f", at byte {offset}"
            return f"{what}{where}: differs from the source"
    return None
