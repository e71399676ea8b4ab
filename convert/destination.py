"""The folder a conversion writes: locked while it does, and no model until the manifest is there.

Everything is made in ``.conversion`` inside it: lock, journal, shards being downloaded, and the model's files,
which move up when they are complete. So whatever else is in the folder is somebody else's, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from mlx_flashmoe import system
from mlx_flashmoe.convert.reread import crc32_on_disk, let_go
from mlx_flashmoe.errors import ConversionError
from mlx_flashmoe.layout import MANIFEST, STATE, Manifest
from mlx_flashmoe.sizes import show_size

LOCK, JOURNAL, SHARDS, MODEL = "lock", "journal", "shards", "model"  # what is in STATE


class Destination:
    """Context manager over DST: entered, it is this process's alone, and empty or an earlier conversion's.

    Left before ``keep`` is called, it removes the folders it made.

    Args:
        what: fills it, for the message to a second process.

    Attributes:
        moving: files of the model may have moved up already.

    Raises:
        ConversionError: DST is in use, or cannot be written.
    """

    def __init__(self, folder: Path, what: str = "conversion") -> None:
        self.folder = folder
        self._what = what
        self.state = folder / STATE
        self.moving = False
        self._made_folders: list[Path] = []
        self._kept = False
        self._lock = -1
        self._files: dict[str, OutputFile] = {}

    def __enter__(self) -> Destination:
        with writing(self.folder):
            if self.folder.is_symlink() and not self.folder.exists():
                raise ConversionError(f"{self.folder} is a link to nowhere; choose another folder")
            if self.folder.exists() and not self.folder.is_dir():
                raise ConversionError(f"{self.folder} is a file; choose another folder")
            if self.folder.exists() and not self.state.exists() and not (self.folder / MANIFEST).exists():
                self.check_empty()
        try:
            self._make_folder(self.state.absolute())
            self._take_lock()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._leave()

    def keep(self) -> None:
        """Has what is in the folder stay, whatever happens."""
        self._kept = True

    def check_empty(self) -> None:
        """Raises ConversionError if there is anything in the folder that is no conversion's."""
        if any(path.name != STATE for path in self.folder.iterdir()):
            if is_checkpoint(self.folder):
                raise ConversionError(
                    f"{self.folder} is a checkpoint: it goes after --hf-path, and --mlx-path takes a new folder, for "
                    f"example {new_folder(self.folder)}"
                )
            example = shlex.quote(str(self.folder / "NAME"))
            raise ConversionError(
                f"{self.folder} is not empty: --mlx-path takes a new folder, for example {example}"
            )

    def path(self, name: str) -> Path:
        """Where the model's file of that relative path is, or will be made."""
        made = self.state / MODEL / name
        return self.folder / name if self.moving and not made.exists() else made

    def has(self, name: str, size: int) -> bool:
        """Tells if that file is there, and that long."""
        path = self.path(name)
        return path.is_file() and path.stat().st_size == size

    def check_space(self, needed: int) -> int:
        """The bytes free. Raises ConversionError unless they are ``needed``."""
        with writing(self.folder):
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ConversionError(
                f"{self.folder}: {show_size(needed)} of disk space are needed, but only "
                f"{show_size(free)} are free"
            )
        return free

    def file(self, name: str, size: int) -> OutputFile:
        """The model's file of that relative path, ``size`` bytes long."""
        if name not in self._files:
            path = self.path(name)
            self._make_folder(path.parent.absolute())
            self._files[name] = OutputFile(path, size)
            sync_folder(path.parent)
        return self._files[name]

    def aside(self, name: str, size: int, *, keep: bool = False) -> OutputFile:
        """A file that is to take the place of the model's file of that relative path: see ``place``.

        Args:
            keep: begin with what is there now, if that is a file of the folder's own; it is no part of the model
                from here on.
        """
        path, there = self.state / MODEL / name, self.folder / name
        self._make_folder(path.parent.absolute())
        if keep and not path.exists() and there.is_file() and not there.is_symlink():
            self._move(there, path)
        self._files[name] = OutputFile(path, size)
        sync_folder(path.parent)
        return self._files[name]

    def place(self, name: str) -> None:
        """Gives a file that was made aside its place."""
        self._make_folder((self.folder / name).parent.absolute())
        self._move(self.state / MODEL / name, self.folder / name)

    def discard(self, name: str) -> None:
        """Removes a file that was made aside."""
        with writing(self.state / MODEL / name):
            (self.state / MODEL / name).unlink()

    def _move(self, source: Path, target: Path) -> None:
        with writing(target):
            os.replace(source, target)
        sync_folder(target.parent)
        sync_folder(source.parent)

    def write(self, name: str, data: bytes) -> None:
        """A small file, as a whole."""
        file = self.file(name, len(data))
        file.write_at(0, data)
        file.sync()

    def check_names(self) -> None:
        """Raises ConversionError if somebody else's file has the name of one that is to move up."""
        for name in [*self._to_move(), MANIFEST]:
            if os.path.lexists(self.folder / name):
                raise ConversionError(
                    f"{self.folder / name} is none of this conversion's, but has the name of a file of the model: "
                    "move it elsewhere, and start the same conversion again"
                )

    def complete(self, manifest: Manifest) -> None:
        """Makes the folder a model: until this, it is none."""
        with writing(self.folder):
            for name in self._to_move():
                (self.state / MODEL / name).rename(self.folder / name)
            sync_folder(self.folder)
            manifest.save(self.folder)
        self.clean()

    def _to_move(self) -> list[str]:
        made = self.state / MODEL
        return sorted(path.name for path in made.iterdir()) if made.exists() else []

    def clean(self) -> None:
        """Removes what is not part of the model."""
        self.keep()
        with writing(self.state):
            # The lock last: while it is there, nobody else comes in.
            for path in self.state.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self.state / LOCK).unlink()
            self.state.rmdir()

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        with writing(folder):
            for folder in reversed(missing):
                folder.mkdir()
                self._made_folders.append(folder)
                sync_folder(folder.parent)

    def _take_lock(self) -> None:
        path = self.state / LOCK
        while True:
            with writing(path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
                    os.close(fd)
                    raise ConversionError(
                        f"{self.folder}: another {self._what} is writing there (process {holder}); wait for it, "
                        "or choose another folder"
                    ) from None
                # Whoever had it may have finished, and removed the file, before this process got it.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(path)):
                        self._lock = fd
                        os.ftruncate(fd, 0)
                        os.write(fd, b"%d\n" % os.getpid())
                        return
                os.close(fd)
                self._make_folder(self.state.absolute())

    def _leave(self) -> None:
        if self._lock < 0:
            made: list[Path] = []
        else:
            made = [] if self._kept else self._made_folders
            if self.state.absolute() in made:
                for name in (LOCK, JOURNAL):
                    with contextlib.suppress(OSError):
                        (self.state / name).unlink()
            os.close(self._lock)
            self._lock = -1
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


class OutputFile:
    """A file of ``size`` bytes, zeros where nothing was written yet. Everything but ``close`` from any thread."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._fd = -1
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, size)

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        view = memoryview(data)
        with writing(self.path):
            while view:
                n = os.pwrite(self._fd, view[: 1 << 30], offset)
                view = view[n:]
                offset += n

    def sync(self) -> None:
        """Puts what was written on the disk for good."""
        with writing(self.path):
            system.flush(self._fd)
            let_go(self._fd)

    def crc32(self, offset: int, nbytes: int) -> int:
        """Of what the disk gives back."""
        with writing(self.path):
            return crc32_on_disk(self._fd, offset, nbytes)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def is_checkpoint(folder: Path) -> bool:
    """Tells a folder with weights to convert from any other."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))


def new_folder(source: Path) -> str:
    """A name for a conversion of a checkpoint, quoted for a shell."""
    return shlex.quote(f"{source.resolve().name}-4bit")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about writing ``path`` into a ConversionError of one line."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"{path}: no space left on the disk; free some, and start the same conversion again: it resumes"
            ) from None
        raise ConversionError(f"{path} cannot be written: {e.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Puts a folder's entries on the disk for good."""
    with writing(folder):
        system.flush_folder(folder)
