"""The user's cache folder, and small files in it that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path


def folder(part: str) -> Path:
    """The folder of one kind of kept things: "models", "prefixes", "kernels". It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-flashmoe" / part


def read(part: str, name: str) -> bytes | None:
    """The content that ``write`` kept under this name; None if there is none, or if the file is damaged."""
    try:
        data = (folder(part) / name).read_bytes()
    except OSError:
        return None
    crc, content = data[:4], data[4:]
    return content if len(crc) == 4 and int.from_bytes(crc, "little") == zlib.crc32(content) else None


def write(part: str, name: str, content: bytes) -> None:
    """Keeps the content, with its checksum. A folder that cannot be written to is no error: nothing is kept then."""
    where = folder(part)
    with suppress(OSError):
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=where)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(zlib.crc32(content).to_bytes(4, "little") + content)
            os.replace(temporary, where / name)
        except OSError:
            os.unlink(temporary)
            raise
