"""Random experts, and what they compute in float64: what kernels are compared with, here and in the tests.

Nothing here uses MLX's quantization: values are packed and unpacked by this file alone (one test compares
that with MLX's own), so that kernels and reference cannot share a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.layout import PROJECTIONS, BlobLayout, Component, Quantization
from mlx_flashmoe.selftest.floats import Array, decode, encode

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def pack(q: Array, bits: int) -> Array:
    """Integers [rows, n] -> uint32 [rows, n * bits / 32]: a stream of bits, the lowest first."""
    each = np.unpackbits(q.astype(np.uint8)[..., None], axis=-1, bitorder="little")  # 8 bits a value
    stream = each[..., :bits].reshape(q.shape[0], -1)
    return np.packbits(stream, axis=1, bitorder="little").view(np.uint32)


def squared_relu(h: Any) -> Any:
    """Of numpy's or MLX's arrays: what Nemotron-H has between its two matrices."""
    return h * h * (h > 0)


def clamped_swiglu(up: Any, gate: Any) -> Any:
    """Of numpy's or MLX's arrays: a SwiGLU of the kind that gpt-oss has."""
    module: Any = mx if isinstance(gate, mx.array) else np
    gate, up = module.clip(gate, None, 2), module.clip(up, -2, 2)
    return gate / (1 + module.exp(-1.702 * gate)) * (up + 1)


class Experts:
    """Random experts of one layout: their blobs, and their matrices and linear biases in float64.

    Args:
        activation: between the products; None for SwiGLU.
    """

    def __init__(
        self, layout: BlobLayout, count: int, seed: int = 0, activation: Callable[..., Array] | None = None
    ) -> None:
        rng = np.random.default_rng(seed)
        self.layout, self.activation = layout, activation
        self.blobs = np.zeros((count, layout.blob_size), np.uint8)
        self.matrices: list[dict[str, Array]] = []
        self.biases: list[dict[str, Array]] = []
        for blob in self.blobs:
            matrices, biases = {}, {}
            for name, p in layout.projections.items():
                shape = (p.out_dims, p.in_dims)

                def put(component: Component, data: Array, blob: Array = blob) -> None:
                    at = component.offset
                    blob[at : at + component.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

                if p.bias is not None:
                    linear = encode(rng.standard_normal(p.out_dims), p.bias.dtype)
                    put(p.bias, linear)
                    biases[name] = decode(linear)
                if p.scales is None or p.biases is None:
                    w = encode(rng.standard_normal(shape) / np.sqrt(p.in_dims), p.weight.dtype)
                    put(p.weight, w)
                    matrices[name] = decode(w)
                    continue
                q = rng.integers(0, 2**p.bits, shape)
                # Signs vary, and the bias does not centre the values: a mistake in it would show.
                s = rng.uniform(0.5, 1.5, p.scales.shape) * rng.choice([-1, 1], p.scales.shape)
                s = encode(2 * s / 2**p.bits / np.sqrt(p.in_dims), p.scales.dtype)
                b = encode(rng.standard_normal(p.scales.shape) / np.sqrt(p.in_dims), p.scales.dtype)
                put(p.weight, pack(q, p.bits))
                put(p.scales, s)
                put(p.biases, b)
                wide = [np.repeat(decode(a), p.group_size, axis=1) for a in (s, b)]
                matrices[name] = q * wide[0] + wide[1]
            self.matrices.append(matrices)
            self.biases.append(biases)

    def one(self, expert: int, x: Array) -> Array:
        """down of the activation of up and gate: x float64 [..., D] -> float64 [..., D]."""

        def product(name: str, x: Array) -> Array:
            y: Array = x @ self.matrices[expert][name].T + self.biases[expert].get(name, 0.0)
            return y

        inputs = [product(name, x) for name in ("up", "gate") if name in self.matrices[expert]]
        if self.activation is not None:
            return product("down", self.activation(*inputs))
        u, g = inputs
        return product("down", g / (1 + np.exp(-g)) * u)

    def outputs(self, x: Array, experts: Array) -> Array:
        """x [T, D] through each token's experts [T, K] -> [T, K, D], all float64."""
        return np.stack([np.stack([self.one(e, row) for e in picked]) for row, picked in zip(x, experts)])

    def ffn(self, x: Array, experts: Array, weights: Array) -> Array:
        """x [T, D], experts and weights [T, K] -> [T, D], all float64."""
        y: Array = (self.outputs(x, experts) * weights.astype(np.float64)[..., None]).sum(axis=1)
        return y


def layout_of(
    hidden: int,
    intermediate: int,
    bits: int | tuple[int, ...],
    group_size: int | tuple[int, ...],
    dtype: str | dict[str, str] = "bfloat16",
    gated: bool = True,
    bias: str | None = None,
) -> BlobLayout:
    """bits and group_size: one for all, or one for each of gate, up and down; bias: dtype of linear biases."""
    names = PROJECTIONS if gated else PROJECTIONS[1:]
    bits = bits if isinstance(bits, tuple) else (bits,) * len(names)
    group_size = group_size if isinstance(group_size, tuple) else (group_size,) * len(names)
    quantization = {n: Quantization(b, 0 if b == 16 else g) for n, b, g in zip(names, bits, group_size)}
    return BlobLayout.build(
        hidden, intermediate, quantization, dtype, dict.fromkeys(names, bias) if bias else None
    )
