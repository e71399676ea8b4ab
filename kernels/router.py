"""A router's choice in one launch: softmax over all experts, the most probable of them, their weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.kernels import gpu, trust

MOST_EXPERTS = 1024

# A thread counts the experts that go before its own: that is its place, and nobody else's. Ties go to the smaller
# number; what is not a number counts as impossible, for an id must be valid whatever happens.
_SOURCE = """
const float IMPOSSIBLE = fm_bits_to_float(0xff800000u);  // minus infinity
FM_ARRAY float scores[EXPERTS];
FM_ARRAY float chosen[ACTIVE];
FM_ARRAY float partial[SIMDGROUPS];
const unsigned mine = simdgroup * 32 + lane;
const size_t row = group.y;
float score = IMPOSSIBLE;
if (mine < EXPERTS) {
  const float v = float(logits[row * EXPERTS + mine]);
  score = v == v ? v : IMPOSSIBLE;
  scores[mine] = score;
}
fm_barrier();
unsigned place = 0;
float most = IMPOSSIBLE;
for (unsigned i = 0; i < EXPERTS; ++i) {
  const float other = scores[i];
  place += other > score || (other == score && i < mine);
  most = other > most ? other : most;
}
const float likely = mine < EXPERTS ? fm_exp(score - most) : 0;
const float all = fm_total(likely, partial, SIMDGROUPS, simdgroup, lane);
const bool picked = mine < EXPERTS && place < ACTIVE;
if (picked) chosen[place] = likely / all;
fm_barrier();
if (picked) {
  float sum = 0;
  for (unsigned i = 0; i < ACTIVE; ++i) sum += chosen[i];
  ids[row * ACTIVE + place] = int(mine);
  weights[row * ACTIVE + place] = NORMALIZE ? chosen[place] / sum : chosen[place];
}
"""


def route(logits: mx.array, active: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """The ``active`` most probable experts of each token.

    Args:
        logits: [..., experts], in any float dtype; the softmax is computed in float32.
        normalize: the chosen experts' weights are made to sum to 1; else they are their probabilities.

    Returns:
        integer ids [..., active], ascending on the CPU, and float32 weights [..., active].
    """
    language = gpu.for_rows(logits)
    if language is not None and right(language, logits.dtype, logits.shape[-1], active, normalize):
        return launch(language, logits, active, normalize)
    return _plain(logits, active, normalize)


def right(language: gpu.Language, dtype: mx.Dtype, experts: int, active: int, normalize: bool) -> bool:
    """Tells whether the kernel serves this router: it supports it and was found right."""

    def compare() -> str:
        rng = np.random.default_rng(0)
        order = np.stack([rng.permutation(experts) for _ in range(3)])
        # The bfloat16 from 1 on: distinct in every dtype, so that there are no ties.
        logits = mx.array((0x3F80 + order).astype(np.uint16)).view(mx.bfloat16).astype(dtype)
        got = _spread(*launch(language, logits, active, normalize), experts)
        mx.eval(got)
        with mx.stream(mx.cpu):  # what MLX would compile for this on CUDA takes seconds
            expected = _spread(*_plain(logits, active, normalize), experts)
            return trust.judge([got], [expected], trust.TOLERANCE[mx.float32])

    return experts <= MOST_EXPERTS and trust.served("router", (dtype, experts, active, normalize), compare)


def _spread(ids: mx.array, weights: mx.array, experts: int) -> mx.array:
    """The weights [rows, experts], 0 for those that were not chosen."""
    return ((ids[..., None] == mx.arange(experts)) * weights[..., None]).sum(axis=-2)


def _plain(logits: mx.array, active: int, normalize: bool) -> tuple[mx.array, mx.array]:
    scores = mx.softmax(logits.astype(mx.float32), axis=-1)
    # Ascending: the order in which a prompt's experts are added up.
    ids = mx.sort(mx.argpartition(scores, kth=-active, axis=-1)[..., -active:], axis=-1)
    weights = mx.take_along_axis(scores, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if normalize else weights


def launch(
    language: gpu.Language, logits: mx.array, active: int, normalize: bool
) -> tuple[mx.array, mx.array]:
    """On a GPU, for at most ``MOST_EXPERTS``."""
    experts = logits.shape[-1]
    threads = -(-experts // 32) * 32
    shape = (*logits.shape[:-1], active)
    ids, weights = _kernel(language, logits.dtype, experts, active, normalize)(
        inputs=[logits],
        grid=(threads, logits.size // experts, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape, shape],
        output_dtypes=[mx.int32, mx.float32],
    )
    return ids, weights


@cache
def _kernel(language: gpu.Language, dtype: mx.Dtype, experts: int, active: int, normalize: bool) -> Any:
    return gpu.row_kernel(
        language,
        "route",
        ["logits"],
        ["ids", "weights"],
        _SOURCE,
        dtype,
        EXPERTS=experts,
        ACTIVE=active,
        NORMALIZE=int(normalize),
        SIMDGROUPS=-(-experts // 32),
    )
