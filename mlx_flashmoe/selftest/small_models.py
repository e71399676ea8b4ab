"""A small random model of every architecture: the CPU's logits, and the same bits whatever is resident."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flashmoe.layout import Manifest
from mlx_flashmoe.loader import load
from mlx_flashmoe.selftest.checkpoints import ACTIVE, VOCABULARY
from mlx_flashmoe.selftest.floats import Array
from mlx_flashmoe.selftest.trial import Skip, Trial, Wrong, shown
from mlx_flashmoe.selftest.workplace import Workplace, model_types

PROMPT, ANSWER = 40, 16
ALLOWED = 1e-3  # of the logits' spread, where both are float32
IN_PIECES = [0, PROMPT // 2, *range(PROMPT, PROMPT + ANSWER + 1)]
AT_ONCE = [0, PROMPT + ANSWER]


def logits_checks(place: Workplace) -> Iterator[Trial]:
    for model_type in model_types():
        yield Trial(f"{model_type}, in pieces", partial(_in_pieces, place, model_type))
        yield Trial(f"{model_type}, as the CPU", partial(_as_the_cpu, place, model_type))


def residency_checks(place: Workplace) -> Iterator[Trial]:
    for model_type in model_types():
        yield Trial(model_type, partial(_residency, place, model_type))


def _in_pieces(place: Workplace, model_type: str) -> str:
    """A prompt and an answer at once, and in pieces."""
    folder = place.model(model_type)
    return _close(_logits(folder, IN_PIECES, mx.float32), _logits(folder, AT_ONCE, mx.float32))


def _as_the_cpu(place: Workplace, model_type: str) -> str:
    """The GPU's logits, and the CPU's."""
    if mx.default_device() != mx.gpu:
        raise Skip("MLX finds no GPU")
    folder = place.model(model_type)
    got = _logits(folder, IN_PIECES, mx.float32)
    with _device(mx.Device(mx.cpu)):
        want = _logits(folder, IN_PIECES, mx.float32)
    return _close(got, want)


def _residency(place: Workplace, model_type: str) -> str:
    """The device's own dtype, with the fewest experts in memory that a layer can work with, with half, with all."""
    folder = place.model(model_type)
    manifest = Manifest.load(folder)
    slot = max(manifest.layout_of(entry).blob_size for entry in manifest.layers)
    every = sum(entry.num_experts for entry in manifest.layers)
    want = _logits(folder, IN_PIECES, None, every * slot)
    if not np.isfinite(want).all():
        raise Wrong("logits are not finite")
    for slots in (ACTIVE, every // 2):
        got = _logits(folder, IN_PIECES, None, slots * slot)
        if not np.array_equal(got, want):
            raise Wrong(
                f"{slots} experts in memory change the logits: by up to {np.abs(got - want).max():.1e} of "
                f"{want.std():.1e}"
            )
    return f"{ACTIVE}, {every // 2}, all {every} experts: the same bits"


def _logits(
    folder: Path, bounds: list[int], dtype: mx.Dtype | None, expert_memory: str | int = "auto"
) -> Array:
    """float32 [tokens, vocabulary], of random tokens that are fed in pieces with these bounds."""
    model, _ = load(folder, expert_memory, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, bounds[-1])
    cache = model.make_cache()
    pieces = [
        np.array(model(mx.array(tokens[None, start:stop]), cache)[0].astype(mx.float32))
        for start, stop in itertools.pairwise(bounds)
    ]
    if expert_memory != "auto" and model.resident == bool(model.stats().misses):
        raise Wrong(f"{model.stats().misses} experts were missing where {model.plan.slots} have a place")
    return np.concatenate(pieces)


def _close(got: Array, want: Array) -> str:
    """Raises Wrong unless the logits are finite, close, and name the same tokens."""
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        raise Wrong("logits are not finite")
    difference = float(np.abs(got - want).max() / want.std())
    if difference > ALLOWED:
        raise Wrong(f"logits differ by {shown(difference)} of their spread, allowed is {shown(ALLOWED)}")
    if (got.argmax(axis=1) != want.argmax(axis=1)).any():
        raise Wrong("the most likely tokens differ")
    return f"logits differ by {shown(difference)} of their spread"


@contextmanager
def _device(kind: mx.Device) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(kind)
    try:
        yield
    finally:
        mx.set_default_device(before)
