"""Where tensors come from: a local checkpoint folder, or a Hugging Face repository, shard by shard.

A checkpoint is opened with the headers of its shards alone. A shard's data is asked for when its turn has come
(``fetch``) and given up when every tensor of it is in place (``drop``): what that means is the storage's affair.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mlx_flashmoe.convert.download import Connections, Download
from mlx_flashmoe.convert.hub import Repository
from mlx_flashmoe.convert.hub_cache import ADVICE, Snapshot
from mlx_flashmoe.convert.journal import Beginning, Shard
from mlx_flashmoe.convert.part import remove_record
from mlx_flashmoe.convert.safetensors import Header, SafetensorsFile, Tensor
from mlx_flashmoe.convert.side_by_side import side_by_side
from mlx_flashmoe.convert.weights import INDEX, choose, json_object
from mlx_flashmoe.errors import ConversionError, SourceError
from mlx_flashmoe.layout import MANIFEST, REPOSITORY
from mlx_flashmoe.sizes import show_size

# What is copied as published: settings, tokenizer, chat template, licence. Not the index, not the weights.
_SIDE_FILES = re.compile(
    r"[^.].*\.json|.*\.jinja|tokenizer[^/]*|vocab[^/]*|merges\.txt|.*\.tiktoken|tiktoken\.model|LICEN[SC]E[^/]*"
)
HEADER_THREADS = 8  # requests to the hub at once

Waiting = Callable[[str], None]


class Storage(Protocol):
    """The shards' data.

    Attributes:
        temporary: shards are copies of this conversion's own.
    """

    temporary: bool

    def fetch(self, name: str, waiting: Waiting) -> None:
        """Returns when the shard is there; ``waiting`` is called now and then with what it waits for."""
        ...

    def prefetch(self, name: str) -> None:
        """The shard will be the next to be asked for."""
        ...

    def may_drop(self, name: str) -> bool:
        """Whether ``drop`` would remove anything."""
        ...

    def drop(self, name: str) -> None:
        """Every tensor of the shard is in place, and nothing will read it again."""
        ...

    def close(self) -> None:
        """Nothing more is needed."""
        ...


class LocalFolder:
    """Shards that are there. ``removable``: those that were asked to be removed when they are done with."""

    temporary = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._removable: set[str] = set()

    def remove_when_done(self, names: set[str]) -> None:
        """Raises ConversionError if one of them is not a file of its own."""
        for name in names:
            if (self._folder / name).is_symlink():
                raise ConversionError(
                    f"{self._folder / name} is a link: removing it would free nothing; leave --delete-source out"
                )
        self._removable = names

    def fetch(self, name: str, waiting: Waiting) -> None:
        pass

    def prefetch(self, name: str) -> None:
        pass

    def may_drop(self, name: str) -> bool:
        return name in self._removable

    def drop(self, name: str) -> None:
        if name in self._removable:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as e:
                raise SourceError(f"{self._folder / name} cannot be removed: {e.strerror}") from None

    def close(self) -> None:
        pass


class HubShards:
    """Shards downloaded into ``folder``, one or two at a time, and removed."""

    temporary = True

    def __init__(self, repository: Repository, folder: Path, kept: set[str]) -> None:
        self._repository = repository
        self._folder = folder
        self._kept = kept  # in the hub's cache, which is not ours
        self._checked: set[str] = set()
        self._connections = Connections()
        self._downloads: dict[str, Download] = {}

    def fetch(self, name: str, waiting: Waiting) -> None:
        file = self._repository.files[name]
        if name in self._kept:
            if name not in self._checked:
                waiting(f"checking {name}")
                path = self._repository.cached(name)
                assert path is not None
                file.check(path)
                self._checked.add(name)
            return
        self.prefetch(name)
        download = self._downloads.get(name)
        while download is not None and not download.wait(0.5):
            done = 100 * download.received // max(file.size, 1)
            waiting(f"downloading {name}, {done}%, {show_size(download.rate)}/s")

    def reader(self, name: str) -> Callable[[int, int], bytes] | None:
        """Reads bytes [start, stop) of a shard without the rest; None for a shard that is on the disk."""
        return None if name in self._kept else partial(self._repository.read_range, name)

    def prefetch(self, name: str) -> None:
        path = self._folder / name
        if name not in self._kept and name not in self._downloads and not path.exists():
            self._folder.mkdir(exist_ok=True)
            file = self._repository.files[name]
            self._downloads[name] = Download(self._repository, file, path, self._connections)

    def may_drop(self, name: str) -> bool:
        return name not in self._kept

    def drop(self, name: str) -> None:
        if name not in self._kept:
            self._downloads.pop(name, None)
            (self._folder / name).unlink(missing_ok=True)
            remove_record(self._folder / name)

    def close(self) -> None:
        self._connections.close()
        for download in self._downloads.values():
            download.stop()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its config.json, and every tensor it lists, by published name.

    Attributes:
        folder: where config.json and the other small files are.
        identity: tells apart checkpoints whose shards are alike.
        shards: every file with tensors that the index names, in order, by name.
        stamps: changes with a shard's content.
        present: shards whose data is there, or can be had.
        side_files: what a converted folder keeps as published.
        notes: lines about what is unusual.
    """

    folder: Path
    revision: str | None
    identity: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shards: dict[str, SafetensorsFile]
    stamps: dict[str, str]
    present: set[str]
    side_files: list[Path]
    storage: Storage
    notes: list[str]

    def recorded(self) -> dict[str, Shard]:
        """What a journal keeps of the shards."""
        return {name: Shard(file.header, self.stamps[name]) for name, file in self.shards.items()}


