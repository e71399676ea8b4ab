"""Numbers of the activations' dtypes without MLX's conversions, and how far a result is from the exact one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, Any]

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def to_bfloat16(a: Array) -> Array:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """The inverse, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(a: Array, dtype: str) -> Array:
    """float array -> the array stored for it; bfloat16 as uint16."""
    if dtype == "bfloat16":
        return to_bfloat16(a)
    return np.asarray(a, np.float32 if dtype == "float32" else np.float16)


def decode(a: Array) -> Array:
    """The inverse of encode, in float64."""
    return (from_bfloat16(a) if a.dtype == np.uint16 else a).astype(np.float64)


def rounded(a: Array, dtype: str) -> Array:
    """The nearest numbers of a dtype, in float64."""
    return decode(encode(a, dtype))


def to_mlx(a: Array) -> mx.array:
    """An encoded array, bit for bit."""
    return mx.array(a).view(mx.bfloat16) if a.dtype == np.uint16 else mx.array(a)


def to_float64(a: mx.array) -> Array:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def error(out: Array, expected: Array) -> float:
    """|out - expected| / |expected|, the larger of the whole array's and the worst row's. NaN is infinite."""
    difference = np.linalg.norm(out - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    worst = max(float(difference.max()), float(np.abs(out - expected).max() / np.abs(expected).max()))
    return worst if np.isfinite(worst) else float("inf")
