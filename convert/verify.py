"""Re-reading a converted folder: is everything there, and is it what was written, or what the source says?"""

from __future__ import annotations

import contextlib
import operator
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_flashmoe.convert.checks import (
    THREADS,
    Check,
    checksums,
    compare,
    in_order,
    open_file,
    where,
)
from mlx_flashmoe.convert.damage import (
    Fault,
    convert_command,
    convert_options,
    damage_of,
    evident,
    mending_command,
    recorded_files,
    save_record,
    sizes,
    small_file,
)
from mlx_flashmoe.convert.destination import JOURNAL, Destination
from mlx_flashmoe.convert.journal import Journal
from mlx_flashmoe.convert.original import Original, open_original
from mlx_flashmoe.convert.repair import mend
from mlx_flashmoe.convert.units import Job, Scratch
from mlx_flashmoe.errors import ConversionError, FormatError, SourceError
from mlx_flashmoe.layout import MANIFEST, STATE, BlobLayout, Manifest, expert_file
from mlx_flashmoe.sizes import counted

Progress = Callable[[int, int, str], None]


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    repair: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> int:
    """Reads a converted folder again, from the disk rather than from the page cache, and compares.

    Damage is also recorded in the folder: ``convert`` with the same arguments as before mends it.

    Args:
        path: what ``convert`` made.
        against: the checkpoint it was made from, a folder or an id: then every byte is compared with what a
            conversion would write now; without, checksums are compared with the manifest's. Of the small files a
            folder converted before the manifest had their checksums is only asked that they can be read.
        repair: compare checksums, and make what is damaged again from ``against``, by default the source that the
            manifest names. Nothing else is read of it.
        progress: called with (bytes done, bytes in all, what is being done), often.
        note: called with a line for each piece that is not as it should be.

    Returns:
        bytes compared, small files apart.

    Raises:
        FormatError: not a complete converted folder (says what is missing), or something in it is wrong.
        SourceError, ConversionError: ``against`` cannot be read, or does not fit; the folder cannot be written.
    """
    folder = Path(path)
    note = note or (lambda line: None)
    report = progress or (lambda done, total, what: None)
    _check_complete(folder)
    manifest = Manifest.read(folder)
    faults: list[Fault] = []

    def found(fault: Fault) -> None:
        faults.append(fault)
        note(fault.text)

    for fault in evident(folder, manifest):
        found(fault)
    skipped = {fault.file for fault in faults}
    done = 0
    total = sum(size for name, size in sizes(manifest).items() if name not in skipped)
    with contextlib.ExitStack() as stack:
        checks = (
            checksums(folder, manifest, skipped, stack)
            if against is None or repair
            else _comparisons(folder, manifest, against, skipped, stack)
        )
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="verify"))
        for check, wrong in in_order(pool, ((check, check.run) for check in checks)):
            done += check.nbytes
            for fault in wrong:
                found(fault)
            report(min(done, total), total, check.what)
    damaged = [fault for fault in faults if fault.file in skipped or _is_damage(folder, manifest, fault)]
    try:
        save_record(folder, damage_of(damaged))
    except ConversionError as e:
        # A folder that cannot be written can still be read.
        note(f"what is damaged is not recorded for convert: {e}")
    if damaged and repair:
        source = against or manifest.source.get("path")
        if not source:
            raise FormatError(f"{folder / MANIFEST} does not name the source; name it after --against")
        with Destination(folder) as out:
            mend(out, manifest, source, report, note)
            out.clean()
    elif damaged:
        raise FormatError(
            f"{folder}: damaged in {counted(len(damaged), 'place')}; to mend it: "
            f"{mending_command(folder, manifest, against)}"
        )
    elif faults:
        raise FormatError(
            f"{folder} is as it was written, but {against} gives other bytes in {counted(len(faults), 'place')}: it is "
            "not what this was made from, or another version of MLX quantizes otherwise"
        )
    return done


def _is_damage(folder: Path, manifest: Manifest, fault: Fault) -> bool:
    """Tells if the folder is at fault, by its own checksums, rather than the source that it was compared with."""
    recorded = recorded_files(folder, manifest)
    if recorded is not None and fault.file in recorded:
        return False  # these were compared before
    experts = any(entry.file == fault.file for entry in manifest.layers)
    if not experts and not any(dense.file == fault.file for dense in manifest.dense):
        return True
    with contextlib.ExitStack() as stack:
        fd = open_file(folder / fault.file, stack)
        return bool(compare(folder, fd, manifest, fault.file, fault.expert))


