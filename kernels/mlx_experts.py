"""The experts by MLX's own operations on a GPU, for use where a custom kernel does not compile or is wrong.

On Metal they work on views of the slab, without a copy, where scales have the activations' dtype. CUDA refuses such
views: there, and for unquantized experts, the chosen experts are copied out of the slab first. Slots are looked up
when the graph is computed, as the custom kernels do.
"""

from __future__ import annotations

from itertools import groupby

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels.dense import quantized_matmul
from mlx_flashmoe.kernels.reference import DTYPES, component_view, swiglu
from mlx_flashmoe.layout import BlobLayout, Component, Projection


def expert_ffn(
    x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_ffn`. Accumulated as MLX's products are, in x's dtype between them."""
    in_place = mx.metal.is_available() and all(
        p.scales is not None and DTYPES[p.scales.dtype] == x.dtype for p in layout.projections.values()
    )
    outputs = []
    for t in range(x.shape[0]):  # one token's experts are copied at once
        blobs, chosen = (slab, slots[t]) if in_place else (slab[slots[t]], mx.arange(slots.shape[1]))
        rows = x[t].reshape(1, 1, -1)
        h = swiglu(_project(rows, blobs, chosen, layout.gate), _project(rows, blobs, chosen, layout.up))
        pairs = _project(h, blobs, chosen, layout.down)[:, 0]
        outputs.append((pairs.astype(mx.float32) * weights[t].astype(mx.float32)[:, None]).sum(axis=0))
    return mx.stack(outputs).astype(x.dtype)


def expert_rows(x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_rows`. One product per matrix of each expert, over views of the slab."""
    outputs = []
    start = 0
    for slot, run in groupby(np.asarray(slots).tolist()):
        rows = x[start : (start := start + len(list(run)))]
        h = swiglu(_one(rows, slab, slot, layout.gate), _one(rows, slab, slot, layout.up))
        outputs.append(_one(h, slab, slot, layout.down))
    return mx.concatenate(outputs) if outputs else mx.zeros((0, layout.hidden_size), dtype=x.dtype)


def _project(x: mx.array, blobs: mx.array, chosen: mx.array, p: Projection) -> mx.array:
    """x [1 or K, 1, in_dims] through one matrix of each of ``chosen`` (int [K]) -> [K, 1, out_dims]."""
    if p.scales is None or p.biases is None:
        weight = view(blobs, p.weight).astype(x.dtype)
        return x @ weight.swapaxes(-1, -2)  # the chosen blobs, in their order
    dtype = _common(x, p.scales)
    return mx.gather_qmm(
        x.astype(dtype),
        view(blobs, p.weight),
        view(blobs, p.scales).astype(dtype),
        view(blobs, p.biases).astype(dtype),
        rhs_indices=chosen,
        transpose=True,
        group_size=p.group_size,
        bits=p.bits,
    ).astype(x.dtype)


def _one(x: mx.array, slab: mx.array, slot: int, p: Projection) -> mx.array:
    """x [rows, in_dims] through one matrix of one slot -> [rows, out_dims]."""
    weight = component_view(slab, slot, p.weight)
    if p.scales is None or p.biases is None:
        return x @ weight.astype(x.dtype).T
    dtype = _common(x, p.scales)
    scales, biases = (component_view(slab, slot, c).astype(dtype) for c in (p.scales, p.biases))
    return quantized_matmul(x.astype(dtype), weight, scales, biases, p.group_size, p.bits).astype(x.dtype)


def _common(x: mx.array, scales: Component) -> mx.Dtype:
    """The dtype to compute in: MLX wants one for activations and scales, and neither may lose bits."""
    return x.dtype if DTYPES[scales.dtype] == x.dtype else mx.float32


def view(blobs: mx.array, component: Component) -> mx.array:
    """One component of all blobs [count, words] -> [count, rows, columns] of its dtype; on Metal without a copy."""
    dtype = DTYPES[component.dtype]
    first = component.offset // dtype.size
    count = component.shape[0] * component.shape[1]
    each = blobs.view(dtype)[:, first : first + count].reshape(blobs.shape[0], *component.shape)
    return each if mx.default_device() == mx.gpu and mx.metal.is_available() else mx.contiguous(each)
