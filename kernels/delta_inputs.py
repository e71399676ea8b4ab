"""The inputs of the gated delta rule: a causal depthwise convolution with silu, L2-normalized queries and keys,
the decay and beta. For one token on a GPU in one launch.

It takes the place of some fifteen small operations; the roundings are theirs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_flashmoe.kernels import gpu, trust

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
    """float32 q, k [B, T, Hk, Dk]; v [B, T, Hv, Dv]; decay, beta [B, T, Hv]; the convolution's state after."""

    q: mx.array
    k: mx.array
    v: mx.array
    decay: mx.array
    beta: mx.array
    after: mx.array


def delta_inputs(
    qkv: mx.array,
    a: mx.array,
    b: mx.array,
    *,
    before: mx.array,
    filter: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    key_heads: int,
    key_dim: int,
) -> DeltaInputs:
    """Queries, keys and values behind the convolution, silu and normalization, and the rule's decay and beta.

    Args:
        qkv: [B, T, 2 Hk * Dk + Hv * Dv], queries, keys and values, each with its heads in order.
        a, b: [B, T, Hv], what the decay and beta are made from.
        before: [B, past, 2 Hk * Dk + Hv * Dv], the convolution's state, in qkv's dtype.
        filter: [2 Hk * Dk + Hv * Dv, past + 1, 1], the convolution's weights.
        a_log, dt_bias: [Hv].
        key_heads, key_dim: Hk and Dk.
    """
    _, past, channels = before.shape
    value_heads = a.shape[-1]
    language = gpu.current() if qkv.shape[1] == 1 else None
    alike = channels == (2 * key_heads + value_heads) * key_dim  # queries, keys and values
    rest: dict[str, Any] = {"before": before, "filter": filter, "a_log": a_log, "dt_bias": dt_bias}
    rest["key_heads"] = key_heads
    dtypes = qkv.dtype, filter.dtype, a_log.dtype, dt_bias.dtype
    if language is not None and alike and right(language, dtypes, key_dim, key_heads, value_heads, past):
        return launch(language, qkv, a, b, **rest)
    return _plain(qkv, a, b, **rest, key_dim=key_dim)


def _plain(
    qkv: mx.array,
    a: mx.array,
    b: mx.array,
    *,
    before: mx.array,
    filter: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    key_heads: int,
    key_dim: int,
) -> DeltaInputs:
    batch, tokens, channels = qkv.shape
    keys = key_heads * key_dim
    whole = mx.concatenate([before, qkv], axis=1)
    # A copy: a slice would keep the whole prompt's activations alive.
    after = mx.contiguous(whole[:, whole.shape[1] - before.shape[1] :])
    mixed = mx.conv1d(whole, filter, groups=channels)
    q, k, v = mx.split(mixed * mx.sigmoid(mixed), [keys, 2 * keys], axis=-1)
    dt = a.astype(mx.float32) + dt_bias.astype(mx.float32)
    return DeltaInputs(
        l2_normalize(q.reshape(batch, tokens, key_heads, key_dim), key_dim**-0.5),
        l2_normalize(k.reshape(batch, tokens, key_heads, key_dim)),
        v.reshape(batch, tokens, a.shape[-1], -1).astype(mx.float32),
        mx.exp(-mx.exp(a_log.astype(mx.float32)) * mx.logaddexp(dt, 0)),
        mx.sigmoid(b).astype(mx.float32),
        after,
    )


def l2_normalize(x: mx.array, scale: float = 1.0) -> mx.array:
    """scale * x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32.

    As an RMS norm, which divides by the root of the mean instead of the sum.
    """
    dims = x.shape[-1]
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6 / dims) * (scale * dims**-0.5)


def right(
    language: gpu.Language,
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype, mx.Dtype],
    dims: int,
    key_heads: int,
    value_heads: int,
    past: int,
) -> bool:
    """Tells whether the kernel serves heads of ``dims``, all of one width: it supports them and was found right.

    Args:
        dtypes: of the activations, of ``filter``, ``a_log`` and ``dt_bias``.
    """

    def compare() -> str:
        channels = (2 * key_heads + value_heads) * dims
        qkv, a, b, before, filter, a_log, dt_bias = trust.normals(
            (2, 1, channels),
            *[(2, 1, value_heads)] * 2,
            (2, past, channels),
            (channels, past + 1, 1),
            *[(value_heads,)] * 2,
        )
        qkv, a, b, before = (part.astype(dtypes[0]) for part in (qkv, a, b, before))
        filter, a_log, dt_bias = (
            part.astype(dtype) for part, dtype in zip((filter, a_log, dt_bias), dtypes[1:], strict=True)
        )
        rest: dict[str, Any] = {
            "before": before,
            "filter": filter,
            "a_log": a_log,
            "dt_bias": dt_bias,
            "key_heads": key_heads,
        }
        got = launch(language, qkv, a, b, **rest)
        expected = _plain(qkv, a, b, **rest, key_dim=dims)
        return trust.judge(got, expected, trust.TOLERANCE[dtypes[0]])

    supported = dims % 32 == 0 and dims <= 1024
    return supported and trust.served("delta_inputs", (dtypes, dims, key_heads, value_heads, past), compare)


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
    """On a GPU, for one token and heads of one width; arguments as :func:`delta_inputs`."""
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