def _check_complete(folder: Path) -> None:
    """Raises FormatError for a folder whose conversion has not come to its end."""
    if (folder / MANIFEST).exists() or not (folder / STATE / JOURNAL).exists():
        return
    journal = Journal(folder / STATE / JOURNAL)
    journal.close()
    begun = journal.beginning
    units = begun.units if begun is not None else {}
    done = Counter(name.rpartition("#")[0] for name in journal.done)
    lacking = [
        f"{file} ({done[file]} of {counted(n, 'part')} done)"
        for file, n in sorted(units.items())
        if done[file] < n
    ]
    missing = ", ".join(lacking[:5]) + (
        f" and {counted(len(lacking) - 5, 'more file')}" if lacking[5:] else ""
    )
    source, options = "SRC", ""
    if begun is not None:
        source = begun.asked["path"]
        given = convert_options(begun.asked["recipe"])
        options = " --recipe FILE, and other options as they were" if given is None else given
    raise FormatError(
        f"{folder}: the conversion is not complete: {sum(done.values())} of {counted(sum(units.values()), 'part')} "
        f"done; {f'still to do: {missing}; ' if missing else ''}to resume it: "
        f"{convert_command(source, folder, options)}"
    )


def _comparisons(
    folder: Path,
    manifest: Manifest,
    against: str | os.PathLike[str],
    skipped: Collection[str],
    stack: contextlib.ExitStack,
) -> Iterator[Check]:
    """Compares what the converter would write now with what is there."""
    downloads = folder
    if not Path(against).is_dir():
        downloads = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".verify-", dir=folder)))
    original = stack.enter_context(open_original(folder, manifest, against, downloads, in_ranges=False))
    checkpoint = original.checkpoint
    for published in checkpoint.side_files:
        if published.name in skipped:
            continue
        try:
            same = partial(operator.eq, published.read_bytes())
        except OSError as e:
            raise SourceError(f"{published} cannot be read: {e.strerror}") from None
        yield Check(
            0, "small files", partial(small_file, folder, published.name, same, "differs from the source")
        )
    yield from _large_files(folder, manifest, original, skipped, stack)


def _large_files(
    folder: Path,
    manifest: Manifest,
    original: Original,
    skipped: Collection[str],
    stack: contextlib.ExitStack,
) -> Iterator[Check]:
    checkpoint, plan = original.checkpoint, original.plan
    layouts = {expert_file(p.experts.layer): plan.layouts[p.layout] for p in plan.layers}
    scratch = Scratch(mx.default_device())
    units = [unit for unit in original.units if unit.file not in skipped]
    last = {shard: unit for unit in units for shard in unit.shards}
    for unit in units:
        for shard in unit.shards:
            checkpoint.storage.fetch(shard, lambda what: None)
        fd = open_file(folder / unit.file, stack)
        for job in unit.jobs:
            compared = partial(
                _remake, fd, job, scratch, layouts.get(unit.file), unit.file, partial(where, folder, manifest)
            )
            yield Check(sum(n for _, n in job.spans), unit.what, compared)
        for shard in unit.shards:
            if last[shard] is unit and checkpoint.storage.temporary:
                yield Check(0, unit.what, None)
                checkpoint.shards[shard].close()
                checkpoint.storage.drop(shard)


def _remake(
    fd: int,
    job: Job,
    scratch: Scratch,
    layout: BlobLayout | None,
    file: str,
    named: Callable[[str, int | None], str],
) -> list[Fault]:
    faults: dict[int | None, Fault] = {}
    for (offset, nbytes), data in zip(job.spans, job.make(scratch)):
        if os.pread(fd, nbytes, offset) != data:
            expert = None if layout is None else offset // layout.blob_size
            at = f", at byte {offset}" if expert is None else ""
            fault = Fault(f"{named(file, expert)}{at}: differs from the source", file, expert)
            faults.setdefault(expert, fault)
    return list(faults.values())
