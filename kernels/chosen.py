"""Chooses how a GPU computes the experts of one layout: by the custom kernels, as they are fastest, or by MLX.

``prepare`` compares and measures once on a device, with experts of the model that is loaded, and keeps the outcome in
the user's cache. Calls without it get the language's own choice, compared on random experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe import user_cache
from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.kernels import gpu, mlx_experts, reference, trust, tuning
from mlx_flashmoe.kernels.random_slab import on_device, random_slab
from mlx_flashmoe.layout import BlobLayout

MLX = "mlx"
SAMPLE_BYTES = 160 << 20  # of experts that are measured with: more than the caches of a device hold
RUNS = (1, 9, 5)  # rows of the experts that expert_rows is compared on


@dataclass(frozen=True)
class Choice:
    """Attributes:
    ffn, rows: the formulation of expert_ffn and of expert_rows; MLX for MLX's own operations.
    tiling: of the custom kernels.
    wrong: the fault of the custom kernels; "" for none.
    """

    ffn: str
    rows: str
    tiling: gpu.Tiling
    wrong: str = ""


class Experts:
    """The experts' functions as they were chosen."""

    def __init__(self, language: gpu.Language, choice: Choice):
        self.choice = choice
        tiled = replace(language, tiling=choice.tiling)
        ffn, rows = choice.ffn, choice.rows
        self.expert_ffn = (
            mlx_experts.expert_ffn if ffn == MLX else partial(gpu.expert_ffn, tiled, formulation=ffn)
        )
        self.expert_outputs = (
            mlx_experts.expert_outputs if ffn == MLX else partial(gpu.expert_outputs, tiled, formulation=ffn)
        )
        self.expert_rows = (
            mlx_experts.expert_rows if rows == MLX else partial(gpu.expert_rows, tiled, formulation=rows)
        )


_experts: dict[tuple[Hashable, ...], Experts] = {}


def for_ffn(language: gpu.Language, layout: BlobLayout, dtype: mx.Dtype, top_k: int) -> Experts:
    """Returns the functions for a few tokens with ``top_k`` experts each; 1 for expert_outputs."""
    key = (trust.mode(), layout, dtype, top_k)
    return _experts.get(key) or _unprepared(key, language, layout, dtype, top_k)


def for_rows(language: gpu.Language, layout: BlobLayout, dtype: mx.Dtype) -> Experts:
    """Returns the functions for rows that are grouped by expert."""
    key = (trust.mode(), layout, dtype)
    return _experts.get(key) or _unprepared(key, language, layout, dtype, 2)


