"""ExpertStore: experts on disk, read by parallel positional reads straight into the slots of a slab.

Knows files, offsets and threads; nothing of which expert is where, or of models.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_flashmoe import system
from mlx_flashmoe.checksum import crc32_of
from mlx_flashmoe.errors import FormatError, ReadError
from mlx_flashmoe.experts.readers import READ_THREADS, readers
from mlx_flashmoe.experts.slab import Slab
from mlx_flashmoe.layout import PAGE, BlobLayout, Manifest, expert_files

# A blob is read in one piece while there are blobs enough for all threads; otherwise in even parts, not
# smaller than this: a warm page cache gives one thread only a fraction of the memory's bandwidth.
LEAST_PART = 1 << 21


@dataclass(frozen=True)
class ReadRequest:
    """One expert to read: its layer, its number, and the slot it goes to."""

    layer: int
    expert: int
    slot: int


@dataclass(frozen=True)
class _LayerFile:
    """A layer's experts: the same file on one disk or on several."""

    fds: tuple[int, ...]
    paths: tuple[Path, ...]
    layout: BlobLayout
    num_experts: int
    crc32: tuple[int, ...]


def reads_directly(path: Path) -> bool:
    """Whether reads of this file can go around the page cache, and are known to be faster where they need not.

    On Linux, for a CPU: with a model several times larger than memory a token took half the time, because the kernel
    spends much on pages that soon have to go. On macOS, and into a GPU of its own memory, nobody has measured it.
    """
    if not system.LINUX or mx.default_device() != mx.cpu:
        return False
    try:
        os.close(system.open_for_reading(path, direct=True))
    except OSError:  # tmpfs and others
        return False
    return True


class PendingReads:
    """Reads under way, once ``begin`` was called. See :meth:`ExpertStore.start`.

    Parts are handed out to the threads one by one, in order, so that a slow read does not hold others back; whoever
    waits reads with them. Where a layer is on several disks, its parts are read from each in turn.

    Attributes:
        over: nothing is being read any more, nor will be.
    """

    def __init__(self, store: ExpertStore, requests: Sequence[ReadRequest], slab: Slab):
        self._store = store
        self._slab: Slab | None = slab
        spans = {
            layer: store.spans(layer, len(requests)) for layer in {request.layer for request in requests}
        }
        parts = [(i, request, span) for i, request in enumerate(requests) for span in spans[request.layer]]
        self._threads = min(READ_THREADS, len(parts))
        self._queue = enumerate(parts)
        self._left = [0] * len(requests)
        # (offset, bytes, crc32) of the parts read, where reads are checked.
        self._crcs: list[list[tuple[int, int, int]]] = [[] for _ in requests]
        for i, _, _ in parts:
            self._left[i] += 1
        self._cancelled = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._helping = 0  # threads that are reading, and whether more may begin to
        self._closed = False
        self.over = False
        self._end = threading.Lock()  # released when it is; not an Event, which an interrupt can leave locked
        self._end.acquire()

    def begin(self) -> None:
        readers().help(self._help, self._threads)

    def cancel(self) -> None:
        """Reads that have not begun will not be done."""
        self._cancelled = True

    def end(self) -> None:
        """Returns when nothing is being read any more, however it ended."""
        self.cancel()
        while not self.over:
            with contextlib.suppress(BaseException):
                self.wait()

    def wait(self) -> list[bool]:
        """Returns when nothing is being read any more: which requests were read whole. May be called again.

        Raises:
            ReadError: the first failure.
        """
        # Memory must not be written to after this returns or raises, so not even Ctrl-C cuts the waiting short.
        while not self.over:
            try:
                self._read_parts()
                with self._lock:
                    self._closed = True
                    self._if_over()
                self._end.acquire()
                self._end.release()
            except BaseException as e:
                self._fail(e)
        if self._failure is not None:
            raise self._failure
        return [left == 0 for left in self._left]

    def _if_over(self) -> None:
        """Called with the lock held."""
        if self._closed and self._helping == 0 and not self.over:
            self.over = True
            self._slab = (
                None  # a thread that was asked to help may come late, and keeps no memory alive until then
            )
            self._end.release()

    def _fail(self, error: BaseException) -> None:
        """What was interrupted is of more interest than what could not be read."""
        self.cancel()
        if self._failure is None or not isinstance(error, ReadError):
            self._failure = error

    def _help(self) -> None:
        """One of the threads reads along."""
        with self._lock:
            if self._closed:
                return
            self._helping += 1
        try:
            self._read_parts()
        except BaseException as e:
            self._fail(e)
        finally:
            with self._lock:
                self._helping -= 1
                self._if_over()

    def _read_parts(self) -> None:
        store, slab = self._store, self._slab
        if slab is None:  # over already
            return
        with store.reading():
            for turn, (i, request, (start, stop)) in self._queue:
                if self._cancelled:
                    return
                crc = store.read(request, start, stop, slab, turn)
                with self._lock:
                    if crc is not None:
                        self._crcs[i].append((start, stop - start, crc))
                    self._left[i] -= 1
                    last = self._left[i] == 0
                if last and store.check_reads:
                    store.check(request, self._crcs[i])


