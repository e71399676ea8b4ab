"""The gated delta rule in float64, token by token as it is defined."""

from __future__ import annotations

import numpy as np

from mlx_flashmoe.selftest.floats import Array

TOLERANCE = 1e-5  # of a result's norm


def random_inputs(
    batch: int, tokens: int, key_heads: int, value_heads: int, key_dims: int, value_dims: int
) -> list[Array]:
    """float32 arguments of ``kernels.gated_delta.gated_delta_update``, in order."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((batch, tokens, key_heads, key_dims)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((batch, tokens, value_heads, value_dims))
    decay, beta = (rng.uniform(0.3, 1, (batch, tokens, value_heads)) for _ in range(2))
    state = rng.standard_normal((batch, value_heads, value_dims, key_dims))
    return [a.astype(np.float32) for a in (q, k, v, decay, beta, state)]


def definition(q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """For each token: S = decay * S; S += beta * (v - S k) k^T; y = S q. Returns all y, and S after the last."""
    q, k, v, decay, beta, s = (a.astype(np.float64) for a in (q, k, v, decay, beta, state))
    q, k = (np.repeat(a, v.shape[2] // a.shape[2], axis=2) for a in (q, k))
    y = np.empty(v.shape)
    for t in range(v.shape[1]):
        s = s * decay[:, t, :, None, None]
        delta = (v[:, t] - (s @ k[:, t, :, :, None])[..., 0]) * beta[:, t, :, None]
        s = s + delta[..., None] * k[:, t, :, None, :]
        y[:, t] = (s @ q[:, t, :, :, None])[..., 0]
    return y, s


def error(got: tuple[Array, ...], want: tuple[Array, ...]) -> float:
    """The larger of the two results' differences, of their norms. NaN is infinite."""
    worst = max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(got, want))
    return worst if np.isfinite(worst) else float("inf")
