"""The gated delta rule on the CPU, through numba: a head's state stays in a core's cache over all tokens.

A token's arithmetic is the same however many come with it, so a prompt's bits do not depend on how it is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import cpu


@lru_cache
def _rule() -> Callable[..., None]:
    def rule(q, k, v, decay, beta, state, y, low, high):  # type: ignore[no-untyped-def]
        """Heads low to high of state [B * Hv, Dv, Dk], in place; the rest as in ``gated_delta_update``."""
        tokens, value_heads, rows = v.shape[1], v.shape[2], v.shape[3]
        shared_by, dims = value_heads // k.shape[2], k.shape[3]
        for at in range(low, high):
            batch, head = at // value_heads, at % value_heads
            for t in range(tokens):
                key, query = k[batch, t, head // shared_by], q[batch, t, head // shared_by]
                keep, rate = decay[batch, t, head], beta[batch, t, head]
                for row in range(rows):
                    s = state[at, row]
                    memory = np.float32(0)
                    for i in range(dims):
                        s[i] *= keep
                        memory += s[i] * key[i]
                    delta = (v[batch, t, head, row] - memory) * rate
                    total = np.float32(0)
                    for i in range(dims):
                        s[i] += key[i] * delta
                        total += s[i] * query[i]
                    y[batch, t, head, row] = total

    four, three = "float32[:, :, :, ::1]", "float32[:, :, ::1]"
    signature = f"void({four}, {four}, {four}, {three}, {three}, {three}, {four}, int64, int64)"
    # Sums in vectors: in another order than written, but always in the same one.
    return cpu.compile_kernel(signature, rule, allow=("reassoc", "contract", "nsz"))


def gated_delta_update(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """See :func:`mlx_flashmoe.kernels.gated_delta.gated_delta_update`. Eager."""
    mx.eval(q, k, v, decay, beta, state)
    inputs = [np.ascontiguousarray(np.asarray(a)) for a in (q, k, v, decay, beta)]
    batch, heads, rows, dims = state.shape
    after = np.array(state).reshape(batch * heads, rows, dims)
    y = np.empty(v.shape, np.float32)
    work = 4 * v.size * dims
    pieces = 1 if work < cpu.SMALL else cpu.THREADS * cpu.CHUNKS_PER_THREAD
    rule = _rule()
    cpu.split(
        lambda low, high: rule(*inputs, after, y, low, high),
        np.linspace(0, batch * heads, pieces + 1).astype(np.int64).tolist(),
    )
    return mx.array(y), mx.array(after.reshape(state.shape))
