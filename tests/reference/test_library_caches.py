"""A library's caches, kept and restored: what goes on from one is bit for bit what would have gone on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is a reference; pip install .[reference]")
pytest.importorskip("mlx_vlm", reason="mlx-vlm is a reference; pip install .[reference]")

import library_models as lib
import mlx.core as mx
import numpy as np

from mlx_flashmoe import convert, load
from mlx_flashmoe.external.cache import ExternalCache
from mlx_flashmoe.generate import generate_step
from mlx_flashmoe.prefix_cache import PrefixCache

WINDOW = 8
# How a cache is fed one chunk of keys and values [1, heads, T, D], and what comes out of it.
Feed = Callable[[Any, mx.array, mx.array], list[mx.array]]


def attention(cache: Any, keys: mx.array, values: mx.array) -> list[mx.array]:
    if hasattr(cache, "maybe_trim_front"):
        cache.maybe_trim_front()
    out = cache.update_and_fetch(keys, values)
    arrays: list[mx.array] = []
    for part in out:
        arrays.extend(part if isinstance(part, (list, tuple)) else [part])
    return arrays


def recurrent(cache: Any, keys: mx.array, values: mx.array) -> list[mx.array]:
    for i, new in enumerate((keys, values)):
        cache[i] = new.sum(2) if cache[i] is None else 0.5 * cache[i] + new.sum(2)
    return [cache[0], cache[1]]


def both(cache: Any, keys: mx.array, values: mx.array) -> list[mx.array]:
    return [*attention(cache[0], keys, values), *attention(cache[1], keys, values)]


def pooling(cache: Any, keys: mx.array, values: mx.array) -> list[mx.array]:
    kv, gate = keys[:, 0], values[:, 0]
    ready, ready_gate, _ = cache.accumulate_windows(kv, gate, cache.offset)
    pooled = (ready * ready_gate).reshape(1, -1, cache.ratio, kv.shape[-1]).sum(2)
    return [ready, cache.update_and_fetch(pooled)]


# Class -> how one is made of its module, and fed.
KINDS: dict[str, tuple[Callable[[Any], Any], Feed]] = {
    "KVCache": (lambda m: m.KVCache(), attention),
    "RotatingKVCache": (lambda m: m.RotatingKVCache(max_size=WINDOW, keep=2), attention),
    "BufferedRotatingKVCache": (lambda m: m.BufferedRotatingKVCache(WINDOW, buffer_size=4), attention),
    "QuantizedKVCache": (lambda m: m.QuantizedKVCache(group_size=32, bits=8), attention),
    "ChunkedKVCache": (lambda m: m.ChunkedKVCache(WINDOW), attention),
    "ConcatenateKVCache": (lambda m: m.ConcatenateKVCache(), attention),
    "SimpleKVCache": (lambda m: m.SimpleKVCache(), attention),
    "StaticPrefixKVCache": (lambda m: m.StaticPrefixKVCache(64), attention),
    "ArraysCache": (lambda m: m.ArraysCache(2), recurrent),
    "CacheList": (lambda m: m.CacheList(m.KVCache(), m.RotatingKVCache(max_size=WINDOW)), both),
    "PoolingCache": (lambda m: m.PoolingCache(4), pooling),
}


def kinds(library: str) -> list[str]:
    """The classes of one sequence's caches that a library has."""
    module = importlib.import_module(f"{library.replace('-', '_')}.models.cache")
    base = module._BaseCache
    found = [
        n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base
    ]
    return [name for name in found if not name.startswith("Batch")]


@pytest.mark.parametrize(("library", "kind"), [(name, kind) for name in lib.TABLES for kind in kinds(name)])
@pytest.mark.parametrize("seen", [0, 1, 7, 8, 21], ids="after {} tokens".format)
def test_every_kind_goes_on_where_it_was_kept(library: str, kind: str, seen: int) -> None:
    module = importlib.import_module(f"{library.replace('-', '_')}.models.cache")
    make, feed = KINDS[kind]
    rng = np.random.default_rng(seen)
    chunks = [mx.array(rng.standard_normal((2, 1, 2, t, 32)).astype(np.float32)) for t in (4, 1, 1, 9, 1)]

    def go_on(cache: ExternalCache) -> list[np.ndarray]:
        return [np.array(a) for keys, values in chunks for a in feed(cache.theirs[0], keys, values)]

    cache = ExternalCache([make(module)])
    if seen:
        feed(cache.theirs[0], *mx.array(rng.standard_normal((2, 1, 2, seen, 32)).astype(np.float32)))
    kept = cache.snapshot()
    mx.eval(kept)
    want = go_on(cache)
    for _ in range(2):  # a kept state may be used again, whatever was done with it the first time
        fresh = ExternalCache([make(module)])
        fresh.restore(kept, seen)
        got = go_on(fresh)
        assert len(got) == len(want) and all(map(np.array_equal, got, want))


# Windows with growing caches, recurrent states with convolutions, indexed keys, n-grams of past tokens. Not
# deepseek_v4: in its library, what a token sees of the compressed past depends on how the prompt is cut.
MIXED = [
    ("mlx-lm", "step3p5"),
    ("mlx-lm", "nemotron_h"),
    ("mlx-lm", "longcat_flash_ngram"),
    ("mlx-vlm", "qwen4_exp"),
    ("mlx-vlm", "llama4"),
]


@pytest.mark.parametrize(("library", "model_type"), MIXED)
def test_a_conversation_goes_on_from_what_was_kept(tmp_path: Path, library: str, model_type: str) -> None:
    mx.disable_compile()
    source = lib.make(library, lib.config(library, model_type), tmp_path / "src", 4)
    convert(source, tmp_path / "dst")
    model, _ = load(tmp_path / "dst", expert_memory="os")
    rng = np.random.default_rng(2)
    first, more = rng.integers(1, 90, 30).tolist(), rng.integers(1, 90, 9).tolist()

    def answer(prompt: list[int], prefixes: PrefixCache | None) -> tuple[list[int], np.ndarray]:
        steps = list(generate_step(mx.array(prompt), model, max_tokens=6, prefix_cache=prefixes))
        return [token for token, _ in steps], np.stack([np.array(logprobs) for _, logprobs in steps])

    folder = tmp_path / "kept"
    prefixes = PrefixCache(model.identity, directory=folder)
    spoken, _ = answer(first, prefixes)
    second = [*first, *spoken, *more]
    for kept in (prefixes, PrefixCache(model.identity, directory=folder)):
        got, logprobs = answer(second, kept)
        assert kept.restored >= len(first) - 1
        want, whole = answer(second, None)
        assert got == want
        assert np.abs(logprobs - whole).max() <= 1e-4  # in other chunks, which round otherwise
