"""A converted model on the Hugging Face hub, brought into the user's cache folder once, and checked as it comes.

    ~/.cache/mlx-flashmoe/models/ORG/NAME      a converted folder like any other, when it is complete

Until then its files are in ``.conversion`` inside it, as those of a conversion are. The commit is resolved once, and
written there: a later run resumes with that commit. What is complete is used as it is, and the hub is not asked.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_flashmoe import system, user_cache
from mlx_flashmoe.convert.destination import MODEL, Destination, sync_folder, writing
from mlx_flashmoe.convert.download import Connections, Download
from mlx_flashmoe.convert.hub import HubFile, Repository, Unreachable
from mlx_flashmoe.convert.part import remove_record
from mlx_flashmoe.convert.source import is_side_file
from mlx_flashmoe.errors import FormatError, SourceError
from mlx_flashmoe.layout import MANIFEST, REPOSITORY, Manifest, convert_command
from mlx_flashmoe.sizes import show_size

COMMIT = "commit"  # a file in STATE: the commit that is being fetched
AT_ONCE = 2  # files, so that the end of one and the beginning of the next fill the line

Progress = Callable[[int, int, str], None]


def default_directory() -> Path:
    """The folder of fetched models."""
    return user_cache.folder("models")


def find(model: str | os.PathLike[str]) -> Path | None:
    """The folder of a model that is here: ``model`` itself, or what was fetched of the repository of that name.

    None if it is the name of a repository that was not fetched completely. A path of another shape is returned as it
    is, though nothing is there.
    """
    folder = Path(model)
    if os.path.lexists(folder) or not REPOSITORY.fullmatch(str(model)):
        return folder
    fetched = default_directory() / str(model)
    return fetched if (fetched / MANIFEST).exists() else None


def model_folder(
    model: str | os.PathLike[str],
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of a model; a converted repository on the hub ("org/name") is fetched if it was not.

    Args:
        announce: is given a line that says how much is fetched, and where it is kept.
        progress: called with (bytes that are there, bytes in all, what is being done), often.

    Raises:
        SourceError: the repository is not there, or may not be read, or the network or the hub failed.
        FormatError: it is not a converted model, or its files are not those that its manifest lists.
        ConversionError: no space is left, the folder cannot be written, or another process is fetching the model.
    """
    folder = find(model)
    if folder is None:
        folder = default_directory() / str(model)
        _fetch(str(model), folder, announce or (lambda line: None), progress or (lambda *_: None))
    return folder


def _fetch(name: str, folder: Path, announce: Callable[[str], None], progress: Progress) -> None:
    with Destination(folder, "download") as out:
        if (folder / MANIFEST).exists():
            return  # another process was faster
        repository = _repository(name, out)
        manifest = read_manifest(repository)
        wanted = {file.name: file for file in wanted_files(repository, manifest)}
        made = out.state / MODEL
        there = [file for file in wanted.values() if _is_there(out, file)]
        needed = sum(f.size - _allocated(made / f.name) for f in wanted.values() if f not in there)
        out.check_space(needed)
        total = sum(file.size for file in wanted.values())
        announce(
            f"{name}: {show_size(total)} on the hub, {show_size(total - needed)} of it here already; "
            f"commit {repository.commit[:8]} goes to {folder}"
        )
        _pin(out, repository.commit)
        out.keep()
        for path in {(made / file).parent for file in wanted}:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
        done = sum(file.size for file in there)
        try:
            _download(repository, [f for f in wanted.values() if f not in there], made, done, total, progress)
        except Unreachable as e:
            raise Unreachable(f"{e}: the same command resumes") from None
        for file in wanted:
            remove_record(made / file)
        out.complete(manifest)


