"""The module that computes the experts on a CPU."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from mlx_flashmoe.kernels import reference


@cache
def module() -> ModuleType:
    """The SIMD kernels, or the reference where numba is absent or does not go with the installed numpy."""
    try:
        return import_module("mlx_flashmoe.kernels.cpu")
    except ImportError:
        return reference
