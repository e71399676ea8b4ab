"""A residual sum and the RMS norm of it in one launch, and the norm alone.

A decode step is bound by the number of launches, not by their work. The norm (Zhang and Sennrich, "Root Mean Square
Layer Normalization", arXiv:1910.07467) is computed in float32 whatever the activations are, with a weight in
float32: bfloat16 has no room for the 1 + w of published checkpoints. MLX's own would convert before and after it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlx_flashmoe.kernels import gpu, trust

EACH = 8  # elements a thread takes where there are enough
MOST_THREADS = 1024

_SOURCE = """
FM_ARRAY float partial[SIMDGROUPS];
const size_t row = size_t(group.y) * DIMS;
float held[EACH];
float squares = 0;
for (unsigned i = 0; i < EACH; ++i) {
  const unsigned at = (i * SIMDGROUPS + simdgroup) * 32 + lane;
  held[i] = 0;
  if (at < DIMS) {
    LOAD
    squares += held[i] * held[i];
  }
}
const float scale = fm_rsqrt(fm_total(squares, partial, SIMDGROUPS, simdgroup, lane) / DIMS + EPS);
for (unsigned i = 0; i < EACH; ++i) {
  const unsigned at = (i * SIMDGROUPS + simdgroup) * 32 + lane;
  if (at < DIMS) normed[row + at] = T(held[i] * scale * float(weight[at]));
}
"""
_LOAD = "held[i] = float(x[row + at]);"
_ADD = """const T sum = T(float(x[row + at]) + float(y[row + at]));
    total[row + at] = sum;
    held[i] = float(sum);"""


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis, computed in float32.

    Args:
        x: [..., D] activations.
        weight: [D]; float32 where published checkpoints have weight - 1.

    Returns:
        [..., D] in x's dtype.
    """
    language = gpu.for_rows(x)
    if language is None or not right(language, x.dtype, x.shape[-1], weight.dtype):
        return _plain_norm(x, weight, eps)
    (normed,) = launch(language, x, None, weight, eps)
    return normed


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x + y, and :func:`rms_norm` of that. x and y have one shape and dtype."""
    language = gpu.for_rows(x)
    if language is None or not right(language, x.dtype, x.shape[-1], weight.dtype):
        return _plain(x, y, weight, eps)
    total, normed = launch(language, x, y, weight, eps)
    return total, normed


def right(language: gpu.Language, dtype: mx.Dtype, dims: int, weight_dtype: mx.Dtype) -> bool:
    """Tells whether both kernels serve rows of this width: they were found right."""

    def compare() -> str:
        x, y, weight = trust.normals((3, dims), (3, dims), (dims,))
        x, y, weight, eps = x.astype(dtype), y.astype(dtype), weight.astype(weight_dtype), 1e-6
        got = [*launch(language, x, None, weight, eps), *launch(language, x, y, weight, eps)]
        expected = [_plain_norm(x, weight, eps), *_plain(x, y, weight, eps)]
        return trust.judge(got, expected, trust.TOLERANCE[dtype])

    return trust.served("norm", (dtype, dims, weight_dtype), compare)


def _plain(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    total = x + y
    return total, _plain_norm(total, weight, eps)


def _plain_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def launch(
    language: gpu.Language, x: mx.array, y: mx.array | None, weight: mx.array, eps: float
) -> list[mx.array]:
    """On a GPU: [sum, norm of it] if there is a y, else [norm]."""
    dims = x.shape[-1]
    threads = min(MOST_THREADS, -(-dims // (32 * EACH)) * 32)
    outputs = 1 if y is None else 2
    normed: list[mx.array] = _kernel(language, x.dtype, y is not None, dims, threads, eps)(
        inputs=[x, weight] if y is None else [x, y, weight],
        grid=(threads, x.size // dims, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape] * outputs,
        output_dtypes=[x.dtype] * outputs,
    )
    return normed


@cache
def _kernel(language: gpu.Language, dtype: mx.Dtype, add: bool, dims: int, threads: int, eps: float) -> Any:
    return gpu.row_kernel(
        language,
        "add_norm" if add else "norm",
        ["x", "y", "weight"] if add else ["x", "weight"],
        ["total", "normed"] if add else ["normed"],
        _SOURCE.replace("LOAD", _ADD if add else _LOAD),
        dtype,
        DIMS=dims,
        SIMDGROUPS=threads // 32,
        EACH=-(-dims // threads),
        EPS=eps,
    )
