"""The page cache: checksums of what is on the disk, not of what is remembered of it; and letting go of pages."""

from __future__ import annotations

import os
import threading
import zlib

import numpy as np

from mlx_flashmoe import system

PIECE = 8 << 20
_own = threading.local()


def crc32_on_disk(fd: int, offset: int, nbytes: int) -> int:
    """The crc32 of part of a file whose data has been flushed, read past the page cache where that can be.

    Raises:
        OSError: reading failed.
        EOFError: the file ends before.
    """
    system.forget_pages(fd, offset, nbytes)
    system.keep_no_pages(fd)
    buffer = getattr(_own, "buffer", None)
    if buffer is None:
        buffer = _own.buffer = np.empty(PIECE, np.uint8).data
    crc, end = 0, offset + nbytes
    while offset < end:
        n = os.preadv(fd, [buffer[: min(PIECE, end - offset)]], offset)
        if n == 0:
            raise EOFError(f"the file ends at byte {offset}")
        crc = zlib.crc32(buffer[:n], crc)
        offset += n
    return crc


def let_go(fd: int) -> None:
    """Has the system forget a file's pages that are on the disk too, where it can be told so.

    A conversion never comes back to them, and hundreds of GB of them would push out everybody else's. It is also
    faster: memory that has just been let go of is at hand, where other memory must be looked for.
    """
    system.forget_pages(fd)
