"""What the gated delta rule computes with, for one token, in one launch: a causal depthwise convolution with silu,
L2-normalized queries and keys, the decay and beta.

It takes the place of some fifteen small operations; the roundings are theirs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_flashmoe.kernels import gpu

# A threadgroup takes one head, of queries, keys or values, and a thread one of its channels.
_SOURCE = """
FM_ARRAY float partial[DIMS / 32];
const unsigned head = group.x, at = simdgroup * 32 + lane;
const size_t batch = group.y;
const size_t channel = size_t(head) * DIMS + at;
const T now = qkv[batch * CHANNELS + channel];
float sum = 0;
for (unsigned i = 0; i < PAST; ++i) {
  const T then = before[(batch * PAST + i) * CHANNELS + channel];
  if (i > 0) after[(batch * PAST + i - 1) * CHANNELS + channel] = then;
  sum += float(then) * float(filter[channel * (PAST + 1) + i]);
}
after[(batch * PAST + PAST - 1) * CHANNELS + channel] = now;
const float mixed = float(T(sum + float(now) * float(filter[channel * (PAST + 1) + PAST])));
const float value = float(T(mixed * float(T(fm_sigmoid(mixed)))));
if (head < 2 * KEY_HEADS) {
  const float squares = fm_total(value * value, partial, DIMS / 32, simdgroup, lane);
  const float unit = value * fm_rsqrt(squares / DIMS + L2_EPS);
  const size_t to = (batch * KEY_HEADS + head % KEY_HEADS) * DIMS + at;
  if (head < KEY_HEADS) {
    q[to] = unit * QUERY_SCALE;
  } else {
    k[to] = unit * KEY_SCALE;
  }
} else {
  const size_t value_head = batch * VALUE_HEADS + head - 2 * KEY_HEADS;
  v[value_head * DIMS + at] = value;
  if (at == 0) {
    const float dt = float(a[value_head]) + float(dt_bias[head - 2 * KEY_HEADS]);
    // softplus: log(1 + exp(dt)), without losing a small exp(dt)
    const float e = fm_exp(dt < 0 ? dt : -dt), u = 1 + e;
    const float soft = (dt > 0 ? dt : 0) + (u == 1 ? e : fm_log(u) * e / (u - 1));
    decay[value_head] = fm_exp(-fm_exp(float(a_log[head - 2 * KEY_HEADS])) * soft);
    beta[value_head] = float(T(fm_sigmoid(float(b[value_head]))));
  }
}
"""


class DeltaInputs(NamedTuple):
    """float32 q, k [B, 1, Hk, D]; v [B, 1, Hv, D]; decay, beta [B, 1, Hv]; the convolution's state after."""

    q: mx.array
    k: mx.array
    v: mx.array
    decay: mx.array
    beta: mx.array
    after: mx.array


def supports(key_dim: int, value_dim: int) -> bool:
    """Whether heads are of one width, and of whole SIMD groups."""
    return key_dim == value_dim and key_dim % 32 == 0 and key_dim <= 1024


def launch(
    language: gpu.Language,
    qkv: mx.array,
    a: mx.array,
    b: mx.array,
    *,
    before: mx.array,
    filter: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    key_heads: int,
) -> DeltaInputs:
    """On a GPU.

    Args:
        qkv: [B, 1, (2 Hk + Hv) * D], queries, keys and values, each with its heads in order.
        a, b: [B, 1, Hv], what the decay and beta are made from.
        before: [B, past, (2 Hk + Hv) * D], the convolution's state, in qkv's dtype.
        filter: [(2 Hk + Hv) * D, past + 1, 1], the convolution's weights.
        a_log, dt_bias: [Hv].
        key_heads: Hk.
    """
    batch, past, channels = before.shape
    value_heads = a.shape[-1]
    dims = channels // (2 * key_heads + value_heads)
    keys, values = (batch, 1, key_heads, dims), (batch, 1, value_heads, dims)
    outputs = _kernel(language, qkv.dtype, dims, key_heads, value_heads, past)(
        inputs=[qkv, before, filter, a, b, a_log, dt_bias],
        grid=(channels, batch, 1),
        threadgroup=(dims, 1, 1),
        output_shapes=[keys, keys, values, values[:-1], values[:-1], before.shape],
        output_dtypes=[mx.float32] * 5 + [before.dtype],
    )
    return DeltaInputs(*outputs)


@cache
def _kernel(
    language: gpu.Language, dtype: mx.Dtype, dims: int, key_heads: int, value_heads: int, past: int
) -> Any:
    return gpu.row_kernel(
        language,
        "delta_inputs",
        ["qkv", "before", "filter", "a", "b", "a_log", "dt_bias"],
        list(DeltaInputs._fields),
        _SOURCE,
        dtype,
        DIMS=dims,
        KEY_HEADS=key_heads,
        VALUE_HEADS=value_heads,
        CHANNELS=(2 * key_heads + value_heads) * dims,
        PAST=past,
        # As an RMS norm, which divides by the root of the mean instead of the sum.
        L2_EPS=1e-6 / dims,
        QUERY_SCALE=dims**-0.5 * dims**-0.5,
        KEY_SCALE=dims**-0.5,
    )