def prepare(
    layout: BlobLayout,
    dtype: mx.Dtype,
    top_k: int,
    experts: Callable[[int], np.ndarray],
    announce: Callable[[str], None] | None = None,
) -> Choice | None:
    """Decides how the experts of a model's layout are computed on the current device, before they are needed.

    Args:
        dtype: of the activations.
        top_k: experts of a token; 1 where expert_outputs is what is called.
        experts: returns that many of the model's experts, or all if it has fewer: uint32 [count, blob_size / 4].
        announce: is given a line before kernels are measured, which takes seconds.

    Returns:
        the choice; None on a CPU.

    Raises:
        FlashMoEError: neither the custom kernels nor MLX's operations compute what they should.
    """
    language = gpu.current()
    if language is None:
        return None
    key = (trust.mode(), layout, dtype, top_k)
    if key not in _experts:
        file = trust.kept_name("chosen", key)
        plain = _plain(layout)
        kept = None if plain else user_cache.read("kernels", file)
        if kept is not None:
            choice = _from_json(kept)
        elif plain:
            choice = Choice(MLX, MLX, language.tiling)
        else:
            if announce is not None:
                announce(
                    "kernels: measured once on this device for experts like these, which takes some seconds"
                )
            blobs = experts(max(top_k + 1, len(RUNS), SAMPLE_BYTES // layout.blob_size))
            choice = Choice(*tuning.tune(language, on_device(blobs), layout, dtype, min(top_k, len(blobs))))
            lasting = True
            if trust.mode() == "auto":
                choice, lasting = compared(language, choice, blobs, layout, dtype, top_k)
            if lasting:
                user_cache.write("kernels", file, json.dumps(asdict(choice)).encode())
        _take(key, language, choice)
    return _experts[key].choice


def compared(
    language: gpu.Language,
    choice: Choice,
    blobs: np.ndarray,
    layout: BlobLayout,
    dtype: mx.Dtype,
    top_k: int,
) -> tuple[Choice, bool]:
    """Returns the choice if its results are right; else the language's own; else MLX's operations.

    Args:
        blobs: uint32 [count, blob_size / 4], experts to compare on.

    Returns:
        what serves, and whether the next process would find the same.

    Raises:
        FlashMoEError: not even the results of MLX's operations are right.
    """
    few = blobs[: max(top_k + 1, len(RUNS))]
    own = Choice(gpu.DEFAULT_FORMULATION, gpu.best_for_rows(language, layout, dtype), language.tiling)
    for candidate in dict.fromkeys([choice, own]):
        custom = trust.fault(partial(_compare, language, candidate, few, layout, dtype, top_k))
        if not custom.text:
            return candidate, True
    plain = Choice(MLX, MLX, language.tiling, custom.text)
    found = trust.fault(partial(_compare, language, plain, few, layout, dtype, top_k))
    if found.text:
        raise FlashMoEError(
            f"experts are not computed right on this device, neither by the custom kernels ({custom.text}) nor by "
            f"MLX's own operations ({found.text}); {trust.REPORT}"
        )
    return plain, custom.lasting


def identity(layout: BlobLayout, dtype: mx.Dtype, top_k: int) -> str:
    """Returns, as text, what computes such experts on the current device: outputs depend on it, bit for bit."""
    language = gpu.current()
    if language is None:
        return ""
    ffn = for_ffn(language, layout, dtype, top_k).choice
    rows = for_rows(language, layout, dtype).choice
    return f"{ffn.ffn} {rows.rows} {ffn.tiling} {rows.tiling}"


def _plain(layout: BlobLayout) -> bool:
    """Tells whether MLX's operations compute these experts, because no custom kernel does."""
    return trust.mode() == MLX or not gpu.fuses(layout)


def _take(key: tuple[Hashable, ...], language: gpu.Language, choice: Choice) -> Experts:
    """Uses a choice from now on, for rows too unless they have one."""
    experts = _experts[key] = Experts(language, choice)
    _experts.setdefault(key[:3], experts)
    if choice.wrong:
        trust.tell("experts", choice.wrong)
    return experts


def _unprepared(
    key: tuple[Hashable, ...], language: gpu.Language, layout: BlobLayout, dtype: mx.Dtype, top_k: int
) -> Experts:
    choice = Choice(gpu.DEFAULT_FORMULATION, gpu.best_for_rows(language, layout, dtype), language.tiling)
    if _plain(layout):
        choice = Choice(MLX, MLX, language.tiling)
    elif trust.mode() == "auto":
        blobs = np.array(random_slab(layout, max(top_k + 1, len(RUNS))))
        choice, _ = compared(language, choice, blobs, layout, dtype, top_k)
    return _take(key, language, choice)


def _compare(
    language: gpu.Language, choice: Choice, blobs: np.ndarray, layout: BlobLayout, dtype: mx.Dtype, top_k: int
) -> str:
    """Compares a choice's results with MLX's float32 products on the CPU; returns the fault, "" for none."""
    count = len(blobs)
    k = min(top_k, count)
    slots = np.stack([np.roll(np.arange(count), t)[:k] for t in range(2)]).astype(np.int32)
    rows = np.repeat(np.arange(min(count, len(RUNS)), dtype=np.int32), RUNS[:count])
    x, several = trust.normals((2, layout.hidden_size), (len(rows), layout.hidden_size))
    x, several = x.astype(dtype), several.astype(dtype)
    weights = np.random.default_rng(0).uniform(0.05, 1, slots.shape).astype(np.float32)
    slab = on_device(blobs)
    experts = Experts(language, choice)
    # Outputs start as NaN, so that one that is not written shows.
    options: dict[str, Any] = {} if choice.ffn == MLX else {"init_value": math.nan}
    got = [
        experts.expert_ffn(x[:1], slab, mx.array(slots[:1]), mx.array(weights[:1]), layout, **options),
        experts.expert_ffn(x, slab, mx.array(slots), mx.array(weights), layout, **options),
        experts.expert_rows(several, slab, mx.array(rows), layout, **options),
    ]
    mx.eval(got)
    host = [np.array(a.astype(mx.float32)) for a in (x, several)]
    with mx.stream(mx.cpu):
        x, several, slab = mx.array(host[0]), mx.array(host[1]), mx.array(blobs)
        both = reference.expert_ffn(x, slab, mx.array(slots), mx.array(weights), layout)
        expected = [both[:1], both, reference.expert_rows(several, slab, mx.array(rows), layout)]
        mx.eval(expected)
        return trust.judge(got, expected, trust.TOLERANCE[dtype])


def _from_json(text: bytes) -> Choice:
    data = json.loads(text)
    return Choice(**{**data, "tiling": gpu.Tiling(**data["tiling"])})
