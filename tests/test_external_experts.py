"""Experts are found in a library's tree by what they are made of and what they compute, not by their names."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.external import experts as expert_modules
from mlx_flashmoe.external.probe import replace

E, D, H = 4, 32, 64


class SwitchLinear(nn.Module):
    """As the libraries have it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.random.normal((E, outputs, inputs))

    input_dims = property(lambda self: self.weight.shape[2])
    output_dims = property(lambda self: self.weight.shape[1])
    num_experts = property(lambda self: self.weight.shape[0])

    def __call__(self, x: mx.array, ids: mx.array, sorted_indices: bool = False) -> mx.array:
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=ids)


class Experts(nn.Module):
    """Everything that is right; subclasses do one thing otherwise."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = SwitchLinear(D, H), SwitchLinear(D, H)
        self.down_proj = SwitchLinear(H, D)
        self.activation = lambda up, gate: nn.silu(gate) * up

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        x = mx.expand_dims(x, (-2, -3))
        h = self.activation(self.up_proj(x, ids), self.gate_proj(x, ids))
        return self.down_proj(h, ids).squeeze(-2)


class ANormForItsCaller(Experts):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(D)


class ANormOfItsOwn(ANormForItsCaller):
    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        return self.norm(super().__call__(x, ids))


class Factors(Experts):
    def __init__(self):
        super().__init__()
        self.factor = mx.ones(E)

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        return super().__call__(x, ids) * self.factor[ids][..., None]


class Terms(Factors):
    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        return super().__call__(x, ids) + self.factor[ids][..., None]


class Swapped(Experts):
    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        return super().__call__(x, ids[..., ::-1])


class Weighted(Experts):
    def __call__(self, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        return super().__call__(x, ids) * weights[..., None]


class Another(Experts):
    def __init__(self):
        super().__init__()
        self.lora = SwitchLinear(D, H)


class Layer(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.groups = SwitchLinear(D, D)  # of attention heads: every token uses all of them
        self.experts = experts


class Model(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.layers = [Layer(experts)]


@pytest.mark.parametrize(
    ("kind", "kept", "factors"),
    [(Experts, [], []), (ANormForItsCaller, ["norm"], []), (Factors, [], ["factor"])],
)
def test_what_can_be_streamed(kind: type[Experts], kept: list[str], factors: list[str]) -> None:
    model = Model(kind())
    (found,) = expert_modules.find(model)
    assert (found.path, found.count, found.hidden_size, found.intermediate_size) == (
        "layers.0.experts",
        E,
        D,
        H,
    )
    assert found.activation is None  # SwiGLU, whatever it is called
    assert (found.kept, found.factors) == (kept, factors)

    dense = {path for path, _ in expert_modules.modules(model, expert_modules.find(model))}
    assert "layers.0.groups" in dense
    assert ("layers.0.experts.norm" in dense) == bool(kept)
    assert not {f"layers.0.experts.{name}" for name in found.matrices} & dense

    stand_in = nn.Module()
    replace(model, found, stand_in)
    assert model.layers[0].experts is stand_in
    assert all(getattr(stand_in, name) is getattr(found.module, name) for name in kept)
    assert stand_in.children().keys() == {*kept, *found.matrices}


@pytest.mark.parametrize("kind", [ANormOfItsOwn, Terms, Swapped, Weighted, Another])
def test_what_cannot_is_refused_by_name(kind: type[Experts]) -> None:
    with pytest.raises(FormatError, match=rf"layers\.0\.experts \(.*{kind.__name__}\)"):
        expert_modules.find(Model(kind()))
