"""Fake quantization: a weight with the values that MLX's affine quantization will give it, and a gradient.

``affine`` is mx.quantize followed by mx.dequantize, to the bit, for weights stored in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS, GROUP_SIZE = 4, 32
# The routers' own, as mlx-lm quantizes this architecture.
GATE_BITS, GATE_GROUP_SIZE = 8, 64


def precision(name: str) -> tuple[int, int] | None:
    """Bits and group size of a tensor in the packed checkpoint; None where it stays as it is."""
    if name.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight")):
        return GATE_BITS, GATE_GROUP_SIZE
    if name.endswith(("norm.weight", "conv1d.weight", "A_log", "dt_bias")):
        return None
    return BITS, GROUP_SIZE


def affine(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The values after quantization, in float32. ``weight`` [..., n], n a multiple of the group size.

    The scale runs from the group's extreme of largest magnitude, which is kept exactly; it is adjusted so that
    zero is a step, and scale and bias are stored in bfloat16.
    """
    w = weight.detach().bfloat16().float().unflatten(-1, (-1, group_size))
    steps = 2**bits - 1
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    from_low = low.abs() > high.abs()
    scale = ((high - low) / steps).clamp_min(1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero != 0, edge / zero, scale)
    bias = torch.where(zero != 0, edge, 0.0)
    q = ((w - bias) / scale).round().clamp(0, steps)
    return (q * scale.bfloat16().float() + bias.bfloat16().float()).flatten(-2)


def stored(name: str, weight: Tensor) -> Tensor:
    """The values of a tensor in the packed checkpoint, in float32.

    What is not quantized is bfloat16 there; norms, published as their difference from 1, have it added in bfloat16.
    """
    how = precision(name)
    if how is not None:
        return affine(weight, *how)
    rounded = weight.detach().bfloat16()
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return (rounded + 1).float() - 1
    return rounded.float()


def fake_quantized(name: str, weight: Tensor) -> Tensor:
    """``weight`` as the packed checkpoint will have it; the gradient goes straight through."""
    return weight + (stored(name, weight) - weight.detach())
