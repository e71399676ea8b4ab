"""The experts by MLX's own operations on a GPU: of layouts and activations that the custom kernels do not know, and
where a custom kernel does not compile or is wrong.

On Metal they work on views of the slab, without a copy, where scales have the activations' dtype. CUDA refuses such
views: there, and for unquantized experts, the chosen experts are copied out of the slab first. Slots are looked up
when the graph is computed, as the custom kernels do.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_flashmoe.kernels.dense import quantized_matmul
from mlx_flashmoe.kernels.reference import DTYPES, Activation, activate, component_view, runs
from mlx_flashmoe.layout import BlobLayout, Component, Projection


def expert_ffn(
    x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_ffn`. Accumulated as MLX's products are, in x's dtype between them."""
    pairs = expert_outputs(x, slab, slots, layout).astype(mx.float32)
    weights = weights.astype(mx.float32)[..., None]
    # One sum a token: how MLX adds may depend on how many sums there are.
    return mx.stack([(pairs[t] * weights[t]).sum(axis=0) for t in range(x.shape[0])]).astype(x.dtype)


def expert_outputs(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_outputs`."""
    in_place = mx.metal.is_available() and all(
        p.scales is not None and DTYPES[p.scales.dtype] == x.dtype for p in layout.projections.values()
    )
    if in_place:
        return _outputs(x, slab, slots, layout, activation)
    each = mx.arange(slots.shape[1])[None]
    tokens = range(x.shape[0])  # one token's experts are copied at once
    return mx.concatenate([_outputs(x[t : t + 1], slab[slots[t]], each, layout, activation) for t in tokens])


def expert_rows(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_rows`. One product per matrix of each expert, over views of the slab."""
    outputs = []
    for slot, run in runs(slots):
        rows = x[run]
        gate = None if layout.gate is None else _one(rows, slab, slot, layout.gate)
        h = activate(_one(rows, slab, slot, layout.up), gate, activation)
        outputs.append(_one(h, slab, slot, layout.down))
    return mx.concatenate(outputs) if outputs else mx.zeros((0, layout.hidden_size), dtype=x.dtype)


def _outputs(
    x: mx.array, blobs: mx.array, chosen: mx.array, layout: BlobLayout, activation: Activation
) -> mx.array:
    """x [T, D] through each token's ``chosen`` (int [T, K]) of the blobs -> [T, K, D]."""
    rows = x[:, None, None]
    gate = None if layout.gate is None else _project(rows, blobs, chosen, layout.gate)
    up = _project(rows, blobs, chosen, layout.up)
    flat = (-1, up.shape[-1])
    h = activate(up.reshape(flat), None if gate is None else gate.reshape(flat), activation)
    return _project(h.reshape(up.shape), blobs, chosen, layout.down)[:, :, 0]


def _project(x: mx.array, blobs: mx.array, chosen: mx.array, p: Projection) -> mx.array:
    """x [T, 1 or K, 1, in_dims] through one matrix of each of ``chosen`` (int [T, K]) -> [T, K, 1, out_dims]."""
    if p.scales is None or p.biases is None:
        weight = view(blobs, p.weight).astype(x.dtype)
        y = x @ weight.swapaxes(-1, -2)  # the chosen blobs of one token, in their order
    else:
        dtype = _common(x, p.scales)
        y = mx.gather_qmm(
            x.astype(dtype),
            view(blobs, p.weight),
            view(blobs, p.scales).astype(dtype),
            view(blobs, p.biases).astype(dtype),
            rhs_indices=chosen,
            transpose=True,
            group_size=p.group_size,
            bits=p.bits,
        ).astype(x.dtype)
    if p.bias is not None:
        y = y + view(blobs, p.bias)[chosen].swapaxes(-1, -2)
    return y.astype(x.dtype)


def _one(x: mx.array, slab: mx.array, slot: int, p: Projection) -> mx.array:
    """x [rows, in_dims] through one matrix of one slot -> [rows, out_dims]."""
    weight = component_view(slab, slot, p.weight)
    if p.scales is None or p.biases is None:
        y = x @ weight.astype(x.dtype).T
    else:
        dtype = _common(x, p.scales)
        scales, biases = (component_view(slab, slot, c).astype(dtype) for c in (p.scales, p.biases))
        y = quantized_matmul(x.astype(dtype), weight, scales, biases, p.group_size, p.bits).astype(x.dtype)
    if p.bias is not None:
        y = y + component_view(slab, slot, p.bias).T
    return y.astype(x.dtype)


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
