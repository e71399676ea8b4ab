"""Random experts, and what they compute in float64: what kernels are compared with, here and in the tests.

Nothing here uses MLX's quantization: values are packed and unpacked by this file alone (one test compares
that with MLX's own), so that kernels and reference cannot share a mistake.
"""

from __future__ import annotations

import numpy as np

from mlx_flashmoe.layout import BlobLayout, Component, Quantization
from mlx_flashmoe.selftest.floats import Array, decode, encode

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def pack(q: Array, bits: int) -> Array:
    """Integers [rows, n] -> uint32 [rows, n * bits / 32]: a stream of bits, the lowest first."""
    each = np.unpackbits(q.astype(np.uint8)[..., None], axis=-1, bitorder="little")  # 8 bits a value
    stream = each[..., :bits].reshape(q.shape[0], -1)
    return np.packbits(stream, axis=1, bitorder="little").view(np.uint32)


class Experts:
    """Random experts of one layout: their blobs, and their matrices in float64."""

    def __init__(self, layout: BlobLayout, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.layout = layout
        self.blobs = np.zeros((count, layout.blob_size), np.uint8)
        self.matrices: list[dict[str, Array]] = []
        for blob in self.blobs:
            matrices = {}
            for name, p in layout.projections.items():
                shape = (p.out_dims, p.in_dims)

                def put(component: Component, data: Array, blob: Array = blob) -> None:
                    at = component.offset
                    blob[at : at + component.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

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

    def one(self, expert: int, x: Array) -> Array:
        """down(silu(gate(x)) * up(x)): x float64 [..., D] -> float64 [..., D]."""
        m = self.matrices[expert]
        g, u = x @ m["gate"].T, x @ m["up"].T
        y: Array = (g / (1 + np.exp(-g)) * u) @ m["down"].T
        return y

    def ffn(self, x: Array, experts: Array, weights: Array) -> Array:
        """x [T, D], experts and weights [T, K] -> [T, D], all float64."""
        return np.stack(
            [
                sum(w * self.one(e, row) for e, w in zip(picked, share))
                for row, picked, share in zip(x, experts, weights.astype(np.float64))
            ]
        )


def layout_of(
    hidden: int,
    intermediate: int,
    bits: int | tuple[int, ...],
    group_size: int | tuple[int, ...],
    dtype: str | dict[str, str] = "bfloat16",
) -> BlobLayout:
    """bits and group_size: one for all, or one for each of gate, up and down."""
    bits = bits if isinstance(bits, tuple) else (bits,) * 3
    group_size = group_size if isinstance(group_size, tuple) else (group_size,) * 3
    quantization = {
        n: Quantization(b, 0 if b == 16 else g) for n, b, g in zip(("gate", "up", "down"), bits, group_size)
    }
    return BlobLayout.build(hidden, intermediate, quantization, dtype)
