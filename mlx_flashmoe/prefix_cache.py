"""PrefixCache: what prompts leave behind in the model, kept so that the next prompt goes on where this one ended.

The second turn of a conversation begins with all of the first one. A recurrent state cannot be taken back to an
earlier token, so a prompt can only go on from a place where its state was kept: ends of messages, see ``cuts``.

Kept states are copies in memory and safetensors files on disk, found by the exact tokens they came from and the
model's identity. A restored state is bit for bit the one that was kept, so what follows is what follows when the
same tokens go through the model cut at the same places. Where cuts themselves change no bit (seen on Linux
CPUs), that is also what a prompt in one piece gives; on a GPU they change rounding as ``--prefill-step-size``
does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_flashmoe import user_cache
from mlx_flashmoe.models.cache import Cache

MEMORY_BYTES = 10**9
DISK_BYTES = 10 * 10**9

# A first message shorter than this gets no state of its own: reading a prompt in two pieces reads experts twice.
LONG_MESSAGE = 256

Snapshot = dict[str, mx.array]
"""The arrays of all layers, named "LAYER.ATTRIBUTE"."""

_FORMAT = "mlx-flashmoe prefix 1"
_NAME = re.compile(r"([0-9a-f]{16})-(\d+)-([0-9a-f]{32})-([0-9a-f]{8})\.safetensors")
_HEADER_BYTES = 256  # of a tensor in a safetensors header, at most


def default_directory() -> Path:
    """Where prefixes are kept on disk unless told otherwise."""
    return user_cache.folder("prefixes")


@dataclass(frozen=True)
class _File:
    """A kept state on disk. Its name says whose it is, of which tokens, and the checksum of its bytes."""

    path: Path
    model: str
    tokens: int
    digest: str
    crc32: int
    size: int
    used: int

    def holds(self, identity: str, key: bytes) -> bool:
        """Whether it should be the state of a model after these tokens, by its name."""
        return (self.model, self.tokens, self.digest) == _name(identity, key)


class PrefixCache:
    """Kept states of one model, for one generation at a time.

    Args:
        identity: of the model, hexadecimal (``StreamingModel.identity``).
        message_start: the token that begins a message (``Tokenizer.message_start_id``); if None, prompts are kept
            whole.
        memory_bytes, disk_bytes: states kept at most, the least recently used ones leave first; 0 keeps none. The
            disk's share is for everything in the directory, states of other models included.
        directory: for the files, made when needed; if None, none are written. They hold the tokens of prompts.
        note: is told if the disk cannot be used. Generating goes on without it.

    Attributes:
        restored: tokens of the last prompt that were found.
    """

    def __init__(
        self,
        identity: str,
        message_start: int | None = None,
        *,
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
        directory: str | os.PathLike[str] | None = None,
        note: Callable[[str], None] | None = None,
    ):
        self.restored = 0
        self._identity = identity
        self._message_start = message_start
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._directory = Path(directory) if directory is not None and disk_bytes > 0 else None
        self._note = note
        self._memory: OrderedDict[bytes, Snapshot] = OrderedDict()
        for part in self._directory.glob("part-*.safetensors") if self._directory is not None else ():
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > 3600:  # its writer was killed
                    part.unlink()

    def cuts(self, tokens: Sequence[int], done: int) -> list[int]:
        """Where to stop and ``keep`` while a prompt is read, beyond the ``done`` tokens that were restored.

        The end of the last message before the model's own: the next turn begins with it, whatever of the answer
        its template drops. And the end of the first message, if that is long: other conversations begin with the
        same instructions. A prompt without messages is kept whole, but for the token whose logits are wanted.
        """
        last = len(tokens) - 1
        ends = [i for i in range(1, len(tokens)) if tokens[i] == self._message_start]
        if not ends:
            return [last] if last > done else []
        first = [ends[0]] if ends[0] >= LONG_MESSAGE else []
        return [end for end in sorted({*first, ends[-1]}) if end > done]

    def restore(self, tokens: Sequence[int], cache: list[Cache]) -> int:
        """Fills an empty cache with the longest kept prefix of a prompt, shorter than the prompt itself.

        Returns:
            the number of tokens the cache now holds: 0 if nothing was found.
        """
        wanted = _key(tokens[:-1])
        in_memory = max((k for k in self._memory if wanted.startswith(k)), key=len, default=b"")
        for file in sorted(self._files(), key=lambda f: f.tokens, reverse=True):
            key = wanted[: 4 * file.tokens]
            if len(key) < len(in_memory):
                break
            if not file.holds(self._identity, key):
                continue
            if key == in_memory:
                _touch(file.path)
            elif (snapshot := self._read(file, key)) is not None:
                return self._fill(cache, key, snapshot)
        if not in_memory:
            self.restored = 0
            return 0
        self._memory.move_to_end(in_memory)
        return self._fill(cache, in_memory, self._memory[in_memory])

    def keep(self, tokens: Sequence[int], cache: list[Cache], on_disk: bool = True) -> None:
        """Keeps a copy of a cache that has seen exactly these tokens.

        Args:
            on_disk: in the directory too, if there is one.
        """
        if not tokens:
            return
        key = _key(tokens)
        self._use_beginnings(key)
        try:
            snapshot = {
                f"{i}.{name}": a for i, layer in enumerate(cache) for name, a in layer.snapshot().items()
            }
        except TypeError as e:  # a library's model may have caches that cannot be kept
            self._turn_off(str(e))
            return
        if key in self._memory:
            self._memory.move_to_end(key)
        else:
            self._remember(key, snapshot)
        if on_disk and self._directory is not None:
            self._write(key, snapshot)

    def _turn_off(self, why: str) -> None:
        """Nothing is kept from now on; says so once."""
        if self._note is not None and self._memory_bytes + self._disk_bytes > 0:
            self._note(f"prompts are not kept for later: {why}")
        self._memory_bytes = self._disk_bytes = 0
        self._directory = None

    def _use_beginnings(self, key: bytes) -> None:
        """Marks all kept beginnings of a prompt as used now, the shortest last.

        So the states that a long run of tool calls leaves behind are evicted before those at its beginning, which
        the next question needs: templates drop the thinking in between, and with it what came after.
        """
        for held in sorted((k for k in self._memory if key.startswith(k)), key=len, reverse=True):
            self._memory.move_to_end(held)
        for file in sorted(self._files(), key=lambda f: f.tokens, reverse=True):
            beginning = key[: 4 * file.tokens]
            if len(beginning) == 4 * file.tokens and file.holds(self._identity, beginning):
                _touch(file.path)

    def _fill(self, cache: list[Cache], key: bytes, snapshot: Snapshot) -> int:
        self.restored = _count(key)
        for i, layer in enumerate(cache):
            mine = f"{i}."
            arrays = {name.removeprefix(mine): a for name, a in snapshot.items() if name.startswith(mine)}
            layer.restore(arrays, self.restored)
        return self.restored

    # In memory

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory."""
        return sum(map(_nbytes, self._memory.values()))

    def _remember(self, key: bytes, snapshot: Snapshot) -> None:
        """Makes room first, so that the bound holds at any time."""
        size = _nbytes(snapshot)
        if size > self._memory_bytes:
            return
        while self.nbytes + size > self._memory_bytes:
            self._memory.popitem(last=False)
        mx.eval(list(snapshot.values()))
        self._memory[key] = snapshot

    # On disk

    def _files(self) -> list[_File]:
        """The states in the directory, of every model; other processes may add and remove some at any time."""
        files = []
        for path in self._directory.glob("*.safetensors") if self._directory is not None else ():
            if (match := _NAME.fullmatch(path.name)) is not None:
                try:
                    stat = path.stat()
                except OSError:
                    continue
                model, tokens, digest, crc32 = match.groups()
                used = stat.st_mtime_ns
                files.append(_File(path, model, int(tokens), digest, int(crc32, 16), stat.st_size, used))
        return files

    def _read(self, file: _File, key: bytes) -> Snapshot | None:
        """A state, if the file holds what its name says; if not, the file is removed."""
        try:
            # Only bytes that are known to be whole are given to a parser.
            if _crc32(file.path) == file.crc32:
                loaded = mx.load(str(file.path), return_metadata=True)
                snapshot, metadata = cast(tuple[Snapshot, dict[str, str]], loaded)
                tokens = np.asarray(snapshot.pop("tokens")).tobytes()
                if (metadata["format"], metadata["model"], tokens) == (_FORMAT, self._identity, key):
                    self._remember(key, snapshot)
                    mx.eval(list(snapshot.values()))
                    _touch(file.path)
                    return snapshot
        except (OSError, RuntimeError, ValueError, KeyError):
            pass
        with suppress(OSError):
            file.path.unlink()
        return None

    def _write(self, key: bytes, snapshot: Snapshot) -> None:
        """Writes a file that is either whole or not there under its name."""
        assert self._directory is not None
        size = _nbytes(snapshot) + len(key) + _HEADER_BYTES * (len(snapshot) + 2)
        part = self._directory / f"part-{os.getpid()}.safetensors"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = sorted(self._files(), key=lambda f: f.used)
            for file in files:
                if file.holds(self._identity, key):
                    _touch(file.path)
                    return
            if size > self._disk_bytes:
                return
            total = sum(f.size for f in files)
            for file in files:
                if total + size <= self._disk_bytes:
                    break
                file.path.unlink(missing_ok=True)
                total -= file.size
            arrays = {**snapshot, "tokens": mx.array(np.frombuffer(key, np.int32))}
            mx.save_safetensors(str(part), arrays, {"format": _FORMAT, "model": self._identity})
            model, tokens, digest = _name(self._identity, key)
            name = f"{model}-{tokens}-{digest}-{_crc32(part):08x}.safetensors"
            _touch(part)
            os.replace(part, self._directory / name)
        except (OSError, RuntimeError) as e:
            with suppress(OSError):
                part.unlink()
            if self._note is not None:
                self._note(f"{self._directory}: prompts are not kept on disk from here on: {e}")
            self._directory = None


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def _count(key: bytes) -> int:
    """Tokens in a key."""
    return len(key) // 4


def _name(identity: str, key: bytes) -> tuple[str, int, str]:
    """What a file's name says of its contents: model, number of tokens, digest of the tokens."""
    return identity[:16], _count(key), hashlib.sha256(key).hexdigest()[:32]


def _nbytes(snapshot: Snapshot) -> int:
    return sum(a.nbytes for a in snapshot.values())


def _touch(path: Path) -> None:
    """Marks a file as used now. By the precise clock: the one for writing may stand still for milliseconds."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


def _crc32(path: Path) -> int:
    """Of a file's bytes, read through the page cache: no copy of them is held."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return zlib.crc32(data)
