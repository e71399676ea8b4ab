"""The folder a conversion writes: new or empty before, complete or as it was afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from mlx_flashmoe.errors import ConversionError
from mlx_flashmoe.layout import MANIFEST, Manifest
from mlx_flashmoe.sizes import show_size


class Destination:
    """Context manager over DST. Left by an exception, it removes what it made, and nothing else.

    Raises:
        ConversionError: DST is in use, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made_folders: list[Path] = []
        self._made_files: list[Path] = []
        self._open: list[OutputFile] = []

    @staticmethod
    def check_unused(folder: Path) -> None:
        with writing(folder):
            if folder.is_symlink() and not folder.exists():
                raise ConversionError(f"{folder} is a link to nowhere; choose another folder")
            if folder.exists() and not folder.is_dir():
                raise ConversionError(f"{folder} is a file; choose another folder")
            if folder.is_dir() and any(folder.iterdir()):
                raise ConversionError(f"{folder} is not empty; choose another folder, or remove it first")

    @staticmethod
    def check_space(folder: Path, needed: int) -> None:
        """Raises ConversionError unless the disk that will hold ``folder`` has ``needed`` bytes free."""
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        with writing(folder):
            free = shutil.disk_usage(existing).free
        if free < needed:
            raise ConversionError(
                f"{folder}: the converted model needs {show_size(needed)}, but only {show_size(free)} are free"
            )

    def __enter__(self) -> Destination:
        self.check_unused(self.folder)
        try:
            self._make_folder(self.folder.absolute())
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open:
            with contextlib.suppress(OSError):
                file.close()
        if kind is not None:
            self._remove()

    def create(self, name: str) -> OutputFile:
        """A new file, by its path relative to the folder."""
        path = self.folder / name
        with writing(path):
            self._make_folder(path.parent.absolute())
            # Noted before it is made: an interrupt in between must not leave it behind.
            self._made_files.append(path)
            try:
                self._open.append(OutputFile(path))
            except OSError:
                self._made_files.pop()
                raise
        return self._open[-1]

    def save(self, manifest: Manifest) -> None:
        """Makes the folder a model: until this, it is none."""
        with writing(self.folder):
            for folder in reversed(self._made_folders):
                _sync_folder(folder)
            self._made_files += [self.folder / MANIFEST, self.folder / (MANIFEST + ".part")]
            manifest.save(self.folder)

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        with writing(folder):
            for folder in reversed(missing):
                folder.mkdir()
                self._made_folders.append(folder)

    def _remove(self) -> None:
        # The manifest first: whatever happens to the rest, what is left is no model.
        for path in reversed(self._made_files):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in reversed(self._made_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()


class OutputFile:
    """A new file. ``append`` and ``write_at`` are not mixed; ``write_at`` may come from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.crc32 = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(self, data: memoryview | bytes) -> None:
        """Writes at the end; ``size`` and ``crc32`` are then those of the file so far."""
        self.write_at(self.size, data)
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        view = memoryview(data)
        with writing(self.path):
            while view:
                n = os.pwrite(self._fd, view[: 1 << 30], offset)
                view = view[n:]
                offset += n

    def finish(self) -> None:
        """Puts the file on the disk for good."""
        with writing(self.path):
            os.fsync(self._fd)
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about writing ``path`` into a ConversionError of one line."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"{path}: no space left on the disk; the conversion is undone, free some space and start it again"
            ) from None
        raise ConversionError(f"{path} cannot be written: {e.strerror}") from None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
