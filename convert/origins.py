"""Where a model's arrays come from, watched while a library loads a checkpoint.

An array that is in the tree as ``mx.load`` made it is a tensor of the checkpoint; so is a view of one with another
dtype, and a stack of such arrays is a tensor for each. Arrays that are changed in place keep their identity, and are
none of these any more.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

# MLX's operators that give an array other values.
_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
IN_PLACE = (*(f"__i{operator}__" for operator in _OPERATORS), "__setitem__")
# A dtype that mx.load does not know -> one of the same size that it knows; both take equal space in the header.
RELABELLED = {b'"F8_E8M0"': b'"U8"     '}


@dataclass(frozen=True)
class Origin:
    """A tensor of the checkpoint, with its bytes as they are, as an array has it."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]


@dataclass
class Origins:
    """Attributes:
    known: id of an array -> the tensor that it is.
    stacked: id of an array -> the tensors that are stacked in it.
    """

    known: dict[int, Origin] = field(default_factory=dict)
    stacked: dict[int, list[Origin]] = field(default_factory=dict)
    _alive: list[mx.array] = field(default_factory=list)  # an id is one array's as long as that exists

    def loaded(self, arrays: dict[str, mx.array]) -> None:
        for name, array in arrays.items():
            self._alive.append(array)
            self.known[id(array)] = Origin(name, array.dtype, array.shape)

    def viewed(self, of: mx.array, array: mx.array) -> None:
        if (origin := self.known.get(id(of))) is not None:
            self._alive.append(array)
            self.known[id(array)] = Origin(origin.name, array.dtype, array.shape)

    def stack(self, array: mx.array, parts: list[mx.array]) -> None:
        if all(id(part) in self.known for part in parts):
            self._alive.append(array)
            self.stacked[id(array)] = [self.known[id(part)] for part in parts]

    def changed(self, array: mx.array) -> None:
        self.known.pop(id(array), None)
        self.stacked.pop(id(array), None)


@contextlib.contextmanager
def watched() -> Iterator[Origins]:
    """While it lasts, MLX tells which arrays are loaded, viewed, stacked and changed."""
    origins, stack, view = Origins(), mx.stack, mx.array.view

    def watching_load(file: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(file, *args, **kwargs)
        arrays = result[0] if isinstance(result, tuple) else result
        if isinstance(arrays, dict):
            origins.loaded(arrays)
        return result

    def watching_stack(arrays: Sequence[mx.array], axis: int = 0, **kwargs: Any) -> mx.array:
        parts = list(arrays)
        result = stack(parts, axis, **kwargs)
        if axis == 0:
            origins.stack(result, parts)
        return result

    def watching_view(self: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        result: mx.array = view(self, *args, **kwargs)
        origins.viewed(self, result)
        return result

    def watching(method: Callable[..., Any]) -> Callable[..., Any]:
        def changing(self: mx.array, *args: Any) -> Any:
            origins.changed(self)
            return method(self, *args)

        return changing

    # The libraries look all of them up when they call them.
    with relabelling(), contextlib.ExitStack() as undo:
        load = mx.load
        for owner, name, new in (
            (mx, "load", watching_load),
            (mx, "stack", watching_stack),
            (mx.array, "view", watching_view),
            *((mx.array, name, watching(getattr(mx.array, name))) for name in IN_PLACE),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield origins


@contextlib.contextmanager
def relabelling() -> Iterator[None]:
    """While it lasts, ``mx.load`` reads files with dtypes of ``RELABELLED``.

    A library that meets one would write into the checkpoint's file for that.
    """
    load = mx.load

    def reading(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(file, *args, **kwargs)
        except RuntimeError:
            with contextlib.suppress(OSError, TypeError):
                relabelled: Any = _Relabelled(file)
                if relabelled.changed:
                    return load(relabelled, *args, **{**kwargs, "format": "safetensors"})
            raise

    mx.load = reading
    try:
        yield
    finally:
        mx.load = load


class _Relabelled(io.RawIOBase):
    """A safetensors file whose header says something else."""

    def __init__(self, path: str):
        self._file = open(path, "rb")  # noqa: SIM115 - closed with this
        size = self._file.read(8)
        text = self._file.read(int.from_bytes(size, "little"))
        header = text
        for known, other in RELABELLED.items():
            header = header.replace(known, other)
        self.changed = header != text
        self._head, self._at = size + header, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset if whence == io.SEEK_SET else self._at + offset
        if whence == io.SEEK_END:
            self._at = self._file.seek(0, io.SEEK_END) + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._head[self._at : self._at + view.nbytes]
        view[: len(data)] = data
        n = len(data)
        if n < view.nbytes:
            self._file.seek(self._at + n)
            n += self._file.readinto(view[n:]) or 0
        self._at += n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
