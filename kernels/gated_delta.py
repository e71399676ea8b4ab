"""The gated delta rule (Yang et al., "Gated Delta Networks", arXiv:2412.06464), token by token, everywhere.

MLX has kernels for it on Metal. Elsewhere its fallback is a graph with every token's state in it, 4 MB a token
and layer at the 397B's shape: kernels of our own take its place on CUDA and, where numba is, on the CPU; for what
remains it is cut into segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from mlx_flashmoe.kernels import nvrtc, trust

SEGMENT = 16  # tokens of the fallback evaluated at once
ROWS = 4  # rows of the state a CUDA block takes, one a warp
# (Hk, Dk, Hv, Dv) that MLX is known to have Metal kernels for: Qwen3-Next's, and the 397B's. At others it may fall
# back without saying so.
ON_METAL = ((16, 128, 32, 128), (16, 128, 64, 128))


Rule = Callable[..., tuple[mx.array, mx.array]]


def gated_delta_update(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """For each token: S = decay * S; S += beta * (v - S k) k^T; y = S q.

    Args:
        q, k: float32 [B, T, Hk, Dk]; each serves Hv / Hk adjacent value heads.
        v: float32 [B, T, Hv, Dv].
        decay, beta: float32 [B, T, Hv].
        state: float32 [B, Hv, Dv, Dk], S before the first token.

    Returns:
        y float32 [B, T, Hv, Dv], and S after the last token.
    """
    if mx.default_device() != mx.gpu:
        return (_on_cpu() or _in_segments)(q, k, v, decay, beta, state)
    shape = (*k.shape[2:], *v.shape[2:])
    if right(*shape):
        return _on_gpu(q, k, v, decay, beta, state)
    found_wrong = mx.metal.is_available() and shape in ON_METAL and trust.mode() == "auto"
    return _in_segments(q, k, v, decay, beta, state, _step_by_step if found_wrong else None)


def right(key_heads: int, key_dim: int, value_heads: int, value_dim: int) -> bool:
    """Tells whether the GPU's kernel serves these heads: it supports them and was found right."""
    metal = mx.metal.is_available()
    shape = (key_heads, key_dim, value_heads, value_dim)
    if shape not in ON_METAL if metal else key_dim % 32 or value_dim % ROWS:
        return False

    def compare() -> str:
        keys, values, heads = (1, 3, key_heads, key_dim), (1, 3, value_heads, value_dim), (1, 3, value_heads)
        states = (1, value_heads, value_dim, key_dim)
        q, k, v, a, b, state = trust.normals(keys, keys, values, heads, heads, states)
        q, k = q * key_dim**-0.5, k * key_dim**-0.5
        inputs = q, k, v, mx.sigmoid(a), mx.sigmoid(b), state
        return trust.judge(_on_gpu(*inputs), _step_by_step(*inputs), trust.TOLERANCE[mx.float32])

    return trust.served("gated_delta", shape, compare)


def _on_gpu(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """MLX's kernel on Metal, ours on CUDA."""
    if mx.metal.is_available():
        y, state = mx.fast.gated_delta_update(q, k, v, decay, beta, state)
        return y, state
    return _cuda(q, k, v, decay, beta, state)


def _step_by_step(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The rule as it is written down, in elementwise operations and sums."""
    each = v.shape[2] // k.shape[2]
    q, k = mx.repeat(q, each, axis=2), mx.repeat(k, each, axis=2)
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        delta = (v[:, t] - (state * k[:, t, :, None]).sum(axis=-1)) * beta[:, t, :, None]
        state = state + delta[..., None] * k[:, t, :, None]
        outputs.append((state * q[:, t, :, None]).sum(axis=-1))
    return mx.stack(outputs, axis=1), state


@cache
def _on_cpu() -> Rule | None:
    """The kernel for the CPU; None where numba is absent or does not go with the installed numpy."""
    try:
        from mlx_flashmoe.kernels.gated_delta_cpu import gated_delta_update
    except ImportError:
        return None
    return gated_delta_update


def _in_segments(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
    rule: Rule | None = None,
) -> tuple[mx.array, mx.array]:
    """The rule for some tokens at once; MLX's own if None is given."""
    rule = cast(Rule, rule or mx.fast.gated_delta_update)
    tokens = q.shape[1]
    outputs = []
    for start in range(0, tokens, SEGMENT):
        cut = slice(start, start + SEGMENT)
        y, state = rule(q[:, cut], k[:, cut], v[:, cut], decay[:, cut], beta[:, cut], state)
        if tokens > SEGMENT:
            mx.eval(y, state)  # or every token's state would be held at once
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1), state


# One warp holds one row of S, Dk / 32 of its elements a lane, over all tokens.
_CUDA = """
constexpr int PER_LANE = Dk / 32;
const int lane = threadIdx.x;
const int row = blockIdx.y * blockDim.y + threadIdx.y;
const int head = blockIdx.z % Hv;
const long long batch = blockIdx.z / Hv;
const long long at = ((batch * Hv + head) * Dv + row) * Dk + lane * PER_LANE;
float s[PER_LANE];
for (int i = 0; i < PER_LANE; ++i) s[i] = state[at + i];
for (int t = 0; t < tokens; ++t) {
  const long long here = batch * tokens + t;
  const long long keys = (here * Hk + head / (Hv / Hk)) * Dk + lane * PER_LANE;
  const float g = decay[here * Hv + head];
  float memory = 0;
  float key[PER_LANE];
  for (int i = 0; i < PER_LANE; ++i) {
    key[i] = k[keys + i];
    s[i] *= g;
    memory += s[i] * key[i];
  }
  for (int step = 16; step > 0; step /= 2) memory += __shfl_xor_sync(0xffffffffu, memory, step);
  const long long value = (here * Hv + head) * Dv + row;
  const float delta = (v[value] - memory) * beta[here * Hv + head];
  float sum = 0;
  for (int i = 0; i < PER_LANE; ++i) {
    s[i] += key[i] * delta;
    sum += s[i] * q[keys + i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) y[value] = sum;
}
for (int i = 0; i < PER_LANE; ++i) new_state[at + i] = s[i];
"""


@cache
def _cuda_kernel() -> nvrtc.Kernel:
    return nvrtc.Kernel(
        "flashmoe_gated_delta",
        ["q", "k", "v", "decay", "beta", "state"],
        ["y", "new_state"],
        _CUDA,
        scalars=["tokens"],
    )


def _cuda(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    batch, heads, rows, dims = state.shape
    y, state = _cuda_kernel()(
        inputs=[q, k, v, decay, beta, state],
        template=[("Dk", dims), ("Dv", rows), ("Hk", k.shape[2]), ("Hv", heads)],
        scalars=[q.shape[1]],
        grid=(32, rows, batch * heads),
        threadgroup=(32, ROWS, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return y, state
