"""A file that comes in pieces, in any order, and the record of those that are on the disk for good.

The record stands next to the file: a line that says which file it is, then a line per piece. A piece's line is
written after the piece has been flushed, so that what the record says is true even if power fails.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlx_flashmoe import system
from mlx_flashmoe.convert.destination import sync_folder, writing
from mlx_flashmoe.convert.journal import read_record, record_line

RECORD = ".ranges"

Span = tuple[int, int]  # first byte, and the one after the last


class PartFile:
    """``path`` in the making, as ``path``.part; what an earlier process brought is there.

    Without its record, or with that of another file, it begins empty.

    Args:
        size: of the complete file, in bytes.
        stamp: differs from that of any other file.

    Raises:
        ConversionError: it cannot be written; so does every method.
    """

    def __init__(self, path: Path, size: int, stamp: str) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._record = path.with_name(path.name + RECORD)
        self._size = size
        self._there: list[Span] = []  # in order, apart from each other
        self._fd = self._log = -1
        first = record_line({"stamp": stamp, "size": size})
        with writing(self._part):
            known = self._part.is_file() and self._part.stat().st_size == size
            lines = (
                self._record.read_bytes().splitlines(keepends=True) if known and self._record.exists() else []
            )
            known = lines[:1] == [first]
            if not known:
                self._part.unlink(missing_ok=True)
                self._record.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self._part, flags, 0o666)
            self._log = os.open(self._record, flags, 0o666)
            if known:
                self._end = self._read(lines)
            else:
                os.ftruncate(self._fd, size)
                self._end = 0
                self._append(first)
                sync_folder(path.parent)

    @property
    def missing(self) -> list[Span]:
        """The missing ranges, in order."""
        ends = [0, *(stop for _, stop in self._there)]
        starts = [*(start for start, _ in self._there), self._size]
        return [(a, b) for a, b in zip(ends, starts) if a < b]

    @property
    def whole_until(self) -> int:
        """Every byte before this one is there."""
        return self._there[0][1] if self._there and self._there[0][0] == 0 else 0

    def write_at(self, offset: int, data: bytes) -> None:
        """Raises OSError as it comes: an error of the disk, among those of the network."""
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, offset)
            view, offset = view[n:], offset + n

    def keep(self, spans: list[Span]) -> None:
        """Flushes what was written there, and records it."""
        with writing(self._part):
            system.flush(self._fd)
            self._append(b"".join(record_line({"there": span}) for span in spans))
        for span in spans:
            self._add(span)

    def read(self, offset: int, nbytes: int) -> bytes:
        with writing(self._part):
            return os.pread(self._fd, nbytes, offset)

    def place(self) -> None:
        """Gives the file, which is complete and as it should be, its name."""
        with writing(self._path):
            self._part.rename(self._path)
            sync_folder(self._path.parent)
            self._record.unlink()

    def discard(self) -> None:
        """Removes it."""
        with writing(self._part):
            self._part.unlink()
            self._record.unlink()

    def close(self) -> None:
        for fd in (self._fd, self._log):
            if fd >= 0:
                os.close(fd)
        self._fd = self._log = -1

    def _read(self, lines: list[bytes]) -> int:
        """Takes in the record's pieces, up to a line that was cut short; returns where that begins."""
        end = len(lines[0])
        for line in lines[1:]:
            record = read_record(line)
            if record is None:
                break
            start, stop = record["there"]
            self._add((start, stop))
            end += len(line)
        return end

    def _append(self, data: bytes) -> None:
        # Cut off the rest of a torn line, so that it does not follow this one.
        os.ftruncate(self._log, self._end)
        self._end += os.pwrite(self._log, data, self._end)
        system.flush(self._log)

    def _add(self, span: Span) -> None:
        joined: list[Span] = []
        for start, stop in sorted([*self._there, span]):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        self._there = joined


def remove_record(path: Path) -> None:
    """Removes what a process that was killed may have left next to the complete file ``path``."""
    path.with_name(path.name + RECORD).unlink(missing_ok=True)
