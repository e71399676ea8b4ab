"""Compares reads of experts with plain reads of the same bytes, through the page cache and around it."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

import mlx.core as mx
import numpy as np

from mlx_flashmoe import system
from mlx_flashmoe.experts import ExpertStore
from mlx_flashmoe.experts.readers import READ_THREADS
from mlx_flashmoe.experts.slab import Slab, make_slab
from mlx_flashmoe.experts.store import ReadRequest
from mlx_flashmoe.layout import LayerEntry, Manifest, expert_file
from mlx_flashmoe.selftest.expert_cases import layout_of
from mlx_flashmoe.selftest.trial import Skip, Trial, Wrong
from mlx_flashmoe.selftest.workplace import Workplace
from mlx_flashmoe.sizes import show_size

LAYOUT = layout_of(4096, 1024, 4, 64)  # an expert of Qwen3.5-397B, 7 MB
EXPERTS, AT_A_TIME = 20, 10
ROUNDS = 5
WORDS = LAYOUT.blob_size // 8
SPARE = 10**9  # bytes that stay free on the disk


def read_checks(place: Workplace) -> Iterator[Trial]:
    # Around the page cache first: on macOS it gives what it has all the same.
    yield Trial("around the page cache", partial(_check, place, True))
    yield Trial("from the page cache", partial(_check, place, False))


def _check(place: Workplace, direct: bool) -> str:
    folder = place.folder / "reads"
    path = folder / expert_file(0)
    _write(path)
    try:
        fd = system.open_for_reading(path, direct)
    except OSError as e:
        raise Skip(f"not possible on this file system: {e.strerror or e}") from None
    entry = LayerEntry(0, EXPERTS, 0, (0,) * EXPERTS)
    store = ExpertStore(folder, Manifest("reads", {}, {}, (LAYOUT,), (entry,), ()), direct=direct)
    slab = make_slab(AT_A_TIME, LAYOUT.blob_size)
    try:
        for group in _groups():
            _read(store, slab, group)
            # A copy: MLX would move the slab itself to look at it, away from where a CUDA GPU is written to.
            held = slab.array | mx.array(0, mx.uint32)
            if not np.array_equal(np.array(held).view(np.uint64), _blobs(group)):
                raise Wrong("what was read is not what was written")
        ours, plain = [], []
        memory = memoryview(mmap.mmap(-1, AT_A_TIME * LAYOUT.blob_size))  # aligned, as direct reads want it
        with ThreadPoolExecutor(READ_THREADS) as pool:
            read_plainly = partial(_read_plainly, pool, fd, memory, store.spans(0, AT_A_TIME))
            for _ in range(ROUNDS):
                ours.append(_seconds(partial(_read, store, slab)))
                plain.append(_seconds(read_plainly))
    finally:
        os.close(fd)
        store.close()
    nbytes = EXPERTS * LAYOUT.blob_size
    fast, bare = nbytes / statistics.median(ours), nbytes / statistics.median(plain)
    return f"{show_size(fast)}/s; plain reads {show_size(bare)}/s: {100 * fast / bare:.0f}%"


def _groups() -> list[range]:
    return [range(i, i + AT_A_TIME) for i in range(0, EXPERTS, AT_A_TIME)]


def _blobs(experts: range) -> np.ndarray:
    """Random uint64 [experts, words], the same ones every time."""
    return np.stack([np.random.default_rng(e).integers(0, 2**64, WORDS, dtype=np.uint64) for e in experts])


def _write(path: Path) -> None:
    """The expert file, if it is not there."""
    if path.exists():
        return
    free = shutil.disk_usage(path.parents[2]).free
    if free < EXPERTS * LAYOUT.blob_size + SPARE:
        raise Skip(f"only {show_size(free)} are free there")
    path.parent.mkdir(parents=True)
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as f:
        system.keep_no_pages(f.fileno())
        for group in _groups():
            f.write(_blobs(group).tobytes())
        system.flush(f.fileno())
    os.rename(unfinished, path)


def _read(store: ExpertStore, slab: Slab, group: range) -> None:
    store.start([ReadRequest(0, expert, slot) for slot, expert in enumerate(group)], slab).wait()


def _read_plainly(
    pool: ThreadPoolExecutor, fd: int, memory: memoryview, spans: list[tuple[int, int]], group: range
) -> None:
    """The same parts by nothing but preadv, in as many threads."""

    def read(part: tuple[int, int, int]) -> None:
        slot, start, stop = part
        into, offset = slot * LAYOUT.blob_size, group[slot] * LAYOUT.blob_size
        while start < stop:
            n = os.preadv(fd, [memory[into + start : into + stop]], offset + start)
            if n <= 0:
                raise Wrong("a plain read came back short")
            start += n

    list(pool.map(read, [(slot, *span) for slot in range(len(group)) for span in spans]))


def _seconds(read: Callable[[range], None]) -> float:
    started = perf_counter()
    for group in _groups():
        read(group)
    return perf_counter() - started
