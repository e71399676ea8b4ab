"""Reading and writing safetensors files, slice by slice.

The format: 8 bytes little endian N, N bytes of JSON mapping tensor names to dtype, shape and data_offsets
(begin and end, relative to the end of the header), then the data. https://github.com/huggingface/safetensors

The reader trusts nothing: a header is either consistent with itself and with the file's size, or refused with
an error that names the file and the tensor. Data is read by position, so that a row range of a tensor, or an
expert's slice of a stacked one, costs exactly its own bytes.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from mlx_flashmoe.convert.reread import let_go
from mlx_flashmoe.errors import SourceError

MAX_HEADER = 100_000_000
# Bits, not bytes: the format has types smaller than a byte.
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_BUFFERS_A_CALL = 512  # below IOV_MAX (1024) everywhere
_BYTES_A_CALL = 1 << 30  # macOS refuses calls of 2 GiB and more


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array in a file, or a contiguous slice of one. ``offset`` is absolute, in bytes."""

    file: SafetensorsFile = field(repr=False)
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice [start:stop] along the first axis; a scalar has one row."""
        if not self.shape:
            return self
        row = math.prod(self.shape[1:]) * DTYPE_BITS[self.dtype] // 8
        shape = (stop - start, *self.shape[1:])
        return Tensor(self.file, self.name, self.dtype, shape, self.offset + start * row)

    def at(self, index: int) -> Tensor:
        """The sub-array [index] of the first axis."""
        part = self.rows(index, index + 1)
        return Tensor(self.file, self.name, self.dtype, self.shape[1:], part.offset)

    def read(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Its bytes, as a new uint8 array."""
        buffer = np.empty(self.nbytes, dtype=np.uint8)
        self.file.read_into(self.offset, [buffer.data])
        return buffer

    def __str__(self) -> str:
        return f"{self.file.path}: tensor {self.name!r}"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: the JSON, and the size of the whole file in bytes."""

    text: bytes
    file_size: int


class SafetensorsFile:
    """A safetensors file; ``tensors`` by name. Reads are positional and may come from any thread.

    Args:
        path: the file.
        header: what is known of it already. The file is then opened by the first read: until then it need not
            be there, and ``close`` lets go of it until the next.

    Attributes:
        reader: gives bytes [start, stop) of a file that is elsewhere, and is not opened then.

    Raises:
        SourceError: the file cannot be opened, or its header is malformed or contradicts the file's size.
    """

    def __init__(self, path: Path, header: Header | None = None) -> None:
        self.path = path
        self._fd = -1
        self._opening = threading.Lock()
        self.reader: Callable[[int, int], bytes] | None = None
        try:
            self.header = header or self._read_header()
            start = 8 + len(self.header.text)
            entries = parse_header(self.header.text, self.header.file_size - start, str(path))
        except BaseException:
            self.close()
            raise
        self.tensors = {
            n: Tensor(self, n, dtype, shape, start + begin) for n, (dtype, shape, begin) in entries.items()
        }

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def forget(self) -> None:
        """What was read so far will not be read again soon: it need not stay in the page cache."""
        if self._fd >= 0:
            let_go(self._fd)

    def _open(self) -> int:
        with self._opening:
            if self._fd < 0:
                self._fd = _open(self.path)
            return self._fd

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers, one after the other, with the file's bytes from ``offset`` on.

        Raises:
            SourceError: the file ended early, or the read failed.
        """
        pending = [b for b in buffers if len(b)]
        if self.reader is not None:
            data = memoryview(self.reader(offset, offset + sum(map(len, pending))))
            for buffer in pending:
                buffer[:], data = data[: len(buffer)], data[len(buffer) :]
            return
        fd = self._fd if self._fd >= 0 else self._open()
        while pending:
            call: list[memoryview] = []
            size = 0
            for buffer in pending[:_BUFFERS_A_CALL]:
                call.append(buffer[: _BYTES_A_CALL - size])
                size += len(call[-1])
                if size == _BYTES_A_CALL:
                    break
            try:
                n = os.preadv(fd, call, offset)
            except OSError as e:
                raise SourceError(f"{self.path}: reading at byte {offset} failed: {e.strerror}") from None
            if n == 0:
                raise SourceError(
                    f"{self.path}: ends at byte {offset}, in the middle of its data; truncated?"
                )
            offset += n
            while pending and n >= len(pending[0]):
                n -= len(pending.pop(0))
            if n:
                pending[0] = pending[0][n:]

    def _read_header(self) -> Header:
        size = os.fstat(self._open()).st_size
        if size < 8:
            raise SourceError(f"{self.path}: {size} bytes are too few for a safetensors file; truncated?")
        prefix = bytearray(8)
        self.read_into(0, [memoryview(prefix)])
        length = header_length(bytes(prefix), size, str(self.path))
        text = bytearray(length)
        self.read_into(8, [memoryview(text)])
        return Header(bytes(text), size)