class ExpertStore:
    """The expert files of a converted folder, open for reading.

    Args:
        folder: a converted model.
        manifest: its manifest, already loaded.
        also: more folders, best on other disks, that hold copies of some or all expert files.
        direct: read around the operating system's page cache.
        check_reads: compare the checksum of everything read with the manifest's.

    Attributes:
        layers: the layers that have experts, ascending.
        bytes_read, reads: what has been read so far, successfully.
        busy_seconds: time during which anything was being read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        also: Sequence[str | os.PathLike[str]] = (),
        direct: bool = False,
        check_reads: bool = False,
    ):
        self.check_reads = check_reads
        self._files: dict[int, _LayerFile] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.reads = 0
        self.busy_seconds = 0.0
        self._reading = 0
        self._reading_since = 0.0
        try:
            for entry in manifest.layers:
                paths = tuple(expert_files(entry.layer, folder, also))
                fds = []
                for path in paths:
                    try:
                        fds.append(system.open_for_reading(path, direct))
                    except OSError as e:
                        for fd in fds:
                            os.close(fd)
                        how = " for direct reads" if direct else ""
                        raise FormatError(
                            f"{path} (layer {entry.layer}) cannot be opened{how}: {e.strerror}"
                        ) from None
                layout = manifest.layout_of(entry)
                self._files[entry.layer] = _LayerFile(
                    tuple(fds), paths, layout, entry.num_experts, entry.crc32
                )
        except BaseException:
            self.close()
            raise
        self.layers = sorted(self._files)

    def layout(self, layer: int) -> BlobLayout:
        return self._files[layer].layout

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest blob: a slot holds any of them."""
        return max(file.layout.blob_size for file in self._files.values())

    def paths(self, layer: int) -> tuple[Path, ...]:
        """The layer's expert file, wherever there is a copy."""
        return self._files[layer].paths

    def num_experts(self, layer: int) -> int:
        return self._files[layer].num_experts

    def start(self, requests: Sequence[ReadRequest], slab: Slab) -> PendingReads:
        """Begins reading into ``slab``. The slots of the requests are the store's until ``wait`` returns.

        Raises (from ``wait``):
            ReadError: a read failed, came back short, or (``check_reads``) brought other bytes than were written;
                names the file, the layer and the expert. The other reads are finished or given up, and the store
                can be used again.
        """
        reads = self.prepare(requests, slab)
        reads.begin()
        return reads

    def prepare(self, requests: Sequence[ReadRequest], slab: Slab) -> PendingReads:
        """The reads of ``start``, not begun: for whoever has to know of them before anything is written."""
        return PendingReads(self, requests, slab)

    def spans(self, layer: int, requests: int) -> list[tuple[int, int]]:
        """The byte ranges a blob of ``layer`` is read in when there are so many ``requests``."""
        size = self._files[layer].layout.blob_size
        parts = max(1, min(READ_THREADS // requests, size // LEAST_PART))
        pages = size // PAGE
        bounds = [pages * i // parts * PAGE for i in range(parts + 1)]
        return list(itertools.pairwise(bounds))

    def read(self, request: ReadRequest, start: int, stop: int, slab: Slab, turn: int = 0) -> int | None:
        """Reads bytes [start, stop) of a blob into its slot, in this thread. Raises ReadError.

        Args:
            turn: which copy of the file to read, counted on and on.

        Returns:
            their crc32 if reads are checked.
        """
        file = self._files[request.layer]
        copy = turn % len(file.fds)
        if not 0 <= request.expert < file.num_experts:
            raise ReadError(f"{self._name(request, copy)}: the layer has only {file.num_experts} experts")
        into = slab.begin(request.slot, start, stop)
        size = file.layout.blob_size
        offset, done = request.expert * size + start, 0
        while start + done < stop:
            try:
                n = os.preadv(file.fds[copy], [into[done:]], offset + done)
            except OSError as e:
                raise ReadError(f"{self._name(request, copy)}: reading failed: {e.strerror or e}") from e
            if n <= 0:
                raise ReadError(
                    f"{self._name(request, copy)}: the file ends after {start + done} of the blob's {size} bytes; "
                    "it was truncated or replaced: python -m mlx_flashmoe verify --model DIR says how to mend it"
                )
            done += n
        crc = zlib.crc32(into) if self.check_reads else None
        slab.finish(request.slot, start, stop)
        with self._lock:
            self.bytes_read += done
            self.reads += start == 0
        return crc

    def _name(self, request: ReadRequest, copy: int) -> str:
        return f"{self._files[request.layer].paths[copy]}: layer {request.layer}, expert {request.expert}"

    def check(self, request: ReadRequest, parts: list[tuple[int, int, int]]) -> None:
        """Raises ReadError unless a blob's parts, (offset, bytes, crc32), are what was written."""
        file = self._files[request.layer]
        if crc32_of(file.layout.blob_size, parts) != file.crc32[request.expert]:
            copies = " or ".join(map(str, file.paths))
            raise ReadError(
                f"{copies}: layer {request.layer}, expert {request.expert}: what was read is not what was written; "
                "the disk or the file is damaged: python -m mlx_flashmoe verify --model DIR says how to mend it"
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around the work of a reading thread: keeps ``busy_seconds``."""
        with self._lock:
            if self._reading == 0:
                self._reading_since = time.perf_counter()
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                if self._reading == 0:
                    self.busy_seconds += time.perf_counter() - self._reading_since

    def drop_page_cache(self) -> bool:
        """Asks the operating system to forget the files' pages, for measuring; False where it could not be told so."""
        return all([system.forget_pages(fd) for file in self._files.values() for fd in file.fds])

    def close(self) -> None:
        for file in self._files.values():
            for fd in file.fds:
                os.close(fd)
        self._files = {}

    def __del__(self) -> None:
        self.close()
