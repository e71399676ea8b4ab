"""Random experts, for measuring and comparing kernels."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import reference
from mlx_flashmoe.layout import BlobLayout, Component


def random_slab(layout: BlobLayout, slots: int) -> mx.array:
    """uint32 [slots, blob_size / 4] of random experts whose outputs are about as large as their inputs."""
    rng = np.random.default_rng(0)
    slab = rng.integers(0, 2**32, (slots, layout.blob_size // 4), dtype=np.uint32)

    def put(component: Component, values: np.ndarray) -> None:
        typed = mx.array(values.astype(np.float32)).astype(reference.DTYPES[component.dtype])
        carrier = (mx.uint16, np.uint16) if typed.dtype.size == 2 else (mx.uint32, np.uint32)
        first = component.offset // typed.dtype.size
        slab.view(carrier[1])[:, first : first + values.shape[-1]] = np.asarray(typed.view(carrier[0]))

    for p in layout.projections.values():
        if p.bias is not None:
            put(p.bias, rng.standard_normal((slots, p.out_dims)))
        if p.scales is None or p.biases is None:
            put(p.weight, rng.standard_normal(p.out_dims * p.in_dims) / p.in_dims**0.5)
            continue
        levels = 2**p.bits - 1
        shape = (slots, p.scales.shape[0] * p.scales.shape[1])
        scales = rng.uniform(0.5, 1.5, shape) * 6 / levels / p.in_dims**0.5
        put(p.scales, scales)
        put(p.biases, scales * (-levels / 2))
    return on_device(slab)


def on_device(words: np.ndarray) -> mx.array:
    """uint32 words in the device's own memory: computed there, because MLX keeps given arrays in the host's."""
    array = mx.array(words) | mx.array(0, mx.uint32)
    mx.eval(array)
    return array