@contextlib.contextmanager
def open_checkpoint(
    hf_path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    downloads: Path | None = None,
    begun: Beginning | None = None,
) -> Iterator[Checkpoint]:
    """Opens a checkpoint and checks that its files are whole.

    Args:
        hf_path: a folder with config.json and model.safetensors, or shards and their index; or the id of a
            Hugging Face repository ("org/name"), of which files in the hub's cache are used, and with HF_HUB_OFFLINE
            only those.
        revision: of the repository: a branch, tag or commit. Not for a folder.
        downloads: the folder for a repository's shards. Without it only their headers are read, and there are no
            side files.
        begun: an earlier conversion's record of the same checkpoint: shards of it may have gone since.

    Raises:
        SourceError: not found, not a checkpoint, or a file missing, truncated or malformed.
        ConversionError: a revision was given with a folder; the checkpoint is not what ``begun`` says.
    """
    with contextlib.ExitStack() as stack:
        if Path(hf_path).is_dir():
            opened = _open_folder(Path(hf_path), revision, begun, stack)
        else:
            opened = _open_repository(_repository_id(hf_path), revision, downloads, begun, stack)
        if begun is not None and opened.identity != begun.source:
            raise ConversionError(
                f"{opened.folder} has changed since the conversion began; to start over, remove what is converted"
            )
        yield opened


def _open_folder(
    folder: Path, revision: str | None, begun: Beginning | None, stack: contextlib.ExitStack
) -> Checkpoint:
    if revision is not None:
        raise ConversionError(f"a revision ({revision}) is for Hugging Face ids, but {folder} is a folder")
    if (folder / MANIFEST).exists():
        raise SourceError(f"{folder} is a converted model already ({MANIFEST} is in it); nothing to convert")
    config = json_object(folder / "config.json", "a checkpoint needs it; is this a model's folder?")
    stamps: dict[str, str] = {}
    present: set[str] = set()

    def shard(name: str) -> SafetensorsFile:
        path = folder / name
        known = begun.shards.get(name) if begun is not None else None
        if known is not None and not path.exists():
            stamps[name] = known.stamp
            return SafetensorsFile(path, known.header)
        file = stack.enter_context(contextlib.closing(SafetensorsFile(path)))
        stamps[name] = f"mtime {path.stat().st_mtime_ns}"
        present.add(name)
        if known is not None and (known.header, known.stamp) != (file.header, stamps[name]):
            raise ConversionError(
                f"{path} has changed since the conversion began; to start over, remove what is converted"
            )
        return file

    there = {path.name for path in folder.iterdir() if path.exists()}
    if begun is not None:
        there |= set(begun.shards)
    index = folder / INDEX if INDEX in there else None
    weights = choose(there, index, str(folder), "download the rest of the checkpoint")
    shards = {name: shard(name) for name in weights.files}
    side_files = sorted(path for path in folder.iterdir() if path.is_file() and is_side_file(path.name))
    return Checkpoint(
        folder=folder,
        revision=None,
        identity={"config": _sha256(folder / "config.json")},
        config=config,
        tensors=weights.tensors(shards),
        shards=shards,
        stamps=stamps,
        present=present,
        side_files=side_files,
        storage=LocalFolder(folder),
        notes=[weights.note] if weights.note else [],
    )


