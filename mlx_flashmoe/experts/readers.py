"""The threads that read experts, one pool for the process."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable

# Enough to keep an NVMe queue busy with reads of several MB; more threads only contend, for memory bandwidth and
# for Python's lock: of 4, 6, 8, 10 and 16, 8 read fastest on 16 cores, three experts or seven at a time.
READ_THREADS = max(4, min(8, os.cpu_count() or 4))


class Readers:
    """The process's reading threads. They move bytes only and never touch a lazy array.

    A pool of futures takes longer to hand out three reads, and to learn that they are over, than they take.
    """

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"expert-read-{i}", daemon=True)
            for i in range(READ_THREADS)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._stop)

    def help(self, work: Callable[[], None], threads: int) -> None:
        """Each of so many threads calls ``work``, which must not raise, when it has time."""
        for _ in range(threads):
            self._wanted.put(work)

    def _work(self) -> None:
        while (work := self._wanted.get()) is not None:
            work()
            del work  # while waiting for more, keep no memory that was read into

    def _stop(self) -> None:
        """A read must not outlast the memory that it goes to."""
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join()


_readers: Readers | None = None
_readers_lock = threading.Lock()


def readers() -> Readers:
    """The process's."""
    global _readers
    with _readers_lock:
        if _readers is None:
            _readers = Readers()
        return _readers


def _forget_readers() -> None:
    global _readers
    _readers = None


if hasattr(os, "register_at_fork"):  # a forked child has none of the threads
    os.register_at_fork(after_in_child=_forget_readers)
