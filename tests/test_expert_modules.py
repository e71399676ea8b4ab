"""Modules of a library that hold experts, and their caches: recognized by what they are, not by their names."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.external import experts
from mlx_flashmoe.external.model import layer_numbers
from mlx_flashmoe.external.probe import Growth, probe

D, I, E = 16, 24, 4


class SwitchLinear(nn.Module):
    """One matrix for each expert, as the libraries have it."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = mx.random.normal((E, outputs, inputs))
        if bias:
            self.bias = mx.random.normal((E, outputs))

    @property
    def input_dims(self) -> int:
        return self.weight.shape[2]

    @property
    def output_dims(self) -> int:
        return self.weight.shape[1]

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = x @ self.weight[indices].swapaxes(-1, -2)
        return y + self.bias[indices][..., None, :] if "bias" in self else y


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


class Gated(nn.Module):
    def __init__(self, activation: Any = lambda up, gate: silu(gate) * up, bias: bool = False):
        super().__init__()
        self.gate_proj, self.up_proj = SwitchLinear(D, I, bias), SwitchLinear(D, I, bias)
        self.down_proj = SwitchLinear(I, D, bias)
        self.activation = activation

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        x = x[..., None, None, :]
        h = self.activation(self.up_proj(x, indices), self.gate_proj(x, indices))
        return self.down_proj(h, indices).squeeze(-2)


class Fused(nn.Module):
    def __init__(self, gate_first: bool = True):
        super().__init__()
        self.gate_up_proj, self.down_proj = SwitchLinear(D, 2 * I), SwitchLinear(I, D)
        self.activation = lambda up, gate: silu(gate) * up
        self._gate_first = gate_first

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        first, second = mx.split(self.gate_up_proj(x[..., None, None, :], indices), 2, axis=-1)
        gate, up = (first, second) if self._gate_first else (second, first)
        return self.down_proj(self.activation(up, gate), indices).squeeze(-2)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = SwitchLinear(D, I), SwitchLinear(I, D)
        self.activation = lambda h: mx.maximum(h, 0) ** 2

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        h = self.activation(self.fc1(x[..., None, None, :], indices))
        return self.fc2(h, indices).squeeze(-2)


class Scaled(Gated):
    """Has a factor of its own for each expert, which is nothing where it is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = mx.full((E,), 2.0)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self.factor[indices][..., None] * super().__call__(x, indices)


class Shifted(Gated):
    """Has a parameter of its own that nobody would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = mx.zeros((D,))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self.shift + super().__call__(x, indices)


class Doubled(Gated):
    """Has the matrices of the others, and computes something else."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return 2 * super().__call__(x, indices)


class Weighted(Gated):
    """Wants more than activations and ids."""

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:  # type: ignore[override]
        return (super().__call__(x, indices) * weights[..., None]).sum(-2)


class Layer(nn.Module):
    def __init__(self, moe: nn.Module):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = moe

    def __call__(self, x: mx.array) -> mx.array:
        ids = mx.argpartition(-self.gate(x), kth=1, axis=-1)[..., :2]
        return x + self.experts(x, ids).sum(axis=-2)


class Tree(nn.Module):
    def __init__(self, *moes: nn.Module, order: list[int] | None = None):
        super().__init__()
        self.embedding = nn.Embedding(32, D)
        self.layers = [Layer(moe) for moe in moes]
        self._order = order if order is not None else list(range(len(moes)))

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        x = self.embedding(tokens)
        for i in self._order:
            x = self.layers[i](x)
        return self.embedding.as_linear(x)

    def make_cache(self) -> list[Any]:
        return []


def run(model: nn.Module, tokens: mx.array) -> mx.array:
    return model(tokens)


@pytest.mark.parametrize(
    ("moe", "gated", "swiglu"),
    [
        (Gated(), True, True),
        (Gated(bias=True), True, True),
        (Gated(lambda up, gate: nn.gelu(gate) * up), True, False),
        (Gated(lambda up, gate: silu(mx.minimum(gate, 7)) * (up + 1), bias=True), True, False),
        (Gated(lambda up, gate: silu(mx.minimum(gate, 60)) * up), True, False),
        (Fused(), True, True),
        (Plain(), False, False),
    ],
)
def test_experts_of_every_kind_are_found(moe: nn.Module, gated: bool, swiglu: bool) -> None:
    (found,) = experts.find(Tree(moe))
    assert (found.path, found.module) == ("layers.0.experts", moe)
    assert (found.hidden_size, found.intermediate_size, found.count) == (D, I, E)
    assert (found.gated, found.activation is None) == (gated, swiglu)


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        (Shifted(), "have parameters that cannot be streamed: shift"),
        (Doubled(), "compute something else"),
        (Fused(gate_first=False), "compute something else"),
        (Weighted(), "cannot be streamed: TypeError"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(moe: nn.Module, says: str) -> None:
    with pytest.raises(
        FormatError, match=rf"layers\.0\.experts \(.*{type(moe).__name__}\): its experts {says}"
    ):
        experts.find(Tree(moe))


def test_factors_of_experts_are_named_for_those_who_have_to_see_that_they_are_1() -> None:
    (found,) = experts.find(Tree(Scaled()))
    assert found.factors == ["factor"]


def test_layers_come_in_the_order_of_their_numbers() -> None:
    tree = Tree(*(Gated() for _ in range(12)))
    assert [one.path for one in experts.find(tree)] == [f"layers.{i}.experts" for i in range(12)]


@pytest.mark.parametrize(
    ("paths", "numbers"),
    [
        (["model.layers.3.mlp", "model.layers.7.mlp"], [3, 7]),
        (["a.layers.3.mlp", "b.layers.3.mlp"], [0, 1]),
        (["layers.0.blocks.1", "layers.0.blocks.2"], [0, 1]),
        (["encoder", "decoder"], [0, 1]),
    ],
)
def test_every_layer_of_experts_has_a_number_of_its_own(paths: list[str], numbers: list[int]) -> None:
    assert layer_numbers(paths) == numbers


def test_the_graph_tells_what_a_model_does_with_its_experts() -> None:
    tree = Tree(Gated(), Plain())
    probed = probe(tree, experts.find(tree), lambda tokens, caches: run(tree, tokens))
    assert (probed.top_k, probed.vocabulary) == (2, 32)


def test_experts_that_no_text_goes_through_are_not_among_those_that_are_used() -> None:
    tree = Tree(Gated(), Gated(), Gated(), order=[0, 2])
    probed = probe(tree, experts.find(tree), lambda tokens, caches: run(tree, tokens))
    assert probed.used == ["layers.0.experts", "layers.2.experts"]


@pytest.mark.parametrize("order", [[1, 0], [0, 0, 1], [], [0, 1, 0]])
def test_layers_that_are_not_called_once_each_in_order_are_refused(order: list[int]) -> None:
    tree = Tree(Gated(), Gated(), order=order)
    with pytest.raises(FormatError, match="not called once each, in order"):
        probe(tree, experts.find(tree), lambda tokens, caches: run(tree, tokens))


def test_what_a_cache_will_hold_is_known_from_two_lengths() -> None:
    growing, windowed, recurrent = Growth(1000, 4.0, None), Growth(1000, 4.0, 512), Growth(700, 0.0, None)
    tokens = np.array([1, 256, 257, 512, 513, 100_000])
    assert [growing.nbytes(int(n)) for n in tokens[:5]] == [1000, 1000, 2024, 2024, 3048]
    assert [windowed.nbytes(int(n)) for n in tokens] == [1000, 1000, 2024, 2024, 2024, 2024]
    assert {recurrent.nbytes(int(n)) for n in tokens} == {700}
