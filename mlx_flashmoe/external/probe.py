"""What a library's model does with its experts and caches, found by building its graph; nothing is computed.

Shapes of lazy arrays are known without their values. So one call with experts that return zeros tells how many experts
a token uses, in which order layers come, how large the vocabulary is and how caches grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.external.cache import ExternalCache
from mlx_flashmoe.external.experts import ExpertModule

STEP = 256  # tokens by which caches grow


class Absent(nn.Module):
    """Stands in for a layer's experts: (x, ids) -> zeros [..., K, D]. Remembers how it was called."""

    def __init__(self, path: str, calls: list[tuple[str, int]]):
        super().__init__()
        self._path, self._calls = path, calls

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        if x.shape[:-1] != ids.shape[:-1]:
            raise ValueError(f"activations {list(x.shape)} with ids {list(ids.shape)}")
        self._calls.append((self._path, ids.shape[-1]))
        return mx.zeros((*ids.shape, x.shape[-1]), dtype=x.dtype)


@dataclass(frozen=True)
class Probed:
    """Attributes:
    top_k: experts of a token, in the layer that uses the most.
    vocabulary: tokens whose logits the model returns.
    used: paths of the experts that text goes through.
    """

    top_k: int
    vocabulary: int
    used: list[str]


class Unused(nn.Module):
    """Stands where experts are that no text goes through: those for images, or for tokens further ahead."""

    def __call__(self, *args: Any) -> mx.array:
        raise RuntimeError("experts that were left out are used after all")


def replace(model: nn.Module, experts: ExpertModule, module: nn.Module) -> None:
    """Puts a module in the place of a layer's experts. Code that looks at their matrices finds some without weights."""
    *way, last = experts.path.split(".")
    parent: Any = model
    for part in way:
        parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
    at: Any = int(last) if isinstance(parent, list) else last
    for name in experts.matrices:
        module[name] = nn.Module()
    for name in experts.kept:
        module[name] = parent[at][name]
    parent[at] = module


def probe(
    model: nn.Module, experts: list[ExpertModule], run: Callable[[mx.array, list[Any]], mx.array]
) -> Probed:
    """Takes the experts out of the tree, and calls the model with one token and with several.

    Args:
        run: (tokens [1, T], caches) -> logits [1, T, V].

    Raises:
        FormatError: the model calls its experts in a way that cannot be streamed.
    """
    calls: list[tuple[str, int]] = []
    for one in experts:
        replace(model, one, Absent(one.path, calls))
    vocabulary, used = 0, [one.path for one in experts]
    for tokens in (1, 3):
        calls.clear()
        try:
            logits = run(mx.zeros((1, tokens), mx.int32), caches(model))
        except Exception as e:  # whatever the library's code does with its experts, it is not this
            raise FormatError(
                f"{type(model).__module__} cannot be run with experts that are streamed: {type(e).__name__}: {e}"
            ) from None
        called = [path for path, _ in calls]
        if tokens == 1:
            used = [path for path in used if path in called]
        if called != used or not used:
            raise FormatError(
                f"{type(model).__module__}: its layers of experts are not called once each, in order; "
                "they cannot be streamed"
            )
        vocabulary = logits.shape[-1]
    return Probed(max(top_k for _, top_k in calls), vocabulary, used)


def caches(model: nn.Module) -> list[Any]:
    """Empty caches of all layers, as the library makes them."""
    make = getattr(model, "make_cache", None)
    if make is not None:
        made: list[Any] = make()
        return made
    package = type(model).__module__.split(".")[0]
    kind = __import__(f"{package}.models.cache", fromlist=["KVCache"]).KVCache
    return [kind() for _ in model.layers]


@dataclass(frozen=True)
class Growth:
    """How a layer's cache grows.

    Attributes:
        first: bytes for the first token, and up to ``STEP`` tokens.
        each: bytes of every further token.
        most: tokens that it holds at most; None for any number.
    """

    first: int
    each: float
    most: int | None

    def nbytes(self, tokens: int) -> int:
        held = -(-min(tokens, self.most or tokens) // STEP) * STEP
        return self.first + int(self.each * max(0, held - STEP))


def growth(model: nn.Module, run: Callable[[mx.array, list[Any]], mx.array]) -> list[Growth]:
    """How the caches of a model grow; ``model`` is one that was probed."""
    few: list[Any] = []
    more: list[Any] = []
    for tokens, kept in ((1, few), (STEP + 1, more)):
        theirs = caches(model)
        run(mx.zeros((1, tokens), mx.int32), theirs)
        kept.extend(_single(theirs))
    return [
        Growth(a := ExternalCache([one]).nbytes, (ExternalCache([two]).nbytes - a) / STEP, _most(one))
        for one, two in zip(few, more)
    ]


def _single(theirs: Any) -> list[Any]:
    """The caches in lists of caches, one by one."""
    if isinstance(theirs, (list, tuple)):
        return [single for one in theirs for single in _single(one)]
    inner = getattr(theirs, "caches", None)
    return _single(inner) if isinstance(inner, (list, tuple)) else [theirs]


def _most(cache: Any) -> int | None:
    """Tokens that a cache with a window holds."""
    most = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return int(most) if isinstance(most, int) and most > 0 else None
