"""The forward pass of Qwen3.5-MoE for training: the mathematics of transformers, arranged for a GPU.

Three things differ from transformers' own modules, none of them in what is computed:

- every expert is applied to every token, as two large multiplications, and the routing weights (zero where an
  expert was not picked) pick among the results. At this size that is faster than gathering tokens;
- the delta rule inverts its triangular systems by doubling, in a dozen multiplications, and what does not depend
  on the recurrent state stays out of the loop over chunks;
- a row holds several dialogues, and none sees another: attention is masked, the convolution does not reach over a
  beginning, and the recurrent state decays to nothing there. Each is computed as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5MoeTextConfig

Weights = dict[str, Tensor]

CHUNK = 64
# Log decay at a dialogue's first token: what came before is multiplied by exp(-60), under float32's resolution.
FORGET = -60.0


@dataclass
class Routing:
    """What one layer's router did: probabilities [N, experts], and the experts it picked [N, k]."""

    probabilities: Tensor
    picked: Tensor


def logits(
    config: Qwen3_5MoeTextConfig,
    weights: Weights,
    tokens: Tensor,
    segments: Tensor,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[Tensor, list[Routing]]:
    """Logits [B, T, vocab] in ``dtype``, and the routing of every layer.

    Args:
        weights: by transformers' names, the matrices in ``dtype``.
        tokens, segments: [B, T]; tokens of one dialogue share a segment number, and stand together.
    """
    same = _same_segment(segments, config.linear_conv_kernel_dim)
    mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    rope = _rope(config, tokens.shape[1], tokens.device)
    x = F.embedding(tokens, weights["model.embed_tokens.weight"]).float()
    routing = []
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}."
        layer = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        if kind == "linear_attention":
            x, *routed = _step(linear_layer, compiled)(config, layer, x, same, dtype)
        else:
            x, *routed = _step(full_layer, compiled)(config, layer, x, mask, rope, dtype)
        routing.append(Routing(*routed))
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps).to(dtype)
    return F.linear(x, weights["model.embed_tokens.weight"]), routing


_compiled: dict[Callable, Callable] = {}


def _step(function: Callable, compiled: bool) -> Callable:
    if not compiled:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


def linear_layer(
    config: Qwen3_5MoeTextConfig, weights: Weights, x: Tensor, same: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    h = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps).to(dtype)
    x = x + gated_delta_net(config, weights, h, same)
    return _moe_residual(config, weights, x, dtype)


def full_layer(
    config: Qwen3_5MoeTextConfig,
    weights: Weights,
    x: Tensor,
    mask: Tensor,
    rope: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    h = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps).to(dtype)
    x = x + gated_attention(config, weights, h, mask, rope)
    return _moe_residual(config, weights, x, dtype)


