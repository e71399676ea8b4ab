"""The expert feed-forward over a slab of blobs, and the backend of the current device.

A *slab* is a uint32 array [slots, blob_size / 4]: slot s holds one expert's blob as ``layout`` describes it.
Kernels read experts where they lie in it; nothing is unpacked, copied or gathered.

An *activation* is what is between an expert's products. None is SwiGLU, which the fused kernels know. Others are
callables of MLX arrays [rows, intermediate_size] in x's dtype, on the CPU in float32, and must compute each row by
itself: (up, gate) -> h, or (h) -> h for experts without a gate.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_flashmoe.kernels import chosen, gpu, mlx_experts, on_cpu
from mlx_flashmoe.kernels.dense import head_products, matmul, quantized_matmul
from mlx_flashmoe.kernels.reference import Activation
from mlx_flashmoe.layout import BlobLayout

__all__ = ["expert_ffn", "expert_outputs", "expert_rows", "head_products", "matmul", "quantized_matmul"]


def expert_ffn(
    x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout
) -> mx.array:
    """The routed experts of a few tokens: y = sum over k of weights * down(silu(gate(x)) * up(x)).

    Args:
        x: [T, D] activations, float32, bfloat16 or float16. T from 1 to 16.
        slab: uint32 [slots, blob_size / 4].
        slots: int32 [T, K], where each token's experts lie. Every entry must be a valid slot.
        weights: float32 [T, K] routing weights.
        layout: of the blobs in the slab.

    Returns:
        [T, D] in x's dtype. Accumulated in float32.
    """
    language = gpu.current()
    if language is None:
        y: mx.array = on_cpu.module().expert_ffn(x, slab, slots, weights, layout)
        return y
    experts = chosen.for_ffn(language, layout, x.dtype, slots.shape[-1])
    return experts.expert_ffn(x, slab, slots, weights, layout)


def expert_outputs(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """Each chosen expert's own output, for a few tokens; it does not depend on what else is in the call.

    Args:
        x: [T, D] activations, float32, bfloat16 or float16. T from 1 to 16.
        slab: uint32 [slots, blob_size / 4].
        slots: int32 [T, K], where each token's experts lie. Every entry must be a valid slot.
        layout: of the blobs in the slab.
        activation: between the products; None for SwiGLU.

    Returns:
        [T, K, D] in x's dtype: down(h) of each expert, unweighted.

    Raises:
        ValueError: experts without a gate and without an activation.
    """
    language = gpu.current()
    if language is None:
        y: mx.array = on_cpu.module().expert_outputs(x, slab, slots, layout, activation)
        return y
    if activation is not None:
        return mlx_experts.expert_outputs(x, slab, slots, layout, activation)
    return chosen.for_ffn(language, layout, x.dtype, 1).expert_outputs(x, slab, slots, layout)


def expert_rows(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """One expert a row, unweighted, for many rows grouped by expert: each expert's weights are read once.

    The result of a row depends on that row's x, its expert and the number of rows of its run, and on nothing
    else in the call: calls may be split between runs of equal slots without changing a bit.

    Args:
        x: [P, D] activations, rows of one expert adjacent.
        slab: uint32 [slots, blob_size / 4].
        slots: int32 [P], equal entries adjacent.
        layout: of the blobs in the slab.
        activation: between the products; None for SwiGLU.

    Returns:
        [P, D]: down(h) of each row's expert; on a GPU in x's dtype, on the CPU in float32, so that a weighted sum of
        them in order has the bits of expert_ffn.

    Raises:
        ValueError: experts without a gate and without an activation.
    """
    language = gpu.current()
    if language is None:
        y: mx.array = on_cpu.module().expert_rows(x, slab, slots, layout, activation)
        return y
    if activation is not None:
        return mlx_experts.expert_rows(x, slab, slots, layout, activation)
    return chosen.for_rows(language, layout, x.dtype).expert_rows(x, slab, slots, layout)
