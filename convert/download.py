"""Files of a repository on their way to the disk: several ranges at once, each written where it belongs.

A single connection rarely fills the line: the hub's servers limit the rate of each, and each request waits for its
first byte. So the missing bytes of a file are cut into ranges, and ranges are asked for side by side.
Whatever came is kept: a range whose connection broke continues where it was, and a process that was killed loses
nothing but the ranges under way (part.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_flashmoe.convert.destination import writing
from mlx_flashmoe.convert.hub import CHUNK, HubFile, Repository, Stopped, hub_errors, retried
from mlx_flashmoe.convert.part import PartFile, Span
from mlx_flashmoe.errors import SourceError

# Eight connections of 5 MB/s fill 320 Mbit/s; more would crowd out other users of the line, or be refused.
CONNECTIONS = 8
# Bytes of a range: a request's wait is short against it, and eight of them are all that a kill can lose.
RANGE = 32 << 20
# Towards a file's end ranges get shorter, down to this, so that the connections finish at about the same time.
LEAST_RANGE = 4 << 20


@dataclass
class _Range:
    """Bytes [start, stop) of a file; those before ``position`` have come."""

    start: int
    stop: int
    position: int


class Connections:
    """At most CONNECTIONS requests at once, for the downloads that began first.

    Attributes:
        changed: guards what the threads share, and is notified when any of it changes.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._downloads: list[Download] = []
        self._threads = 0
        self._closed = False

    def add(self, download: Download) -> None:
        with self.changed:
            self._downloads.append(download)
            while self._threads < CONNECTIONS:
                self._threads += 1
                # Daemons: a process that ends waits for no server.
                threading.Thread(target=self._run, name="connection", daemon=True).start()

    def remove(self, download: Download) -> None:
        with self.changed:
            self._downloads.remove(download)

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                while (work := self._next()) is None:
                    if self._closed:
                        return
                    self.changed.wait()
            download, range_ = work
            download.bring(range_)

    def _next(self) -> tuple[Download, _Range] | None:
        for download in self._downloads:
            if (range_ := download.next_range()) is not None:
                return download, range_
        return None


class Download:
    """A file on its way to ``path``, in a thread of its own, over shared connections.

    Attributes:
        received: bytes of it that are there.
        rate: bytes per second since it began.
    """

    def __init__(self, repository: Repository, file: HubFile, path: Path, connections: Connections) -> None:
        self.file = file
        self.path = path
        self.received = 0
        self._began, self._had = time.monotonic(), 0
        self._repository = repository
        self._connections = connections
        self._changed = connections.changed
        self._error: BaseException | None = None
        self._halted = threading.Event()  # its result is not wanted any more
        self._writing = threading.Lock()  # held while ``_part`` is written, and while that changes
        self._part: PartFile | None = None
        self._missing: list[Span] = []  # not asked for yet
        self._asked: list[_Range] = []  # being asked for
        self._arrived: list[Span] = []  # written, but not flushed yet
        self._answered = False  # the first answer has come, and the server heeds ranges
        connections.add(self)
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    @property
    def rate(self) -> float:
        return max(0, self.received - self._had) / max(time.monotonic() - self._began, 0.001)

    def wait(self, seconds: float) -> bool:
        """Returns whether it is complete within that time. Raises the error that stopped it."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def stop(self) -> None:
        """Gives it up; returns when nothing is written any more, whatever servers do."""
        self._halt(Stopped())
        self._thread.join()

    # The thread of its own: flushes and records what arrived, and hashes it in order.

    def _run(self) -> None:
        try:
            if not (self._attempt() or self._attempt()):
                raise SourceError(
                    f"{self._repository.name}: {self.file.name}: downloaded twice, and twice it was not the file "
                    f"that the hub has ({self.file.stamp})"
                )
        except BaseException as e:
            self._halt(e)
        finally:
            self._connections.remove(self)

    def _halt(self, error: BaseException) -> None:
        """It ends with this error, unless it had one before."""
        with self._changed:
            self._error = self._error or error
            self._halted.set()
            self._changed.notify_all()

    def _attempt(self) -> bool:
        """Brings the file in; False, and what came is removed, if it is not what the hub has."""
        with (
            writing(self.path),
            contextlib.closing(PartFile(self.path, self.file.size, self.file.stamp)) as part,
        ):
            with self._changed:
                self._missing, self._asked, self._arrived = part.missing, [], []
                self.received = self._had = self.file.size - sum(b - a for a, b in self._missing)
                self._answered, self._part = False, part
                self._changed.notify_all()
            try:
                right = self._hash(part)
            finally:
                with self._changed, self._writing:
                    self._part = None  # from here on nothing is written
                    begun = [(r.start, r.position) for r in self._asked if r.position > r.start]
                if self._arrived or begun:
                    part.keep(self._arrived + begun)
            if right:
                part.place()
            else:
                part.discard()
        return right

    def _hash(self, part: PartFile) -> bool:
        """Returns whether the file is the hub's, as soon as it is complete. Keeps what arrives meanwhile."""
        hasher, hashed = self.file.hasher(), 0
        while hashed < self.file.size:
            with self._changed:
                while not (self._arrived or self._halted.is_set() or hashed < part.whole_until):
                    self._changed.wait()
                if self._halted.is_set():
                    raise self._error or Stopped()
                arrived, self._arrived = self._arrived, []
            if arrived:
                part.keep(arrived)
                continue
            data = part.read(hashed, min(CHUNK, part.whole_until - hashed))
            hasher.update(data)
            hashed += len(data)
        return self.file.matches(hasher)

    # The threads of the connections.

    def next_range(self) -> _Range | None:
        """The next range to ask for, if any. The caller holds ``changed``."""
        if self._halted.is_set() or self._part is None or not self._missing:
            return None
        if self._asked and not self._answered:
            return None  # the first answer says whether the server heeds ranges
        left = sum(b - a for a, b in self._missing)
        start, end = self._missing[0]
        stop = min(end, start + min(RANGE, max(LEAST_RANGE, left // (2 * CONNECTIONS))))
        self._missing[:1] = [(stop, end)] if stop < end else []
        self._asked.append(_Range(start, stop, start))
        return self._asked[-1]

    def bring(self, range_: _Range) -> None:
        """Brings a range in. What goes wrong ends the download."""

        def attempt() -> None:
            with self._repository.ask(self.file.name, range_.position, range_.stop) as answer:
                self._heard(answer.ranged, range_)
                answer.into(lambda chunk: self._take(range_, chunk), lambda: range_.stop - range_.position)

        try:
            with writing(self.path), hub_errors(f"{self._repository.name}: {self.file.name}"):
                # Servers that refuse some of the connections give bytes on the others: that is no failure.
                retried(lambda: self.received, attempt, self._pause)
        except BaseException as e:
            self._halt(e)
            return
        with self._changed:
            self._asked.remove(range_)
            self._arrived.append((range_.start, range_.stop))
            self._changed.notify_all()

    def _heard(self, ranged: bool, range_: _Range) -> None:
        """The first answer: if the server sends the whole file in any case, it comes over this connection alone."""
        with self._changed:
            if self._answered:
                return
            if ranged:
                self._answered = True
            else:
                self._missing, range_.stop = [], self.file.size
            self._changed.notify_all()

    def _take(self, range_: _Range, chunk: bytes) -> None:
        with self._writing:
            if self._part is None or self._halted.is_set():
                raise Stopped
            self._part.write_at(range_.position, chunk)
            range_.position += len(chunk)
            self.received += len(chunk)

    def _pause(self, seconds: float) -> None:
        if self._halted.wait(seconds):
            raise Stopped
