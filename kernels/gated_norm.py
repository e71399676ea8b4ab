"""The norm at the end of a gated delta net: each head's output over its RMS, times a weight and silu of a gate.

One launch; the roundings are those of the published models' separate operations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlx_flashmoe.kernels import gpu, trust

_SOURCE = """
const size_t first = size_t(group.y) * DIMS;
float squares = 0;
for (unsigned at = lane; at < DIMS; at += 32) {
  const float v = float(T(y[first + at]));
  squares += v * v;
}
const float scale = fm_rsqrt(fm_sum(squares) / DIMS + EPS);
for (unsigned at = lane; at < DIMS; at += 32) {
  const T normed = T(float(T(y[first + at])) * scale);
  const T weighted = T(float(weight[at]) * float(normed));
  const float z = float(gate[first + at]);
  out[first + at] = T(float(weighted) * (z * fm_sigmoid(z)));
}
"""


def gated_norm(y: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """y / rms(y) over the last axis, times weight, times silu(gate) in float32.

    Args:
        y: float32 [..., D], rounded to gate's dtype before all else.
        gate: [..., D].
        weight: [D], in gate's dtype.

    Returns:
        [..., D] in gate's dtype.
    """
    language = gpu.for_rows(y)
    if language is not None and right(language, gate.dtype, y.shape[-1], weight.dtype):
        return launch(language, y, gate, weight, eps)
    return _plain(y, gate, weight, eps)


def right(language: gpu.Language, dtype: mx.Dtype, dims: int, weight_dtype: mx.Dtype) -> bool:
    """Tells whether the kernel serves rows of this width: it was found right."""

    def compare() -> str:
        y, gate, weight = trust.normals((3, dims), (3, dims), (dims,))
        inputs = y, gate.astype(dtype), weight.astype(weight_dtype), 1e-6
        return trust.judge([launch(language, *inputs)], [_plain(*inputs)], trust.TOLERANCE[dtype])

    return trust.served("gated_norm", (dtype, dims, weight_dtype), compare)


def _plain(y: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    rounded = y.astype(gate.dtype).astype(mx.float32)
    normed = mx.fast.rms_norm(rounded, None, eps).astype(gate.dtype)
    z = gate.astype(mx.float32)
    return (weight * normed * (z * mx.sigmoid(z))).astype(gate.dtype)


def launch(language: gpu.Language, y: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """On a GPU: a SIMD group for each row."""
    dims = y.shape[-1]
    (out,) = _kernel(language, gate.dtype, dims, eps)(
        inputs=[y, gate, weight],
        grid=(32, y.size // dims, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[gate.dtype],
    )
    return out


@cache
def _kernel(language: gpu.Language, dtype: mx.Dtype, dims: int, eps: float) -> Any:
    return gpu.row_kernel(
        language, "gated_norm", ["y", "gate", "weight"], ["out"], _SOURCE, dtype, DIMS=dims, EPS=eps
    )
