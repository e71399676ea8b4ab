"""One commit of a Hugging Face repository: what is in it, its headers, and its shards, one at a time.

The revision is resolved once, to a commit. Everything that is kept is checked against the hashes that the hub has
of that commit: sha256 of large files, git's own sha1 of small ones. A shard's download goes on where it was broken
off, in this process or in a later one; the hub's own client begins it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flashmoe.convert.destination import writing
from mlx_flashmoe.convert.safetensors import Header, header_length
from mlx_flashmoe.errors import SourceError

ATTEMPTS = 5  # in a row without a byte
PAUSE = 1.0  # seconds before the first of them; each next waits twice as long
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
FIRST_READ = 256 << 10  # of a header: most are smaller


@dataclass(frozen=True)
class HubFile:
    """A file of a commit. ``sha256`` of a large file, ``git`` hash of a small one; ``mtime`` of one without a hash."""

    name: str
    size: int
    sha256: str | None
    git: str | None
    mtime: int | None = None

    @property
    def stamp(self) -> str:
        if self.sha256 or self.git:
            return f"sha256 {self.sha256}" if self.sha256 else f"git {self.git}"
        return f"mtime {self.mtime}"

    def hasher(self) -> Any:
        """To be fed with the file; then ``check`` it."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)

    def matches(self, hasher: Any) -> bool:
        return hasher.hexdigest() == (self.sha256 or self.git)

    def check(self, path: Path) -> None:
        """Raises SourceError unless ``path`` is, byte for byte, this file; without a hash it is taken as it is."""
        if not (self.sha256 or self.git):
            return
        hasher = self.hasher()
        try:
            with open(path, "rb") as f:
                while data := f.read(CHUNK):
                    hasher.update(data)
        except OSError as e:
            raise SourceError(f"{path} cannot be read: {e.strerror}") from None
        if not self.matches(hasher):
            raise SourceError(
                f"{path} is not the file that the hub has ({self.stamp}); remove it, and try again"
            )


class Repository:
    """A commit of the repository ``name``.

    Raises:
        SourceError: it is not there, may not be read, or the network or the hub failed.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.name = name
        with _hub_errors(name):
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        self.commit = str(info.sha)
        self.files: dict[str, HubFile] = {}
        for s in info.siblings or []:
            sha256 = s.lfs.sha256 if s.lfs is not None else None
            if s.size is not None and (sha256 or s.blob_id):
                self.files[s.rfilename] = HubFile(s.rfilename, s.size, sha256, s.blob_id)

    def small_file(self, name: str) -> Path:
        """A file such as config.json, in the hub's cache."""
        from huggingface_hub import hf_hub_download

        with _hub_errors(f"{self.name}: {name}"):
            path = Path(hf_hub_download(self.name, name, revision=self.commit))
        self.files[name].check(path)
        return path

    def cached(self, name: str) -> Path | None:
        """Where a file is if the hub's cache has it already."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def header(self, name: str) -> Header:
        """The header of a safetensors file, by a request or two for its first bytes."""
        file, where = self.files[name], f"{self.name}: {name}"
        start = self.read_range(name, 0, min(FIRST_READ, file.size))
        if len(start) < 8:
            raise SourceError(f"{where}: {file.size} bytes are too few for a safetensors file; truncated?")
        end = 8 + header_length(start[:8], file.size, where)
        if end > len(start):
            start += self.read_range(name, len(start), end)
        return Header(start[8:end], file.size)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        data = bytearray()
        with _hub_errors(f"{self.name}: {name}"):
            _retried(
                lambda: len(data),
                lambda: self._stream(name, start + len(data), stop, data.extend, data.clear),
            )
        return bytes(data)

    def _stream(
        self, name: str, start: int, stop: int, take: Callable[[bytes], object], restart: Callable[[], object]
    ) -> None:
        """One request for bytes [start, stop); ``restart`` is called first if they come from the file's beginning."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.name, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            left = stop - start
            if response.status_code != 206:
                restart()
                left = stop
            # As it comes: a chunk that is waited for would be lost with the connection.
            for chunk in response.iter_bytes():
                take(chunk[:left])
                left -= len(chunk)
                if left <= 0:
                    break
        if left > 0:
            raise ConnectionError(f"the connection ended {left} bytes early")


