"""Modules that hold all experts of a layer, found in a library's tree by their parts and by their results.

``SwitchGLU`` and ``SwitchMLP`` have many relatives. A module counts as one of them if it has their matrices, and if it
computes on random weights what ``formula`` says. Its name does not matter. It may also have modules that it does not
use itself (a norm, for those who call it), and factors, one number for each expert, of which it makes nothing where
all are 1: a checkpoint that has no use for them says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_flashmoe.errors import FormatError

Activation = Callable[..., mx.array]
# The modules' matrices by name -> gate (None: of two matrices), up and down; gate and up may be rows of one.
GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
FUSED = {"gate_up_proj": "gate_up", "down_proj": "down"}
PLAIN = {"fc1": "up", "fc2": "down"}
TOLERANCE = 1e-3  # of the largest output, in float32


@dataclass(frozen=True)
class ExpertModule:
    """A layer's experts in a library's tree.

    Attributes:
        path: of the module in the tree.
        matrices: child's name -> the projection it is: "gate", "up", "down", or "gate_up" (gate's rows first).
        activation: None for SwiGLU; else (up, gate) -> h, or (h) -> h where there is no gate.
        kept: names of modules that are not used by the experts, and stay.
        factors: names of parameters [E] that have to be 1.
        hidden_size, intermediate_size, count: D, I and E.
    """

    path: str
    module: nn.Module
    matrices: dict[str, str]
    activation: Activation | None
    kept: list[str]
    factors: list[str]
    hidden_size: int
    intermediate_size: int
    count: int

    @property
    def gated(self) -> bool:
        return self.matrices != PLAIN


def find(model: nn.Module) -> list[ExpertModule]:
    """All of a tree, in its order.

    Raises:
        FormatError: a module holds experts in a way that cannot be streamed.
    """
    found: list[ExpertModule] = []
    for path, module in sorted(model.named_modules(), key=lambda item: _place(item[0])):
        if any(path.startswith(f"{outer.path}.") for outer in found):
            continue
        matrices = {name: child for name, child in module.children().items() if _is_stack(child)}
        if len(matrices) > 1:  # a stack alone is a projection in groups: every token uses all of it
            found.append(_described(path, module, matrices))
    return found


def _has_parameters(child: Any) -> bool:
    return (
        bool(tree_flatten(child.parameters())) if isinstance(child, nn.Module) else bool(tree_flatten(child))
    )


def _place(path: str) -> tuple[Any, ...]:
    """Sorts layers by number."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split("."))


def _is_stack(child: Any) -> bool:
    """Tells whether a module is one matrix for each of a layer's experts: a SwitchLinear, quantized or not."""
    return isinstance(child, nn.Module) and type(child).__name__ in ("SwitchLinear", "QuantizedSwitchLinear")


def _described(path: str, module: nn.Module, matrices: dict[str, nn.Module]) -> ExpertModule:
    what = f"{path} ({type(module).__module__}.{type(module).__name__})"
    kinds: tuple[dict[str, str], ...] = (GATED, FUSED, PLAIN)
    roles = next((roles for roles in kinds if roles.keys() == matrices.keys()), None)
    if roles is None:
        raise FormatError(
            f"{what}: its experts have the matrices {', '.join(sorted(matrices))}; experts of "
            f"{', '.join(GATED)} or of {', '.join(FUSED)} or of {', '.join(PLAIN)} can be streamed"
        )
    activation = getattr(module, "activation", None)
    if not callable(activation):
        raise FormatError(f"{what}: its experts have no activation of their own, and cannot be streamed")
    up = matrices[next(name for name, role in roles.items() if role in ("up", "gate_up"))]
    rows, count = up.output_dims, up.num_experts
    kept = [
        name for name, child in module.children().items() if name not in matrices and _has_parameters(child)
    ]
    factors = [name for name, value in module.items() if isinstance(value, mx.array)]
    if any(module[name].shape != (count,) for name in factors):
        raise FormatError(
            f"{what}: its experts have parameters that cannot be streamed: {', '.join(factors)}"
        )
    described = ExpertModule(
        path,
        module,
        roles,
        activation,
        kept,
        factors,
        hidden_size=up.input_dims,
        intermediate_size=rows // 2 if roles == FUSED else rows,
        count=count,
    )
    _check(what, described)
    swiglu = described.gated and _is_swiglu(activation)
    return ExpertModule(**{**vars(described), "activation": None if swiglu else activation})


