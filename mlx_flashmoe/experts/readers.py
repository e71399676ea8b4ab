"""The threads that read experts, one pool for the process. They move bytes only and never touch a lazy array."""

from __future__ import annotations

import os
import threading

from mlx_flashmoe.threads import Threads

# Enough to keep an NVMe queue busy with reads of several MB; more threads only contend, for memory bandwidth and
# for Python's lock: of 4, 6, 8, 10 and 16, 8 read fastest on 16 cores, three experts or seven at a time.
READ_THREADS = max(4, min(8, os.cpu_count() or 4))

_readers: Threads | None = None
_readers_lock = threading.Lock()


def readers() -> Threads:
    """The process's.

    Not a pool of futures, which takes longer to hand out three reads, and to learn that they are over, than they take.
    """
    global _readers
    with _readers_lock:
        if _readers is None:
            _readers = Threads(READ_THREADS, "expert-read")
        return _readers


def _forget_readers() -> None:
    global _readers
    _readers = None


# A forked child has none of the threads.
os.register_at_fork(after_in_child=_forget_readers)
