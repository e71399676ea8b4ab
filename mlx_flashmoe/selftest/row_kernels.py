"""The kernels that work on rows of activations against float64; on a CPU the operations that it has instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

# The cases of a dtype: shapes of published models, and odd ones.
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
    for name, (function, shapes) in _delta_rules().items():
        yield Trial(f"delta rule, {name}", partial(_delta_rule, function, shapes))


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


Rule = Callable[..., Sequence[mx.array]]  # of y, and the state after
Shape = tuple[int, int, int, int]  # key heads, value heads, dims of a key, dims of a value
PUBLISHED: dict[str, Shape] = {"80B": (16, 32, 128, 128), "397B": (16, 64, 128, 128)}
SMALL: dict[str, Shape] = {"small": (2, 6, 64, 8)}


def _delta_rules() -> dict[str, tuple[Rule, dict[str, Shape]]]:
    """Every function that computes it on the current device, and shapes that it serves."""
    rules: dict[str, tuple[Rule, dict[str, Shape]]] = {"in segments": (gated_delta._in_segments, SMALL)}
    if mx.default_device() != mx.gpu:
        if (eager := gated_delta._on_cpu()) is not None:
            rules["numba kernel"] = eager, {**PUBLISHED, **SMALL}
    elif mx.metal.is_available():
        rules["MLX's kernel"] = mx.fast.gated_delta_update, PUBLISHED
    else:
        rules["CUDA kernel"] = gated_delta._cuda, {**PUBLISHED, **SMALL}
    return rules


def _delta_rule(function: Rule, shapes: dict[str, Shape]) -> str:
    """A prompt, and a token, of each shape."""
    parts = {name: partial(_delta_error, function, shape) for name, shape in shapes.items()}
    return compared(parts, dict.fromkeys(parts, delta_rule.TOLERANCE))


def _delta_error(function: Rule, shape: Shape) -> float:
    worst = 0.0
    for tokens in (2 * gated_delta.SEGMENT + 5, 1):
        arrays = delta_rule.random_inputs(1, tokens, *shape)
        y, state = function(*map(mx.array, arrays))
        want = delta_rule.definition(*arrays)
        worst = max(worst, delta_rule.error((np.asarray(y), np.asarray(state)), want))
    return worst
