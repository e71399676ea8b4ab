"""The experts' kernels against float64: a cover of all widths, group sizes and dtypes, in every formulation.

Not all combinations, because a GPU's kernels are compiled for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe import kernels
from mlx_flashmoe.kernels import gpu, mlx_experts, reference
from mlx_flashmoe.layout import BlobLayout
from mlx_flashmoe.selftest.expert_cases import (
    TOLERANCE,
    Experts,
    clamped_swiglu,
    layout_of,
    squared_relu,
)
from mlx_flashmoe.selftest.floats import DTYPES, SHORT, decode, encode, error, to_float64, to_mlx
from mlx_flashmoe.selftest.trial import Skip, Trial, Wrong, compared
from mlx_flashmoe.selftest.workplace import Workplace

# Inputs of which no group size makes whole spans, and that end inside a vector's last step on a CPU.
HIDDEN, INTERMEDIATE = 640, 384
RUNS, ORDER = (1, 9, 5, 17), (2, 0, 1, 2)  # rows of a prompt that follow each other, and their expert
REPEATS = 5


@dataclass(frozen=True)
class Format:
    """A blob layout, the dtype of activations, and how many tokens and experts are tried.

    ``activation``: between the products, for numpy's and MLX's arrays; None for SwiGLU.
    """

    name: str
    layout: BlobLayout
    dtype: str
    tokens: int = 2
    top_k: int = 3
    activation: Callable[..., Any] | None = None


def _format(bits: int, group_size: int, scales: str, dtype: str) -> Format:
    name = f"{bits} bits / {group_size}" if group_size else f"{bits} bits"
    layout = layout_of(HIDDEN, INTERMEDIATE, bits, group_size, scales)
    return Format(f"{name}, {SHORT[scales]}, x {SHORT[dtype]}", layout, dtype)


# Published models first; then every width, group size, dtype of scales and dtype of activations.
FORMATS = (
    _format(4, 64, "bfloat16", "bfloat16"),
    _format(4, 32, "float16", "float16"),
    _format(4, 128, "float32", "float32"),
    _format(2, 64, "bfloat16", "float32"),
    _format(3, 32, "float32", "bfloat16"),
    _format(6, 128, "float16", "bfloat16"),
    _format(8, 64, "bfloat16", "float16"),
    _format(8, 32, "float16", "float32"),
    _format(16, 0, "bfloat16", "bfloat16"),
    _format(16, 0, "float16", "float32"),
    _format(16, 0, "float32", "float16"),
    Format(
        "4, 3, 6 bits in a blob",
        layout_of(
            HIDDEN,
            INTERMEDIATE,
            (4, 3, 6),
            (64, 32, 128),
            {"gate": "float16", "up": "float32", "down": "bfloat16"},
        ),
        "float32",
    ),
    Format(
        "8, 16, 2 bits in a blob",
        layout_of(HIDDEN, INTERMEDIATE, (8, 16, 2), (32, 0, 64), "bfloat16"),
        "bfloat16",
    ),
)
# Experts of other libraries' models: two matrices, an activation of their own, linear biases.
KINDS = (
    FORMATS[0],
    Format(
        "two matrices",
        layout_of(HIDDEN, INTERMEDIATE, 4, 64, gated=False),
        "bfloat16",
        activation=squared_relu,
    ),
    Format(
        "clamped SwiGLU and biases",
        layout_of(HIDDEN, INTERMEDIATE, 4, 32, bias="bfloat16"),
        "bfloat16",
        activation=clamped_swiglu,
    ),
    Format(
        "float32 biases",
        layout_of(HIDDEN, INTERMEDIATE, 8, 64, "float32", bias="float32"),
        "float32",
    ),
    Format(
        "two unquantized matrices and biases",
        layout_of(HIDDEN, INTERMEDIATE, 16, 0, "float16", gated=False, bias="float16"),
        "float16",
        activation=squared_relu,
    ),
)
LARGE = Format("an expert of 7 MB", layout_of(4096, 1024, 4, 64), "bfloat16", tokens=1, top_k=10)


def expert_checks(place: Workplace) -> Iterator[Trial]:
    """Each kernel of the current device, and the operations that serve where it has none."""
    module = gpu.backend()
    if module is None:
        yield from _cpu_checks()
    else:
        for formulation in (*gpu.FORMULATIONS, gpu.MATRIX):
            for form in _formats_for(module, formulation):
                yield Trial(f"{formulation}: {form.name}", partial(_check, module, form, formulation))
    module = reference if module is None else mlx_experts
    yield Trial("MLX's operations", partial(_operations, module, FORMATS))
    yield Trial("every kind of expert", partial(_kinds, KINDS))
    yield Trial("products of dense weights", _dense_products)


def _cpu_checks() -> Iterator[Trial]:
    yield Trial("GPU kernels", partial(_skip, "MLX finds no GPU"))
    try:
        module = import_module("mlx_flashmoe.kernels.cpu")
    except ImportError as e:
        yield Trial("numba kernels", partial(_skip, f"{e}; MLX's operations serve"))
        return
    for form in (*FORMATS, LARGE):
        yield Trial(f"numba: {form.name}", partial(_check, module, form))


def _skip(why: str) -> str:
    raise Skip(why)


def _formats_for(module: ModuleType, formulation: str) -> tuple[Format, ...]:
    """All of them in the formulation that is the default; a few in each of the others."""
    if formulation == gpu.DEFAULT_FORMULATION:
        return (*FORMATS, LARGE)
    if formulation != gpu.MATRIX:
        return (FORMATS[0], *FORMATS[-2:])
    if not module.LANGUAGE.prefer_matrix:
        return ()
    every = (*FORMATS, LARGE)
    return tuple(f for f in every if gpu.supports_matrix(f.layout, DTYPES[f.dtype]))


def _check(module: ModuleType, form: Format, formulation: str | None = None) -> str:
    """expert_ffn and expert_rows of a module, the latter where it has the formulation."""
    # Outputs start as NaN, so that one that is not written shows.
    options = {} if formulation is None else {"formulation": formulation, "init_value": math.nan}
    parts = {"ffn": partial(ffn_error, module.expert_ffn, form, **options)}
    if formulation in (None, gpu.DEFAULT_FORMULATION, gpu.MATRIX):
        parts["rows"] = partial(rows_error, module.expert_rows, form, **options)
    return compared(parts, dict.fromkeys(parts, TOLERANCE[form.dtype]))


def _operations(module: ModuleType, forms: tuple[Format, ...]) -> str:
    """Checks the operations that take the place of custom kernels."""
    parts: dict[str, Callable[[], float]] = {}
    for form in forms:
        parts[f"ffn of {form.name}"] = partial(ffn_error, module.expert_ffn, form)
        parts[f"rows of {form.name}"] = partial(rows_error, module.expert_rows, form)
    tolerance = {name: TOLERANCE[form.dtype] for form in forms for name in parts if name.endswith(form.name)}
    compared(parts, tolerance)
    return f"{len(forms)} formats"


def _kinds(forms: tuple[Format, ...]) -> str:
    """Checks a result per expert, and rows, of every kind of expert, as the current device computes them."""
    parts: dict[str, Callable[[], float]] = {}
    for form in forms:
        parts[f"outputs of {form.name}"] = partial(outputs_error, kernels.expert_outputs, form)
        given = {} if form.activation is None else {"activation": form.activation}
        parts[f"rows of {form.name}"] = partial(rows_error, kernels.expert_rows, form, **given)
    compared(parts, {name: TOLERANCE[f.dtype] for f in forms for name in parts if name.endswith(f.name)})
    return f"{len(forms)} kinds"


def ffn_error(function: Callable[..., mx.array], form: Format, **options: Any) -> float:
    """The error of expert_ffn.

    Raises:
        Wrong: the same call gives other bits.
    """
    rng = np.random.default_rng(0)
    experts = Experts(form.layout, 3)
    x = encode(rng.standard_normal((form.tokens, form.layout.hidden_size)), form.dtype)
    which = rng.integers(0, 3, (form.tokens, form.top_k))
    weights = rng.uniform(0.05, 1, which.shape).astype(np.float32)
    slab, slots = _slab(experts), mx.array(which.astype(np.int32))

    def call() -> mx.array:
        return function(to_mlx(x), slab, slots, mx.array(weights), form.layout, **options)

    y = call()
    _same_bits(y, call)
    return error(to_float64(y), experts.ffn(decode(x), which, weights))


def outputs_error(function: Callable[..., mx.array], form: Format) -> float:
    """The error of expert_outputs.

    Raises:
        Wrong: the same call, or a token by itself, gives other bits.
    """
    rng = np.random.default_rng(0)
    experts = Experts(form.layout, 3, activation=form.activation)
    x = encode(rng.standard_normal((form.tokens, form.layout.hidden_size)), form.dtype)
    which = rng.integers(0, 3, (form.tokens, form.top_k))
    slab, slots = _slab(experts), mx.array(which.astype(np.int32))

    def call(tokens: slice = slice(None)) -> mx.array:
        return function(to_mlx(x)[tokens], slab, slots[tokens], form.layout, form.activation)

    y = call()
    _same_bits(y, call)
    last = slice(-1, None)
    _same_bits(y[last], partial(call, last), 1)
    return error(to_float64(y), experts.outputs(decode(x), which))


def rows_error(function: Callable[..., mx.array], form: Format, **options: Any) -> float:
    """The error of expert_rows on runs of several lengths.

    Raises:
        Wrong: the same call, or a run by itself, gives other bits.
    """
    rng = np.random.default_rng(1)
    experts = Experts(form.layout, 3, activation=form.activation)
    which = np.repeat(ORDER, RUNS)
    x = encode(rng.standard_normal((len(which), form.layout.hidden_size)), form.dtype)
    slab, slots = _slab(experts), mx.array(which.astype(np.int32))

    def call(rows: slice = slice(None)) -> mx.array:
        return function(to_mlx(x)[rows], slab, slots[rows], form.layout, **options)

    y = call()
    _same_bits(y, call)
    last = slice(-RUNS[-1], None)
    _same_bits(y[last], partial(call, last), 1)
    expected = np.empty(x.shape)
    for expert in range(3):
        expected[which == expert] = experts.one(expert, decode(x)[which == expert])
    return error(to_float64(y), expected)


def _slab(experts: Experts) -> mx.array:
    return mx.array(experts.blobs.view(np.uint32))


def _same_bits(y: mx.array, call: Callable[[], mx.array], times: int = REPEATS) -> None:
    for _ in range(times):
        # NaN, which differs from itself, is no matter of this.
        if not mx.array_equal(y, call(), equal_nan=True).item():
            raise Wrong("the same call gives other bits")


def _dense_products() -> str:
    """``kernels.quantized_matmul`` in the dtypes that models use: float32 on a CPU."""
    parts, allowed = {}, {}
    for form in FORMATS:
        gate = form.layout.projections["gate"]
        if gate.scales is not None:
            dtype = "float32" if mx.default_device() == mx.cpu else gate.scales.dtype
            parts[form.name] = partial(_dense_error, form, dtype)
            allowed[form.name] = TOLERANCE[dtype]
    compared(parts, allowed)
    return f"{len(parts)} formats"


def _dense_error(form: Format, dtype: str) -> float:
    gate = form.layout.projections["gate"]
    experts = Experts(form.layout, 1)
    slab = _slab(experts)
    x = encode(np.random.default_rng(2).standard_normal((9, gate.in_dims)), dtype)
    want = decode(x) @ experts.matrices[0]["gate"].T
    weight, *rest = (reference.component_view(slab, 0, part) for part in gate.components.values())
    scales, biases = (part.astype(DTYPES[dtype]) for part in rest)
    worst = 0.0
    for rows in (1, 9):
        y = kernels.quantized_matmul(to_mlx(x[:rows]), weight, scales, biases, gate.group_size, gate.bits)
        worst = max(worst, error(to_float64(y), want[:rows]))
    return worst
