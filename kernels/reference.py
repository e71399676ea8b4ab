"""The expert feed-forward in plain MLX operations: the reference that every kernel is tested against.

Readable and exact rather than fast: everything is computed in float32, one matrix product per expert, over
zero-copy views of the slab. Runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import mlx.core as mx
import numpy as np

from mlx_flashmoe.layout import BlobLayout, Component, Projection

DTYPES = {
    "uint32": mx.uint32,
    "float32": mx.float32,
    "bfloat16": mx.bfloat16,
    "float16": mx.float16,
}


# What is between the products. None: SwiGLU, silu(gate) * up. Else (up, gate) -> h, or (h) -> h for experts without a
# gate; all of them [rows, intermediate_size].
Activation = Callable[..., mx.array] | None


def component_view(slab: mx.array, slot: int, component: Component) -> mx.array:
    """One component of one slot, as a view: slab [slots, words] uint32 -> [rows, columns] of its dtype."""
    dtype = DTYPES[component.dtype]
    first = component.offset // dtype.size
    count = component.shape[0] * component.shape[1]
    return slab.view(dtype)[slot, first : first + count].reshape(component.shape)


def project(x: mx.array, slab: mx.array, slot: int, projection: Projection) -> mx.array:
    """x [rows, in_dims] float32 -> [rows, out_dims] float32 through one matrix of one slot."""
    weight = component_view(slab, slot, projection.weight)
    if projection.scales is None or projection.biases is None:
        y = x @ weight.astype(mx.float32).T
    else:
        y = mx.quantized_matmul(
            x,
            weight,
            scales=component_view(slab, slot, projection.scales).astype(mx.float32),
            biases=component_view(slab, slot, projection.biases).astype(mx.float32),
            transpose=True,
            group_size=projection.group_size,
            bits=projection.bits,
        )
    if projection.bias is not None:
        y = y + component_view(slab, slot, projection.bias).astype(mx.float32).T
    return y


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. Spelled out: MLX compiles its own silu, for a CPU with a C++ compiler."""
    return gate * mx.sigmoid(gate) * up


def activate(up: mx.array, gate: mx.array | None, activation: Activation) -> mx.array:
    """What ``down`` is given: [rows, intermediate_size] in the dtype of ``up``.

    Raises:
        ValueError: experts without a gate and without an activation, or one that changes the shape.
    """
    if gate is None:
        if activation is None:
            raise ValueError("[kernels] experts without a gate have no SwiGLU; give the activation they have")
        h = activation(up)
    else:
        h = swiglu(gate, up) if activation is None else activation(up, gate)
    if h.shape != up.shape:
        raise ValueError(f"[kernels] the activation makes {list(h.shape)} of {list(up.shape)}")
    return h.astype(up.dtype)


def runs(slots: mx.array) -> Iterator[tuple[int, slice]]:
    """Yields (slot, its rows) for each run of equal slots, int [P]."""
    start = 0
    for slot, run in groupby(np.asarray(slots).tolist()):
        stop = start + len(list(run))
        yield slot, slice(start, stop)
        start = stop


def _one_expert(
    x: mx.array, slab: mx.array, slot: int, layout: BlobLayout, activation: Activation
) -> mx.array:
    """x [rows, D] through the expert of one slot -> [rows, D] float32."""
    x = x.astype(mx.float32)
    gate = None if layout.gate is None else project(x, slab, slot, layout.gate)
    h = activate(project(x, slab, slot, layout.up), gate, activation)
    return project(h, slab, slot, layout.down)


def expert_rows(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_rows`."""
    outputs = [_one_expert(x[rows], slab, slot, layout, activation) for slot, rows in runs(slots)]
    return mx.concatenate(outputs) if outputs else mx.zeros((0, layout.hidden_size))


def expert_outputs(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_outputs`. Row by row: a product's bits may depend on its rows' number."""
    picked = np.asarray(slots)
    outputs = [
        _one_expert(x[t : t + 1], slab, slot, layout, activation)
        for t, row in enumerate(picked.tolist())
        for slot in row
    ]
    return mx.stack(outputs).reshape(*picked.shape, layout.hidden_size).astype(x.dtype)


def expert_ffn(
    x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_ffn`."""
    tokens, top_k = slots.shape
    flat = np.asarray(slots).reshape(-1)
    order = np.argsort(flat, kind="stable")
    rows = mx.array((order // top_k).astype(np.int32))
    pairs = expert_rows(x.astype(mx.float32)[rows], slab, mx.array(flat[order]), layout)
    pairs = pairs[mx.array(np.argsort(order, kind="stable").astype(np.int32))]
    pairs = pairs.reshape(tokens, top_k, layout.hidden_size)
    return (pairs * weights.astype(mx.float32)[..., None]).sum(axis=1).astype(x.dtype)