def _open(path: Path) -> int:
    try:
        # Opening a pipe, say, would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SourceError(f"{path} is not a file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SourceError(f"{path} is missing; download the checkpoint again") from None
    except OSError as e:
        raise SourceError(f"{path} cannot be opened: {e.strerror}") from None


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Bytes of the header that follows the first 8 bytes of a file, ``prefix``. Raises SourceError."""
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise SourceError(
            f"{where}: not a safetensors file (its header would have {length} bytes; "
            f"at most {MAX_HEADER} are allowed)"
        )
    if 8 + length > file_size:
        raise SourceError(
            f"{where}: the header should have {length} bytes, but the file has only {file_size}; truncated?"
        )
    return length


def parse_header(text: bytes, data_size: int, where: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Checks a header against the size of the data behind it.

    Args:
        text: the JSON.
        data_size: bytes in the file after the header.
        where: the file's name, for errors.

    Returns:
        name -> (dtype, shape, begin); begin relative to the data.

    Raises:
        SourceError: anything at all is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(f"{where}: the header lists {short(twice)} twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise SourceError(
            f"{where}: the header is not JSON ({e}); damaged, or not a safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise SourceError(f"{where}: the header is not a JSON object; damaged, or not a safetensors file")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{where}: the header's __metadata__ is not a map of strings")

    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        at = f"{where}: tensor {short(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise SourceError(f"{at}: the header's entry is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise SourceError(f"{at}: unknown dtype {short(dtype)}")
        if not _sizes(shape) or len(shape) > 32:
            raise SourceError(f"{at}: malformed shape {short(shape)}")
        if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise SourceError(f"{at}: malformed data_offsets {short(offsets)}")
        begin, end = offsets
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != (end - begin) * 8:
            raise SourceError(
                f"{at}: data_offsets span {end - begin} bytes, which is not what {dtype} {short(shape)} takes"
            )
        if end > data_size:
            raise SourceError(
                f"{at}: its data ends at byte {end}, but the file has only {data_size} bytes of data; truncated?"
            )
        entries[name] = (dtype, tuple(shape), begin)
        spans.append((begin, end, name))

    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = (
                "overlaps another tensor"
                if begin < position
                else f"leaves a hole of {begin - position} bytes"
            )
            raise SourceError(f"{where}: tensor {short(name)}: its data {fault}")
        position = end
    if position != data_size:
        raise SourceError(f"{where}: {data_size - position} bytes of the file belong to no tensor")
    return entries


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def read_tensors(reads: Iterable[tuple[Tensor, memoryview]]) -> None:
    """Reads slices into the views given; neighbours in a file become one scattering read."""
    run: list[memoryview] = []
    file: SafetensorsFile | None = None
    start = end = 0
    for tensor, view in sorted(reads, key=lambda r: (str(r[0].file.path), r[0].offset)):
        if file is not tensor.file or tensor.offset != end:
            if file is not None:
                file.read_into(start, run)
            run, file, start = [], tensor.file, tensor.offset
        run.append(view)
        end = tensor.offset + tensor.nbytes
    if file is not None:
        file.read_into(start, run)


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds (name, dtype, shape) one after the other, length prefix included."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the format recommends: the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text
