"""The GPU kernels that work on rows of activations, as Metal in the emulation and, where there is one, on CUDA.

Compared with the operations they take the place of, in float64 where nothing is rounded in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from expert_cases import decode, encode
from metal_emulator import COMPILER, Job, Launch, compile_kernels, record, run

from mlx_flashmoe.kernels import add_norm, cuda, delta_inputs, gated_norm, metal, router

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# Of the largest value: a few units in the last place, for sums in another order may round the other way.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
EPS = 1e-6


@dataclass
class Case:
    """A kernel's call: (language, *inputs) -> outputs, its inputs by name, and what is expected by name."""

    call: Callable[..., Any]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    dtype: str
    float32: tuple[str, ...] = ()  # inputs that are float32 whatever the activations are
    ids: tuple[str, ...] = ()  # outputs that must be equal

    def arrays(self) -> list[mx.array]:
        kinds = [mx.float32 if name in self.float32 else DTYPES[self.dtype] for name in self.inputs]
        return [mx.array(v.astype(np.float32)).astype(kind) for v, kind in zip(self.inputs.values(), kinds)]

    def encoded(self) -> dict[str, np.ndarray]:
        return {
            name: v.astype(np.float32) if name in self.float32 else encode(v, self.dtype)
            for name, v in self.inputs.items()
        }


def rounded(v: np.ndarray, dtype: str) -> np.ndarray:
    return decode(encode(v, dtype))


def norm_case(dtype: str, shape: tuple[int, ...], add: bool) -> Case:
    rng = np.random.default_rng(0)
    x, y = (rounded(rng.standard_normal(shape), dtype) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, shape[-1])
    total = rounded(x + y, dtype) if add else x
    normed = total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + EPS) * np.float32(weight)
    if add:
        call = lambda language, x, y, weight: add_norm.launch(language, x, y, weight, EPS)  # noqa: E731
        return Case(
            call, {"x": x, "y": y, "weight": weight}, {"total": total, "normed": normed}, dtype, ("weight",)
        )
    call = lambda language, x, weight: add_norm.launch(language, x, None, weight, EPS)  # noqa: E731
    return Case(call, {"x": x, "weight": weight}, {"normed": normed}, dtype, ("weight",))


def gated_norm_case(dtype: str, rows: int, dims: int) -> Case:
    rng = np.random.default_rng(1)
    y, gate = rng.standard_normal((rows, dims)), rounded(rng.standard_normal((rows, dims)), dtype)
    weight = rounded(rng.uniform(0.5, 1.5, dims), dtype)
    r = rounded(y, dtype)
    normed = r / np.sqrt(np.mean(r**2, axis=-1, keepdims=True) + EPS)
    out = weight * normed * gate / (1 + np.exp(-gate))
    call = lambda language, y, gate, weight: gated_norm.launch(language, y, gate, weight, EPS)  # noqa: E731
    return Case(call, {"y": y, "gate": gate, "weight": weight}, {"out": out}, dtype, ("y",))


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
    call = lambda language, logits: router.launch(language, logits, active, normalize)  # noqa: E731
    return Case(call, {"logits": logits}, {"ids": ids, "weights": weights}, dtype, ids=("ids",))


def delta_case(dtype: str, batch: int, key_heads: int, value_heads: int, dims: int, past: int = 3) -> Case:
    rng = np.random.default_rng(3)
    channels = (2 * key_heads + value_heads) * dims

    def draw(*shape: int) -> np.ndarray:
        return rounded(rng.standard_normal(shape), dtype)

    qkv, before, weight = draw(batch, 1, channels), draw(batch, past, channels), draw(channels, past + 1, 1)
    a, b = 6 * draw(batch, 1, value_heads), draw(batch, 1, value_heads)
    a_log, dt_bias = rng.uniform(-1, 1, value_heads), rng.uniform(-1, 1, value_heads)
    whole = np.concatenate([before, qkv], axis=1)
    mixed = rounded(np.einsum("btc,ct->bc", whole, weight[..., 0]), dtype)
    mixed = rounded(mixed * rounded(1 / (1 + np.exp(-mixed)), dtype), dtype)
    q, k, v = np.split(mixed.reshape(batch, 1, -1, dims), [key_heads, 2 * key_heads], axis=2)
    unit = lambda x: x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    call = lambda language, qkv, before, weight, a, b, a_log, dt_bias: delta_inputs.launch(  # noqa: E731
        language,
        qkv,
        a,
        b,
        before=before,
        filter=weight,
        a_log=a_log,
        dt_bias=dt_bias,
        key_heads=key_heads,
    )
    return Case(
        call,
        {"qkv": qkv, "before": before, "filter": weight, "a": a, "b": b, "a_log": a_log, "dt_bias": dt_bias},
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


CASES = {
    f"{name}-{dtype}": make(dtype)
    for dtype in DTYPES
    for name, make in {
        "norm": lambda d: norm_case(d, (3, 4096), False),
        "norm of odd rows": lambda d: norm_case(d, (2, 3, 200), False),
        "norm of short rows": lambda d: norm_case(d, (5, 7), False),
        "add and norm": lambda d: norm_case(d, (2, 1100), True),
        "add and norm of wide rows": lambda d: norm_case(d, (1, 9000), True),
        "gated norm": lambda d: gated_norm_case(d, 5, 128),
        "gated norm of odd rows": lambda d: gated_norm_case(d, 2, 50),
        "router": lambda d: router_case(d, 2, 512 if d != "bfloat16" else 256, 10, True),
        "router of few": lambda d: router_case(d, 3, 40, 1, False),
        "delta inputs": lambda d: delta_case(d, 2, 2, 4, 128),
        "delta inputs of narrow heads": lambda d: delta_case(d, 1, 1, 3, 32),
    }.items()
}


def check(case: Case, outputs: dict[str, np.ndarray]) -> None:
    for name, expected in case.expected.items():
        got = outputs[name].reshape(expected.shape).astype(np.float64)
        if name in case.ids:
            np.testing.assert_array_equal(got, expected, err_msg=name)
            continue
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE[case.dtype], (name, error)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Every case's outputs in the emulation."""
    launches: dict[str, list[Launch]] = {
        name: record(metal.LANGUAGE, case.call, *case.arrays()) for name, case in CASES.items()
    }
    every = [launch for group in launches.values() for launch in group]
    libraries = compile_kernels(every, tmp_path_factory.mktemp("rows"))
    jobs = [Job(launches[name], case.encoded()) for name, case in CASES.items()]
    return dict(zip(CASES, run(libraries, jobs)))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) to emulate Metal with")
@pytest.mark.parametrize("name", CASES)
def test_metal(name: str, emulated: dict[str, dict[str, np.ndarray]]) -> None:
    outputs = {k: decode(v) if v.dtype != np.int32 else v for k, v in emulated[name].items()}
    check(CASES[name], outputs)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX finds no CUDA GPU")
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str) -> None:
    case = CASES[name]
    outputs = case.call(cuda.LANGUAGE, *case.arrays())
    outputs = [outputs] if isinstance(outputs, mx.array) else list(outputs)
    names = case.expected
    check(case, {n: np.array(v.astype(mx.float32)) for n, v in zip(names, outputs)})


def test_the_router_always_names_experts() -> None:
    """Whatever the logits are: an id out of range would make a kernel read outside the slab."""
    logits = mx.array([[float("nan")] * 4, [float("inf"), float("nan"), -float("inf"), 0.0]])
    ids, _ = router.route(logits, 3, True)
    for row in np.array(ids).tolist():
        assert len(set(row)) == 3 and set(row) <= {0, 1, 2, 3}
