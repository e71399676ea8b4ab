"""Matrices laid together give what each gives by itself, bit for bit on the CPU, and take no more memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_flashmoe.models import together
from mlx_flashmoe.models.quantized import quantize
from mlx_flashmoe.models.together import Together, join

DIMS = 128


class Layer(nn.Module):
    def __init__(self, rows: list[int], biased: int | None = None):
        super().__init__()
        self.inner = nn.Module()
        for i, n in enumerate(rows):
            setattr(self.inner, f"m{i}", nn.Linear(DIMS, n, bias=i == biased))
        self._together = Together(self, *(f"inner.m{i}" for i in range(len(rows))))


def made(rows: list[int], bits: list[int], biased: int | None = None) -> Layer:
    """``bits`` of 16 leave a matrix as it is."""
    layer = Layer(rows, biased)
    quantize(layer, {f"inner.m{i}": {"bits": b, "group_size": 64} for i, b in enumerate(bits) if b < 16})
    mx.eval(layer.parameters())
    return layer


@settings(max_examples=25, deadline=None)
@given(
    matrices=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([4, 8, 16])), min_size=1, max_size=5),
    biased=st.none() | st.integers(0, 4),
    tokens=st.integers(1, 3),
)
def test_together_is_as_alone(matrices: list[tuple[int, int]], biased: int | None, tokens: int) -> None:
    rows, bits = map(list, zip(*matrices, strict=True))
    layer = made(rows, bits, biased)
    x = mx.random.normal((1, tokens, DIMS))
    want = [np.array(layer.inner[f"m{i}"](x)) for i in range(len(rows))]
    before = {name: np.array(a) for name, a in tree_flatten(layer.parameters())}
    join(layer)
    for got, expected in zip(layer._together(x), want, strict=True):
        if mx.default_device() == mx.cpu:
            assert np.array_equal(np.array(got), expected)
        else:
            assert np.allclose(np.array(got), expected, rtol=1e-4, atol=1e-5)
    after = dict(tree_flatten(layer.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(np.array(after[name]), a) for name, a in before.items())


def test_one_token_goes_through_one_product_of_those_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made([16, 1, 24, 8], [8, 8, 4, 4])
    join(layer)
    calls = []

    def counted(x: mx.array, weight: mx.array, *rest: object) -> mx.array:
        calls.append(weight.shape[0])
        return product(x, weight, *rest)

    product = together.quantized_matmul
    monkeypatch.setattr(together, "quantized_matmul", counted)
    layer._together(mx.zeros((1, 1, DIMS)))
    assert calls == [24, 32]  # 17 rows, filled up to a multiple of 8, and 32


def test_nothing_is_held_twice() -> None:
    layer = made([4096, 4096], [4, 4])
    held = sum(a.nbytes for _, a in tree_flatten(layer.parameters()))
    mx.clear_cache()
    before = mx.get_active_memory()
    join(layer)
    assert mx.get_active_memory() - before < held // 10
