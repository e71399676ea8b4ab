"""The kernels that work on rows of activations against float64; on a CPU the operations that it has instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import gated_delta, gpu
from mlx_flashmoe.selftest import delta_rule
from mlx_flashmoe.selftest.floats import DTYPES, SHORT
from mlx_flashmoe.selftest.row_cases import (
    TOLERANCE,
    Case,
    delta_case,
    gated_norm_case,
    norm_case,
    router_case,
)
from mlx_flashmoe.selftest.trial import Trial, compared
from mlx_flashmoe.selftest.workplace import Workplace

# Of a dtype's activations, in shapes of published models and in odd ones.
CASES: Mapping[str, tuple[Callable[[str], Case], ...]] = {
    "norm": (lambda d: norm_case(d, (3, 4096), False), lambda d: norm_case(d, (2, 3, 200), False)),
    "add and norm": (lambda d: norm_case(d, (1, 4096), True), lambda d: norm_case(d, (2, 1100), True)),
    "gated norm": (lambda d: gated_norm_case(d, 64, 128), lambda d: gated_norm_case(d, 2, 50)),
    "router": (
        lambda d: router_case(d, 2, 512 if d != "bfloat16" else 256, 10, True),
        lambda d: router_case(d, 3, 40, 1, False),
    ),
    "inputs of the delta rule": (lambda d: delta_case(d, 2, 2, 4, 128), lambda d: delta_case(d, 1, 1, 3, 32)),
}


def row_checks(place: Workplace) -> Iterator[Trial]:
    for name, cases in CASES.items():
        yield Trial(name, partial(_check, cases))
    for name, (function, shape) in _delta_rules().items():
        yield Trial(f"delta rule, {name}", partial(_delta_rule, function, shape))


def _check(cases: tuple[Callable[[str], Case], ...]) -> str:
    parts = {SHORT[dtype]: partial(_error, cases, dtype) for dtype in DTYPES}
    return compared(parts, {SHORT[dtype]: allowed for dtype, allowed in TOLERANCE.items()})


def _error(cases: tuple[Callable[[str], Case], ...], dtype: str) -> float:
    language = gpu.current()
    worst = 0.0
    for case in (make(dtype) for make in cases):
        inputs = case.arrays()
        outputs = case.plain(*inputs) if language is None else case.kernel(language, *inputs)
        worst = max(worst, case.error(case.named(outputs)))
    return worst


Shape = tuple[int, int, int, int]  # key heads, value heads, dims of a key, dims of a value


def _delta_rules() -> dict[str, tuple[Callable[..., tuple[mx.array, mx.array]], Shape]]:
    """Every function that computes it on the current device, and a shape that it serves."""
    published, small = (16, 32, 128, 128), (2, 6, 64, 8)
    rules: dict[str, tuple[Callable[..., tuple[mx.array, mx.array]], Shape]] = {
        "published shape": (gated_delta.gated_delta_update, published),
        "other shape": (gated_delta.gated_delta_update, small),
        "MLX's, in segments": (gated_delta._in_segments, small),
    }
    if mx.default_device() == mx.gpu and mx.cuda.is_available():
        rules["CUDA kernel"] = (gated_delta._cuda, published)
    return rules


def _delta_rule(function: Callable[..., tuple[mx.array, mx.array]], shape: Shape) -> str:
    """A prompt, and then a token."""
    heads, values, key_dims, value_dims = shape
    parts, allowed = {}, {}
    for name, tokens in (("prompt", 2 * gated_delta.SEGMENT + 5), ("token", 1)):
        arrays = delta_rule.random_inputs(1, tokens, heads, values, key_dims, value_dims)

        def compute(arrays: list[np.ndarray] = arrays) -> float:
            y, state = function(*map(mx.array, arrays))
            return delta_rule.error((np.asarray(y), np.asarray(state)), delta_rule.definition(*arrays))

        parts[name], allowed[name] = compute, delta_rule.TOLERANCE
    return compared(parts, allowed)
