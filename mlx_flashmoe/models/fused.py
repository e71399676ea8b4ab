"""Elementwise pieces of a layer, each one kernel on a GPU.

A decode step is bound by the number of operations, not by their work. On the CPU they stay plain operations:
compiling there needs a C++ compiler on the user's machine, and gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakMethod

import mlx.core as mx

F = TypeVar("F", bound=Callable[..., Any])


def fused(function: F) -> F:
    """One kernel for all of ``function``'s elementwise operations, where that pays.

    It does on Metal. MLX compiles each for CUDA in every new session of the machine, for seconds: there a prompt, whose
    time they do not matter to, uses plain operations.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arrays: mx.array) -> Any:
        pays = mx.default_device() == mx.gpu and (mx.metal.is_available() or replays(arrays[0]))
        return compiled(*arrays) if pays else function(*arrays)

    return call  # type: ignore[return-value]


def replayed(method: F) -> F:
    """Where x is one token on a GPU, the method's graph is built once and then replayed.

    Building a layer's graph takes the host about as long as computing it takes a GPU.

    Args:
        method: a module's, of x [..., dims] and more arrays, all of them always of the same shapes for one token;
            depends on nothing else but weights, and does nothing else.
    """
    # The module will have what is made here: a cycle would keep a dropped model's memory.
    weak = WeakMethod(method)

    def build(*arrays: mx.array) -> Any:
        alive = weak()
        assert alive is not None
        return alive(*arrays)

    compiled = mx.compile(build)

    def call(x: mx.array, *arrays: mx.array) -> Any:
        return compiled(x, *arrays) if replays(x) else build(x, *arrays)

    return call  # type: ignore[return-value]


def replays(x: mx.array) -> bool:
    """Whether a graph for x is replayed. On the CPU, whose kernels compute at once, there is no graph."""
    return bool(x.size == x.shape[-1] and mx.default_device() == mx.gpu)


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. Spelled out, because MLX compiles its own silu."""
    return gate * mx.sigmoid(gate) * up


@fused
def gated(x: mx.array, gate: mx.array) -> mx.array:
    """x * sigmoid(gate)."""
    return x * mx.sigmoid(gate)


@fused
def plus(residual: mx.array, y: mx.array, x: mx.array) -> mx.array:
    """residual + (y + x)."""
    return residual + (y + x)


@fused
def plus_gated(residual: mx.array, y: mx.array, x: mx.array, gate: mx.array) -> mx.array:
    """residual + (y + x * sigmoid(gate))."""
    return residual + (y + x * mx.sigmoid(gate))