def _moe_residual(
    config: Qwen3_5MoeTextConfig, weights: Weights, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    h = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    y, probabilities, picked = moe(config, weights, h.flatten(0, 1), dtype)
    return x + y.view_as(x), probabilities, picked


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32; the weight is stored as its difference from 1."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


# The gated delta net


def gated_delta_net(config: Qwen3_5MoeTextConfig, weights: Weights, h: Tensor, same: Tensor) -> Tensor:
    """h [B, T, D] in the computing dtype -> the same shape. ``same`` is of ``_same_segment``."""
    batch, length, _ = h.shape
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    qkv = F.linear(h, weights["linear_attn.in_proj_qkv.weight"])
    qkv = F.silu(causal_convolution(qkv, weights["linear_attn.conv1d.weight"], same))
    q, k, v = qkv.float().split([keys, keys, values], dim=-1)
    q = l2_norm(q.view(batch, length, -1, config.linear_key_head_dim)) * config.linear_key_head_dim**-0.5
    k = l2_norm(k.view(batch, length, -1, config.linear_key_head_dim))
    v = v.view(batch, length, -1, config.linear_value_head_dim)
    beta = F.linear(h, weights["linear_attn.in_proj_b.weight"]).float().sigmoid()
    step = F.softplus(
        F.linear(h, weights["linear_attn.in_proj_a.weight"]).float() + weights["linear_attn.dt_bias"]
    )
    decay = -weights["linear_attn.A_log"].exp() * step
    begins = ~same[:, :, 1, None]
    y = gated_delta_rule(q, k, v, torch.where(begins, FORGET, decay), beta)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    z = F.linear(h, weights["linear_attn.in_proj_z.weight"]).view_as(y)
    y = y * weights["linear_attn.norm.weight"] * F.silu(z.float())
    return F.linear(y.flatten(2).to(h.dtype), weights["linear_attn.out_proj.weight"])


def l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _same_segment(segments: Tensor, kernel: int) -> Tensor:
    """[B, T, kernel]: whether the token j places before is of the same dialogue."""
    earlier = [F.pad(segments, (j, 0), value=-1)[:, : segments.shape[1]] for j in range(kernel)]
    return torch.stack([segments == e for e in earlier], dim=-1)


def causal_convolution(x: Tensor, weight: Tensor, same: Tensor) -> Tensor:
    """Depthwise, over time: x [B, T, C], weight [C, 1, K], whose last tap is the present."""
    length, taps = x.shape[1], weight.shape[-1]
    y = x * weight[:, 0, -1]
    for j in range(1, taps):
        shifted = F.pad(x, (0, 0, j, 0))[:, :length]
        y = y + shifted * same[:, :, j, None] * weight[:, 0, taps - 1 - j]
    return y


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule, a chunk at a time.

    Args:
        q, k: [B, T, key heads, Dk], normalized; each key head serves as many neighbouring value heads.
        v: [B, T, value heads, Dv].
        decay: [B, T, value heads], the logarithm, at most 0.
        beta: [B, T, value heads].
    Returns:
        [B, T, value heads, Dv], in float32.
    """
    batch, length, heads, _ = v.shape
    group = heads // k.shape[2]
    padding = -length % CHUNK

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, chunks, CHUNK, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)) if padding else x
        return x.unflatten(1, (-1, CHUNK)).movedim(3, 1)

    q, k = (chunks(x).repeat_interleave(group, dim=1) for x in (q, k))
    v, beta, total = chunks(v), chunks(beta)[..., None], chunks(decay).cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    inverse = UnitLowerInverse.apply(((k * beta) @ k.mT * between).tril(-1))
    new = inverse @ (v * beta)
    reads = inverse @ (k * beta * total.exp()[..., None])
    writes = (k * (total[..., -1:] - total).exp()[..., None]).mT
    keep = total[..., -1].exp()[..., None, None]

    state = torch.zeros(batch, heads, k.shape[-1], v.shape[-1], dtype=v.dtype, device=v.device)
    states, values = [], []
    for c in range(v.shape[2]):
        states.append(state)
        values.append(new[:, :, c] - reads[:, :, c] @ state)
        state = state * keep[:, :, c] + writes[:, :, c] @ values[-1]
    y = (q * total.exp()[..., None]) @ torch.stack(states, 2) + (q @ k.mT * between) @ torch.stack(values, 2)
    return y.movedim(1, 3).flatten(1, 2)[:, :length]


class UnitLowerInverse(torch.autograd.Function):
    """(1 + A)^-1 for strictly lower triangular A [..., n, n], n a power of two.

    The inverse of the diagonal blocks of one size gives that of the next: in [[P, 0], [C, Q]] the corner of the
    inverse is -Q^-1 C P^-1. As stable as forward substitution, and a handful of multiplications.
    """

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        n = a.shape[-1]
        index = torch.arange(n, device=a.device)
        inverse = torch.eye(n, dtype=a.dtype, device=a.device).expand_as(a)
        size = 1
        while size < n:
            block = index // size
            corner = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
            inverse = inverse - inverse @ (a * corner) @ inverse
            size *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


# Gated attention


def gated_attention(
    config: Qwen3_5MoeTextConfig, weights: Weights, h: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """h [B, T, D] in the computing dtype, mask [B, 1, T, T] -> the shape of h."""
    batch, length, _ = h.shape
    size = config.head_dim

    def heads(name: str, width: int) -> Tensor:
        return F.linear(h, weights[f"self_attn.{name}.weight"]).view(batch, length, -1, width)

    q, gate = heads("q_proj", 2 * size).chunk(2, dim=-1)
    k, v = heads("k_proj", size), heads("v_proj", size)
    q = rotate(rms_norm(q, weights["self_attn.q_norm.weight"], config.rms_norm_eps), rope).to(h.dtype)
    k = rotate(rms_norm(k, weights["self_attn.k_norm.weight"], config.rms_norm_eps), rope).to(h.dtype)
    group = config.num_attention_heads // config.num_key_value_heads
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)
    y = y.flatten(2) * gate.flatten(2).sigmoid()
    return F.linear(y, weights["self_attn.o_proj.weight"])


def _rope(config: Qwen3_5MoeTextConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, rotated dimensions]; a text's three position axes are one."""
    settings = config.rope_parameters
    size = int(config.head_dim * settings["partial_rotary_factor"])
    frequency = settings["rope_theta"] ** (-torch.arange(0, size, 2, device=device).float() / size)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([x * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


# Experts


def moe(
    config: Qwen3_5MoeTextConfig, weights: Weights, h: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """h [N, D] in float32 -> the layer's output, router probabilities [N, experts], experts picked [N, k]."""
    probabilities = F.linear(h, weights["mlp.gate.weight"].float()).softmax(-1)
    top, picked = probabilities.topk(config.num_experts_per_tok, dim=-1)
    routed = torch.zeros_like(probabilities).scatter(1, picked, top / top.sum(-1, keepdim=True))
    h = h.to(dtype)
    gate_up = F.linear(h, weights["mlp.experts.gate_up_proj"].flatten(0, 1))
    gate, up = gate_up.view(h.shape[0], config.num_experts, -1).chunk(2, dim=-1)
    inner = F.silu(gate) * up * routed.to(dtype)[..., None]
    y = inner.flatten(1) @ weights["mlp.experts.down_proj"].transpose(1, 2).flatten(0, 1)
    shared = F.silu(F.linear(h, weights["mlp.shared_expert.gate_proj.weight"]))
    shared = shared * F.linear(h, weights["mlp.shared_expert.up_proj.weight"])
    shared = F.linear(shared, weights["mlp.shared_expert.down_proj.weight"])
    return y + F.linear(h, weights["mlp.shared_expert_gate.weight"]).sigmoid() * shared, probabilities, picked