def _repository(name: str, out: Destination) -> Repository:
    """The commit that was begun, or the newest one."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SourceError(
            f"{name}: no such folder, and not all of the repository of that name is in {out.folder}; HF_HUB_OFFLINE "
            "is set: unset it to fetch the model from the hub"
        )
    pin = out.state / COMMIT
    if pin.exists():
        out.keep()
        return Repository(name, pin.read_text(encoding="utf-8"))
    # Files that are there without it may be of another commit.
    shutil.rmtree(out.state / MODEL, ignore_errors=True)
    try:
        return Repository(name, None)
    except SourceError as e:
        line = str(e)
        if "no such folder" not in line:
            line = f"there is no folder {name}; {line}"
        raise SourceError(f"{line}. A checkpoint is converted first: {convert_command(name)}") from None


def _pin(out: Destination, commit: str) -> None:
    path = out.state / COMMIT
    with writing(path), open(path.with_suffix(".new"), "w", encoding="utf-8") as f:
        f.write(commit)
        f.flush()
        system.flush(f.fileno())
        os.replace(f.name, path)
        sync_folder(out.state)


def published(model: str) -> Repository | None:
    """The repository of a converted model that is on the hub, and not here; None if ``model`` is anything else.

    Raises:
        SourceError: there is no such repository, or it cannot be read.
    """
    from huggingface_hub import constants

    if find(model) is not None or constants.HF_HUB_OFFLINE:
        return None
    repository = Repository(model, None)
    return repository if MANIFEST in repository.files else None


def read_manifest(repository: Repository) -> Manifest:
    """The manifest of a repository. Raises FormatError if it is not a converted model, and says what to do."""
    name, files = repository.name, repository.files
    if MANIFEST not in files:
        checkpoint = "config.json" in files and any(file.endswith(".safetensors") for file in files)
        advice = f"no {MANIFEST} in the repository, and no checkpoint that could be converted"
        if checkpoint:
            advice = f"it is a checkpoint on the hub: convert it first, {convert_command(name)}"
        raise FormatError(f"{name} is not a converted model ({advice})")
    data = repository.read_range(MANIFEST, 0, files[MANIFEST].size)
    hasher = files[MANIFEST].hasher()
    hasher.update(data)
    if not files[MANIFEST].matches(hasher):
        raise SourceError(f"{name}: {MANIFEST} did not come as the hub has it; try again")
    try:
        return Manifest.from_json(json.loads(data), f"{name}: {MANIFEST}")
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{name}: {MANIFEST}: not valid JSON: {e}") from None


@dataclass(frozen=True)
class _Listed(HubFile):
    """A file that the manifest lists. ``pieces``: what each piece is, its bytes, and its crc32."""

    repository: str = ""
    pieces: tuple[tuple[str, int, int], ...] = ()

    def hasher(self) -> _Hasher:
        return _Hasher(super().hasher(), self.pieces)

    def matches(self, hasher: _Hasher) -> bool:
        if not super().matches(hasher.whole):
            return False
        if hasher.wrong:
            raise FormatError(
                f"{self.repository}: {self.name}{hasher.wrong[0]} differs from its checksum in {MANIFEST}: the "
                f"repository is damaged; once that is mended, remove {default_directory() / self.repository} and fetch "
                "it again"
            )
        return True


@dataclass
class _Hasher:
    """The hash of a whole file, and the checksums of its pieces, which are all of it."""

    whole: Any
    pieces: tuple[tuple[str, int, int], ...]
    wrong: list[str] = field(default_factory=list)
    _piece: int = 0
    _done: int = 0  # bytes of that piece
    _crc: int = 0

    def update(self, data: bytes) -> None:
        self.whole.update(data)
        view = memoryview(data)
        while view and self._piece < len(self.pieces):
            what, nbytes, crc = self.pieces[self._piece]
            part = view[: nbytes - self._done]
            self._crc, self._done, view = (
                zlib.crc32(part, self._crc),
                self._done + len(part),
                view[len(part) :],
            )
            if self._done == nbytes:
                if self._crc != crc:
                    self.wrong.append(what)
                self._piece, self._done, self._crc = self._piece + 1, 0, 0


def wanted_files(repository: Repository, manifest: Manifest) -> Iterator[_Listed]:
    """The files of a model, without its manifest.

    Raises:
        FormatError: the repository lacks one, or has it in another size.
    """

    def listed(file: str, size: int | None, pieces: list[tuple[str, int, int]]) -> _Listed:
        known = repository.files.get(file)
        if known is None:
            raise FormatError(
                f"{repository.name}: {file} is missing, but {MANIFEST} lists it: the repository is incomplete"
            )
        if size not in (None, known.size):
            raise FormatError(
                f"{repository.name}: {file} has {known.size} bytes, but {size} by {MANIFEST}: the repository is "
                "incomplete"
            )
        return _Listed(
            file, known.size, known.sha256, known.git, None, repository=repository.name, pieces=tuple(pieces)
        )

    small = manifest.source.get("files")
    if small is None:  # converted before the manifest listed them
        small = dict.fromkeys(file for file in repository.files if is_side_file(file) and file != MANIFEST)
    if not isinstance(small, dict) or not all(map(is_side_file, small)):
        raise FormatError(f"{repository.name}: {MANIFEST}: malformed manifest (source: files)")
    for file, crc in small.items():
        size = repository.files[file].size if file in repository.files else 0
        yield listed(file, None, [("", size, crc)] if crc is not None else [])
    for dense in manifest.dense:
        yield listed(dense.file, dense.size, [("", dense.size, dense.crc32)])
    for entry in manifest.layers:
        size = manifest.layout_of(entry).blob_size
        blobs = [(f": layer {entry.layer}, expert {e}", size, crc) for e, crc in enumerate(entry.crc32)]
        yield listed(entry.file, entry.num_experts * size, blobs)


def _is_there(out: Destination, file: HubFile) -> bool:
    """Returns whether the file is complete: it gets its name when its hash was right."""
    paths = (out.state / MODEL / file.name, out.folder / file.name)
    return any(path.is_file() and path.stat().st_size == file.size for path in paths)


def _allocated(path: Path) -> int:
    """Bytes of the disk that a file in the making has already."""
    try:
        status = path.with_name(path.name + ".part").stat()
    except OSError:
        return 0
    return min(status.st_size, status.st_blocks * 512)


def _download(
    repository: Repository, files: list[_Listed], folder: Path, done: int, total: int, progress: Progress
) -> None:
    waiting, going = deque(files), deque[Download]()
    with closing(Connections()) as connections:
        try:
            while waiting or going:
                while waiting and len(going) < AT_ONCE:
                    file = waiting.popleft()
                    going.append(Download(repository, file, folder / file.name, connections))
                what = f"fetching {going[0].file.name}"
                if going[0].wait(0.5):
                    done += going.popleft().file.size
                progress(done + sum(download.received for download in going), total, what)
        finally:
            for download in going:
                download.stop()
