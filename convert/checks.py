"""Checks of a converted folder's large files, many at once: each reads a piece from the disk and returns its faults."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from mlx_flashmoe.convert.damage import Fault
from mlx_flashmoe.convert.reread import crc32_on_disk
from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.layout import Manifest

THREADS = max(4, min(16, os.cpu_count() or 4))

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """A piece to be checked. Without ``run``, the checks before it must be over before the next begins."""

    nbytes: int
    what: str
    run: Callable[[], list[Fault]] | None


def in_order(
    pool: ThreadPoolExecutor, tasks: Iterable[tuple[T, Callable[[], list[Fault]] | None]]
) -> Iterator[tuple[T, list[Fault]]]:
    """Each task's tag and result, in order; a few are under way at any time. A task of None waits for those before."""
    pending: deque[tuple[T, Future[list[Fault]]]] = deque()

    def results(most: int) -> Iterator[tuple[T, list[Fault]]]:
        while len(pending) > most:
            tag, future = pending.popleft()
            yield tag, future.result()

    try:
        for tag, task in tasks:
            if task is not None:
                pending.append((tag, pool.submit(task)))
            yield from results(2 * THREADS if task is not None else 0)
        yield from results(0)
    finally:
        for _, future in pending:
            future.cancel()


def checksums(
    folder: Path, manifest: Manifest, skipped: Collection[str], stack: contextlib.ExitStack
) -> Iterator[Check]:
    """Every dense file and every blob against the manifest's checksums.

    Args:
        skipped: names of files that are known to be damaged.
        stack: closes the files.
    """
    for dense in manifest.dense:
        if dense.file not in skipped:
            run = partial(compare, folder, open_file(folder / dense.file, stack), manifest, dense.file, None)
            yield Check(dense.size, "dense part", run)
    for entry in manifest.layers:
        if entry.file in skipped:
            continue
        fd, size = open_file(folder / entry.file, stack), manifest.layout_of(entry).blob_size
        for e in range(entry.num_experts):
            yield Check(size, f"layer {entry.layer}", partial(compare, folder, fd, manifest, entry.file, e))


def open_file(path: Path, stack: contextlib.ExitStack) -> int:
    """A descriptor to read from, which ``stack`` closes. Raises FormatError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise FormatError(f"{path} cannot be opened: {e.strerror}") from None
    stack.callback(os.close, fd)
    return fd


def where(folder: Path, manifest: Manifest, file: str, expert: int | None) -> str:
    """Words for a dense file, or for an expert's blob."""
    if expert is None:
        return f"{folder / file}"
    layer = next(entry.layer for entry in manifest.layers if entry.file == file)
    return f"{folder / file}: layer {layer}, expert {expert}"


def compare(folder: Path, fd: int, manifest: Manifest, file: str, expert: int | None) -> list[Fault]:
    """Faults of a dense file (``expert`` None) or an expert's blob: none if the disk gives back its checksum."""
    offset, nbytes, crc = expected(manifest, file, expert)
    at = where(folder, manifest, file, expert)
    try:
        if crc32_on_disk(fd, offset, nbytes) == crc:
            return []
        return [Fault(f"{at}: differs from what was written", file, expert)]
    except OSError as e:
        return [Fault(f"{at}: cannot be read: {e.strerror}", file, expert)]
    except EOFError as e:
        return [Fault(f"{at}: {e}", file, expert)]


def expected(manifest: Manifest, file: str, expert: int | None) -> tuple[int, int, int]:
    """Offset, bytes and crc32 of a dense file (``expert`` None) or of an expert's blob."""
    if expert is None:
        dense = next(d for d in manifest.dense if d.file == file)
        return 0, dense.size, dense.crc32
    entry = next(e for e in manifest.layers if e.file == file)
    size = manifest.layout_of(entry).blob_size
    return expert * size, size, entry.crc32[expert]
