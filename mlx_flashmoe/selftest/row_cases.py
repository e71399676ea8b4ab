"""Random inputs of the kernels that work on rows of activations, and their outputs in float64.

Rounded where the kernels round: where the operations that they take the place of do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import add_norm, delta_inputs, gated_norm, router
from mlx_flashmoe.selftest.floats import DTYPES, Array, encode, rounded, to_float64

# Allowed error as a share of the largest value: sums in another order may round differently in the last places.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
EPS = 1e-6


@dataclass
class Case:
    """A kernel's call and its result.

    Attributes:
        kernel: (language, *inputs) -> outputs, on a GPU.
        plain: (*inputs) -> the same outputs; the function that models call, which on a CPU has no kernel.
        inputs, expected: by name, in the order of arguments and outputs.
        dtype: of the activations.
        float32: inputs that are float32 whatever the activations are.
        ids: outputs that must be equal.
    """

    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: dict[str, Array]
    expected: dict[str, Array]
    dtype: str
    float32: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    def arrays(self) -> list[mx.array]:
        kinds = [mx.float32 if name in self.float32 else DTYPES[self.dtype] for name in self.inputs]
        return [mx.array(v.astype(np.float32)).astype(kind) for v, kind in zip(self.inputs.values(), kinds)]

    def encoded(self) -> dict[str, Array]:
        return {
            name: v.astype(np.float32) if name in self.float32 else encode(v, self.dtype)
            for name, v in self.inputs.items()
        }

    def named(self, outputs: Any) -> dict[str, Array]:
        """The outputs of ``kernel`` or ``plain`` by name, in float64."""
        each = [outputs] if isinstance(outputs, mx.array) else list(outputs)
        return dict(zip(self.expected, map(to_float64, each)))

    def error(self, outputs: dict[str, Array]) -> float:
        """The largest difference from what is expected, of an output's largest value; infinite for NaN, for other
        ids."""
        worst = 0.0
        for name, expected in self.expected.items():
            got = outputs[name].reshape(expected.shape).astype(np.float64)
            if name in self.ids:
                worst = max(worst, 0.0 if np.array_equal(got, expected) else float("inf"))
                continue
            difference = float(np.abs(got - expected).max() / np.abs(expected).max())
            worst = max(worst, difference if np.isfinite(difference) else float("inf"))
        return worst


def norm_case(dtype: str, shape: tuple[int, ...], add: bool) -> Case:
    rng = np.random.default_rng(0)
    x, y = (rounded(rng.standard_normal(shape), dtype) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, shape[-1])
    total = rounded(x + y, dtype) if add else x
    normed = total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + EPS) * np.float32(weight)
    if add:
        return Case(
            lambda language, x, y, weight: add_norm.launch(language, x, y, weight, EPS),
            lambda x, y, weight: add_norm.add_norm(x, y, weight, EPS),
            {"x": x, "y": y, "weight": weight},
            {"total": total, "normed": normed},
            dtype,
            ("weight",),
        )
    return Case(
        lambda language, x, weight: add_norm.launch(language, x, None, weight, EPS),
        lambda x, weight: add_norm.rms_norm(x, weight, EPS),
        {"x": x, "weight": weight},
        {"normed": normed},
        dtype,
        ("weight",),
    )


def gated_norm_case(dtype: str, rows: int, dims: int) -> Case:
    rng = np.random.default_rng(1)
    y, gate = rng.standard_normal((rows, dims)), rounded(rng.standard_normal((rows, dims)), dtype)
    weight = rounded(rng.uniform(0.5, 1.5, dims), dtype)
    r = rounded(y, dtype)
    normed = r / np.sqrt(np.mean(r**2, axis=-1, keepdims=True) + EPS)
    out = weight * normed * gate / (1 + np.exp(-gate))
    return Case(
        lambda language, y, gate, weight: gated_norm.launch(language, y, gate, weight, EPS),
        lambda y, gate, weight: gated_norm.gated_norm(y, gate, weight, EPS),
        {"y": y, "gate": gate, "weight": weight},
        {"out": out},
        dtype,
        ("y",),
    )


def router_case(dtype: str, rows: int, experts: int, active: int, normalize: bool) -> Case:
    rng = np.random.default_rng(2)
    # All different, in bfloat16 too, so that the choice is no matter of rounding.
    logits = np.stack([rng.permutation(experts) for _ in range(rows)]) / 16 - experts / 40
    ids = np.argsort(-logits, axis=-1)[:, :active]
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    weights = np.take_along_axis(p, ids, axis=-1)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)

    def plain(logits: mx.array) -> tuple[mx.array, mx.array]:
        """In the kernel's order, the most probable first."""
        ids, weights = router.route(logits, active, normalize)
        order = mx.argsort(-weights, axis=-1)
        return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(weights, order, axis=-1)

    return Case(
        lambda language, logits: router.launch(language, logits, active, normalize),
        plain,
        {"logits": logits},
        {"ids": ids, "weights": weights},
        dtype,
        ids=("ids",),
    )


def delta_case(dtype: str, batch: int, key_heads: int, value_heads: int, dims: int, past: int = 3) -> Case:
    rng = np.random.default_rng(3)
    channels = (2 * key_heads + value_heads) * dims

    def draw(*shape: int) -> Array:
        return rounded(rng.standard_normal(shape), dtype)

    def unit(x: Array) -> Array:
        return np.asarray(x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6))

    qkv, before, weight = draw(batch, 1, channels), draw(batch, past, channels), draw(channels, past + 1, 1)
    a, b = 6 * draw(batch, 1, value_heads), draw(batch, 1, value_heads)
    a_log, dt_bias = rng.uniform(-1, 1, value_heads), rng.uniform(-1, 1, value_heads)
    whole = np.concatenate([before, qkv], axis=1)
    mixed = rounded(np.einsum("btc,ct->bc", whole, weight[..., 0]), dtype)
    mixed = rounded(mixed * rounded(1 / (1 + np.exp(-mixed)), dtype), dtype)
    q, k, v = np.split(mixed.reshape(batch, 1, -1, dims), [key_heads, 2 * key_heads], axis=2)

    def named(*rest: mx.array) -> dict[str, Any]:
        return {**dict(zip(("before", "filter", "a_log", "dt_bias"), rest)), "key_heads": key_heads}

    return Case(
        lambda language, qkv, a, b, *rest: delta_inputs.launch(language, qkv, a, b, **named(*rest)),
        lambda qkv, a, b, *rest: delta_inputs.delta_inputs(qkv, a, b, **named(*rest), key_dim=dims),
        {"qkv": qkv, "a": a, "b": b, "before": before, "filter": weight, "a_log": a_log, "dt_bias": dt_bias},
        {
            "q": unit(q) * dims**-0.5,
            "k": unit(k),
            "v": v,
            "decay": np.exp(-np.exp(np.float32(a_log)) * np.logaddexp(a + np.float32(dt_bias), 0)),
            "beta": rounded(1 / (1 + np.exp(-b)), dtype),
            "after": whole[:, 1:],
        },
        dtype,
        ("a_log", "dt_bias"),
    )