class Download:
    """A shard on its way to ``path``, in a thread of its own.

    Attributes:
        received: bytes of it that are there.
    """

    def __init__(self, repository: Repository, file: HubFile, path: Path) -> None:
        self.file = file
        self.path = path
        self.received = 0
        self._repository = repository
        self._stopped = False
        self._error: BaseException | None = None
        # A daemon: a process that ends does not wait for it.
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it is complete within that time. Raises what went wrong."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Gives it up; returns when nothing is written any more."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            for attempt in (1, 2):
                if self._fetch():
                    return
                if attempt == 2:
                    raise SourceError(
                        f"{self._repository.name}: {self.file.name}: downloaded twice, and twice it was not the file "
                        f"that the hub has ({self.file.stamp})"
                    )
        except BaseException as e:
            self._error = e

    def _fetch(self) -> bool:
        """Brings the file in; False, and what came is removed, if it is not what the hub has."""
        part = self.path.with_name(self.path.name + ".part")
        hasher = self.file.hasher()
        with writing(part), open(part, "a+b") as f:
            self.received = 0
            f.seek(0)
            while data := f.read(CHUNK):  # what an earlier attempt brought
                hasher.update(data)
                self.received += len(data)
            if self.received > self.file.size:
                part.unlink()
                return False

            def take(chunk: bytes) -> None:
                if self._stopped:
                    raise _Stopped
                f.write(chunk)
                hasher.update(chunk)
                self.received += len(chunk)

            def restart() -> None:
                nonlocal hasher
                f.truncate(0)
                hasher, self.received = self.file.hasher(), 0

            with _hub_errors(f"{self._repository.name}: {self.file.name}"):
                _retried(
                    lambda: self.received,
                    lambda: (
                        self._repository._stream(self.file.name, self.received, self.file.size, take, restart)
                        if self.received < self.file.size
                        else None
                    ),
                )
            f.flush()
            if not self.file.matches(hasher):
                part.unlink()
                return False
            os.fsync(f.fileno())
            part.rename(self.path)
        return True


class Unreachable(SourceError):
    """The network or the hub failed: trying again may help."""


class _Stopped(Exception):
    """A download is given up."""


def _retried(received: Callable[[], int], attempt: Callable[[], None]) -> None:
    """Calls ``attempt`` until it succeeds, or fails ATTEMPTS times in a row without bringing anything."""
    from huggingface_hub.errors import HfHubHTTPError

    failures, before = 0, received()
    while True:
        try:
            return attempt()
        except Exception as e:
            status = e.response.status_code if isinstance(e, HfHubHTTPError) else None
            lasting = status is not None and status < 500 and status not in (408, 429)
            failures = 1 if received() > before else failures + 1
            if isinstance(e, (_Stopped, SourceError)) or _is_disk(e) or lasting or failures == ATTEMPTS:
                raise
            before = received()
            time.sleep(PAUSE * 2 ** (failures - 1))


def _is_disk(error: Exception) -> bool:
    """Whether it is about writing here, not about the network: the system's own errors that are no connection's."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, OSError) and not isinstance(
        error, (ConnectionError, TimeoutError, HfHubHTTPError)
    )


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into a SourceError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except (SourceError, _Stopped):
        raise
    except errors.GatedRepoError:
        raise SourceError(
            f"{what}: the hub gives it only to who has accepted its terms: do that on its page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{what}: no such folder, and no such repository on the hub (a private one needs `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{what}: the repository has no such revision") from None
    except errors.HfHubHTTPError as e:
        if e.response.status_code not in (401, 403):
            raise Unreachable(_failed(what, e)) from None
        raise SourceError(
            f"{what}: the hub refuses access ({e.response.status_code}): misspelt, or private, which needs "
            "`hf auth login`"
        ) from None
    # The client raises its own, its HTTP library's and the system's errors: all mean the same here.
    except Exception as e:
        if _is_disk(e):
            raise
        raise Unreachable(_failed(what, e)) from None


def _failed(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{what}: downloading from the hub failed: {type(error).__name__}: {reason[:200]}; try again"