def _open_repository(
    name: str,
    revision: str | None,
    downloads: Path | None,
    begun: Beginning | None,
    stack: contextlib.ExitStack,
) -> Checkpoint:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    # Pinned: a branch may have moved since.
    commit = begun.source["commit"] if begun is not None else revision
    repository = Snapshot(name, commit) if offline else Repository(name, commit)
    files = repository.files
    advice = ADVICE if offline else "the repository is incomplete"
    if MANIFEST in files:
        raise SourceError(
            f"{name} is a converted model already ({MANIFEST} is in it); --model {name} fetches it and uses it"
        )
    if "config.json" not in files:
        raise SourceError(f"{name}: config.json is missing; a checkpoint needs it; {advice}")
    if offline and not any(n.endswith(".safetensors") for n in files):
        raise SourceError(f"{name}: the hub's cache has none of its weights; {ADVICE}")
    wanted = {n for n in files if is_side_file(n)} if downloads is not None else {"config.json"}
    small = {n: repository.small_file(n) for n in sorted(wanted | ({INDEX} & set(files)))}
    config = json_object(small["config.json"], "")
    weights = choose(files, small.get(INDEX), name, advice)
    names = weights.files
    cached = {n: path for n in names if (path := repository.cached(n)) is not None}

    def header(file: str) -> Header:
        if file not in cached:
            return repository.header(file)
        with contextlib.closing(SafetensorsFile(cached[file])) as opened:
            return opened.header

    if begun is not None and {n: begun.shards[n].stamp for n in begun.shards} == {
        n: files[n].stamp for n in names
    }:
        headers = {n: begun.shards[n].header for n in names}
    else:
        headers = side_by_side(header, names, HEADER_THREADS)
    folder = Path(name) if downloads is None else downloads
    shards = {
        n: stack.enter_context(contextlib.closing(SafetensorsFile(cached.get(n, folder / n), headers[n])))
        for n in names
    }
    notes = [weights.note] if weights.note else []
    tokenizers = ("tokenizer.json", "tiktoken.model")
    if offline and downloads is not None and not any(file in files for file in tokenizers):
        notes.append(f"{name}: tokenizer.json is not in the hub's cache; the model will be without it")
    return Checkpoint(
        folder=small["config.json"].parent,
        revision=repository.commit,
        identity={"commit": repository.commit, "config": _sha256(small["config.json"])},
        config=config,
        tensors=weights.tensors(shards),
        shards=shards,
        stamps={n: files[n].stamp for n in names},
        present=set(names),
        side_files=[path for n, path in small.items() if n != INDEX],
        storage=stack.enter_context(contextlib.closing(HubShards(repository, folder, set(cached)))),
        notes=notes,
    )


def is_side_file(name: str) -> bool:
    """Whether a file of that name is copied as published."""
    return _SIDE_FILES.fullmatch(name) is not None and "/" not in name and not name.endswith(".index.json")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _repository_id(hf_path: str | os.PathLike[str]) -> str:
    if Path(hf_path).exists():
        raise SourceError(f"{hf_path} is a file; give the checkpoint's folder")
    name = str(hf_path)
    if not REPOSITORY.fullmatch(name):
        raise SourceError(f"{name}: no such folder, and not a Hugging Face id (org/name)")
    return name
