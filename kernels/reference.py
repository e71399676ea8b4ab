"""The expert feed-forward in plain MLX operations: the reference that every kernel is tested against.

Readable and exact rather than fast: everything is computed in float32, one matrix product per expert, over
zero-copy views of the slab. Runs on any device.
"""

from __future__ import annotations

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
        return x @ weight.astype(mx.float32).T
    return mx.quantized_matmul(
        x,
        weight,
        scales=component_view(slab, slot, projection.scales).astype(mx.float32),
        biases=component_view(slab, slot, projection.biases).astype(mx.float32),
        transpose=True,
        group_size=projection.group_size,
        bits=projection.bits,
    )


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. Spelled out: MLX compiles its own silu, for a CPU with a C++ compiler."""
    return gate * mx.sigmoid(gate) * up


def expert_rows(x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_rows`."""
    outputs = []
    start = 0
    for slot, run in groupby(np.asarray(slots).tolist()):
        stop = start + len(list(run))
        rows = x[start:stop].astype(mx.float32)
        h = swiglu(project(rows, slab, slot, layout.gate), project(rows, slab, slot, layout.up))
        outputs.append(project(h, slab, slot, layout.down))
        start = stop
    if not outputs:
        return mx.zeros((0, layout.hidden_size))
    return mx.concatenate(outputs)


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
