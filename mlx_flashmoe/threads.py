"""Threads that share work, in a way that an interrupt cannot leave locked.

Python's own pools, events and conditions are written in Python: Ctrl-C in the middle of them can leave their locks
locked for good. Here is only what C does in one go: a SimpleQueue, a lock, an iterator's next().
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
from collections.abc import Callable


class Threads:
    """``count`` threads that wait for work. They end with the process, not before what they are doing.

    Args:
        begin: each calls it first.
    """

    def __init__(self, count: int, name: str, begin: Callable[[], None] | None = None):
        self._wanted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._begin = begin
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._stop)

    def help(self, work: Callable[[], None], threads: int) -> None:
        """Each of so many threads calls ``work``, which must not raise, when it has time."""
        for _ in range(threads):
            self._wanted.put(work)

    def _work(self) -> None:
        if self._begin is not None:
            self._begin()
        while (work := self._wanted.get()) is not None:
            work()
            del work  # while waiting for more, keep nothing of it alive

    def _stop(self) -> None:
        """Work must not outlast the memory that it goes to."""
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join()


class Shared:
    """Pieces of work for several threads. What they work on must be kept alive by ``work`` itself.

    Args:
        work: called with each piece's two numbers, by whichever thread is free.
        helpers: how many threads will call ``drain``.
    """

    def __init__(self, work: Callable[[int, int], None], pieces: list[tuple[int, int]], helpers: int):
        self._work = work
        self._pieces = iter(pieces)
        self._done = itertools.count(1)
        self._helpers = helpers
        self._failure: BaseException | None = None
        self._over = threading.Lock()
        self._over.acquire()

    def drain(self) -> None:
        try:
            for piece in self._pieces:  # next() of a list's iterator is atomic, and so is a count's
                self._work(*piece)
        except BaseException as e:
            self._failure = e
        finally:
            if next(self._done) == self._helpers:
                self._over.release()

    def wait(self) -> None:
        """Returns when all is done; an interrupt leaves at once, and what has not begun never does.

        Raises:
            whatever ``work`` raised.
        """
        try:
            self._over.acquire()
        except BaseException:
            for _ in self._pieces:
                pass
            raise
        if self._failure is not None:
            raise self._failure