def _check(what: str, experts: ExpertModule) -> None:
    """Raises FormatError unless the module computes act(x W_gate, x W_up) W_down with its own weights.

    Two small experts with random weights stand for all.
    """
    module = experts.module
    rng = np.random.default_rng(0)
    hidden, inner = 32, 32
    outputs = {"gate": inner, "up": inner, "gate_up": 2 * inner, "down": hidden}
    small = copy.copy(module)
    weights: dict[str, tuple[mx.array, mx.array | None]] = {}
    for name, role in experts.matrices.items():
        rows, columns = outputs[role], inner if role == "down" else hidden
        weight = mx.array((rng.standard_normal((2, rows, columns)) / columns**0.5).astype(np.float32))
        bias = mx.array(rng.standard_normal((2, rows)).astype(np.float32)) if "bias" in module[name] else None
        weights[role] = weight, bias
        small[name] = _Stack(weight, bias)
    for name in experts.kept:
        small[name] = nn.Module()  # so that its use fails
    for name in experts.factors:
        small[name] = mx.ones(2)
    x = mx.array(rng.standard_normal((3, 1, hidden)).astype(np.float32))
    ids = [[0, 1], [1, 0], [1, 1]]
    try:
        got = small(x, mx.array(ids)[:, None])
        expected = mx.stack(
            [
                mx.stack([formula(x[t, 0], e, weights, experts.activation) for e in row])
                for t, row in enumerate(ids)
            ]
        )[:, None]
        off = mx.abs(got - expected).max() / mx.abs(expected).max()
        right = got.shape == expected.shape and float(off) <= TOLERANCE
    except Exception as e:  # whatever a library's class wants to be called with, this is not it
        raise FormatError(f"{what}: its experts cannot be streamed: {type(e).__name__}: {e}") from None
    if not right:
        raise FormatError(
            f"{what}: its experts compute something else than act(gate(x), up(x)) times down; they cannot be streamed"
        )


def formula(
    x: mx.array,
    expert: int,
    weights: dict[str, tuple[mx.array, mx.array | None]],
    activation: Activation | None,
) -> mx.array:
    """One expert's output for one token, spelled out: x [D] -> [D]."""

    def product(role: str, x: mx.array) -> mx.array:
        weight, bias = weights[role]
        y = weight[expert] @ x
        return y if bias is None else y + bias[expert]

    assert activation is not None
    if "gate_up" in weights:
        gate, up = mx.split(product("gate_up", x), 2)
        return product("down", activation(up, gate))
    up = product("up", x)
    if "gate" in weights:
        return product("down", activation(up, product("gate", x)))
    return product("down", activation(up))


class _Stack(nn.Module):
    """SwitchLinear with given weights: it is called as the libraries call theirs."""

    def __init__(self, weight: mx.array, bias: mx.array | None):
        super().__init__()
        self.weight = weight
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = x @ self.weight[indices].swapaxes(-1, -2)
        return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y


def _is_swiglu(activation: Activation) -> bool:
    """Tells whether an activation is silu(gate) * up, on values on both sides of any clamp."""
    rng = np.random.default_rng(1)
    up, gate = (mx.array((50 * rng.standard_normal((4, 64))).astype(np.float32)) for _ in range(2))
    expected = gate * mx.sigmoid(gate) * up
    got = activation(up, gate)
    return bool(mx.allclose(got, expected, rtol=1e-5, atol=1e-5).item())


def modules(model: nn.Module, found: list[ExpertModule]) -> Iterator[tuple[str, nn.Module]]:
    """The tree's modules with their paths, without those that the experts ``found`` in it are made of."""
    for path, module in model.named_modules():
        if not any(_is_part(path, experts) for experts in found):
            yield path, module


def _is_part(path: str, experts: ExpertModule) -> bool:
    if path == experts.path:
        return True
    inside = path.startswith(f"{experts.path}.")
    return inside and path[len(experts.path) + 1 :].partition(".")[0] not in experts.kept
