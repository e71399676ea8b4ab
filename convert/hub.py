"""One commit of a Hugging Face repository: what is in it, and bytes of its files.

The revision is resolved once, to a commit. Everything that is kept is checked against the hashes that the hub has
of that commit: sha256 of large files, git's own sha1 of small ones. How a large file comes in: download.py.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flashmoe.convert.safetensors import Header, header_length
from mlx_flashmoe.errors import SourceError

ATTEMPTS = 5  # in a row without a byte
PAUSE = 1.0  # seconds before the first of them; each next waits twice as long
LONGEST_PAUSE = 300.0  # seconds that a server may ask for; the hub counts requests in windows of this length
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
        with hub_errors(name):
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        self.commit = str(info.sha)
        self.files: dict[str, HubFile] = {}
        self._links: dict[
            str, str
        ] = {}  # file -> where the hub sends who asks for it: signed, and valid for a while
        for s in info.siblings or []:
            sha256 = s.lfs.sha256 if s.lfs is not None else None
            if s.size is not None and (sha256 or s.blob_id):
                self.files[s.rfilename] = HubFile(s.rfilename, s.size, sha256, s.blob_id)

    def small_file(self, name: str) -> Path:
        """A file such as config.json, in the hub's cache."""
        from huggingface_hub import hf_hub_download

        with hub_errors(f"{self.name}: {name}"):
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

        def attempt() -> None:
            with self.ask(name, start + len(data), stop) as answer:
                answer.into(data.extend, lambda: stop - start - len(data))

        with hub_errors(f"{self.name}: {name}"):
            retried(lambda: len(data), attempt, time.sleep)
        return bytes(data)

    @contextlib.contextmanager
    def ask(self, name: str, start: int, stop: int) -> Iterator[Answer]:
        """One request for bytes [start, stop) of a file. From any thread.

        Raises:
            Exception: whatever the hub's client, its HTTP library and the system raise; ``retried`` and
                ``hub_errors`` know them.
        """
        from huggingface_hub.utils import hf_raise_for_status

        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with contextlib.ExitStack() as stack:
            response = self._open(name, headers, stack)
            hf_raise_for_status(response)
            ranged = response.status_code == 206
            if ranged:
                _check_range(response.headers.get("Content-Range", ""), start, self.files[name].size)
            # As it comes: a chunk that is waited for would be lost with the connection.
            yield Answer(ranged, _without(0 if ranged else start, response.iter_bytes()))

    def _open(self, name: str, headers: dict[str, str], stack: contextlib.ExitStack) -> Any:
        """The answer to a request. The hub's redirect is followed once; where it led is asked from then on."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        link = self._links.get(name)
        if link is not None:
            # Somebody else's server: it gets no token.
            own = {**build_hf_headers(token=False), **headers}
            response = stack.enter_context(get_session().stream("GET", link, headers=own, timeout=TIMEOUT))
            if not _lasting(response.status_code):
                return response
            response.close()  # the link has expired
            self._links.pop(name, None)
        url = hf_hub_url(self.name, name, revision=self.commit)
        own = {**build_hf_headers(), **headers}
        response = stack.enter_context(get_session().stream("GET", url, headers=own, timeout=TIMEOUT))
        if (
            response.history
            and response.is_success
            and _origin(response.url) != _origin(response.history[0].url)
        ):
            self._links[name] = str(response.url)
        return response


@dataclass(frozen=True)
class Answer:
    """The bytes of a file from where they were asked for.

    Attributes:
        ranged: whether they end where they were asked to; a server that ignores ranges sends the file to its end.
    """

    ranged: bool
    chunks: Iterator[bytes]

    def into(self, take: Callable[[bytes], object], left: Callable[[], int]) -> None:
        """Gives what comes to ``take``, until no bytes are ``left``. Raises ConnectionError if it ends before."""
        # An answer that is read to its end leaves the connection free for the next request.
        for chunk in self.chunks:
            if not left():
                break  # more than was asked for
            take(chunk[: left()])
        if left():
            raise ConnectionError(f"the connection ended {left()} bytes early")


def _without(skipped: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes after the first ``skipped``."""
    for chunk in chunks:
        if len(chunk) > skipped:
            yield chunk[skipped:]
        skipped = max(0, skipped - len(chunk))


def _check_range(text: str, start: int, size: int) -> None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text.strip())
    if match is None or int(match[1]) != start or match[2] not in ("*", str(size)):
        raise ConnectionError(
            f"bytes from {start} of {size} were asked for, and the answer is {text or 'not said'}"
        )


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


class Unreachable(SourceError):
    """The network or the hub failed: trying again may help."""


class Stopped(Exception):
    """A download is given up."""


def retried(
    received: Callable[[], int], attempt: Callable[[], None], pause: Callable[[float], object]
) -> None:
    """Calls ``attempt`` until it succeeds, or fails ATTEMPTS times in a row without bringing anything.

    Args:
        received: bytes that have come; never fewer than before.
        pause: seconds before the next attempt: longer each time, and at least as long as the server asks.
    """
    from huggingface_hub.errors import HfHubHTTPError

    failures, before = 0, received()
    while True:
        try:
            return attempt()
        except Exception as e:
            response = e.response if isinstance(e, HfHubHTTPError) else None
            lasting = response is not None and _lasting(response.status_code)
            failures = 1 if received() > before else failures + 1
            if isinstance(e, (Stopped, SourceError)) or _is_disk(e) or lasting or failures == ATTEMPTS:
                raise
            before = received()
            asked = _asked_pause(response.headers) if response is not None else 0.0
            pause(max(PAUSE * 2 ** (failures - 1), asked))


def _lasting(status: int) -> bool:
    """Returns whether the same request would get the same answer."""
    return 400 <= status < 500 and status not in (408, 429)


def _asked_pause(headers: Any) -> float:
    """Seconds that an answer asks to wait: Retry-After has a number or a date, the hub's own RateLimit has t=."""
    text = headers.get("Retry-After", "").strip()
    limit = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit", "").replace(" ", ""))
    seconds = float(limit[1]) if limit else 0.0
    if text.isdecimal():
        seconds = float(text)
    elif text:
        with contextlib.suppress(ValueError):
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(seconds, 0.0), LONGEST_PAUSE)


def _is_disk(error: Exception) -> bool:
    """Whether it is about writing here, not about the network: the system's own errors that are no connection's."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, OSError) and not isinstance(
        error, (ConnectionError, TimeoutError, HfHubHTTPError)
    )


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into a SourceError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except (SourceError, Stopped):
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
