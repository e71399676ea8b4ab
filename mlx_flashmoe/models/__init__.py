"""The architectures: one file each, dense layers in mlx.nn, the names of their tensors, nothing about disks.

What architectures share is beside them, a file each: ``decoder``, ``attention``, ``delta_net``, ``moe``, …
"""

from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.kernels import gpu
from mlx_flashmoe.models import (
    deepseek_v3,
    glm4_moe,
    minimax_m2,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)

# A checkpoint's model_type -> the module with its Config and Model.
ARCHITECTURES: dict[str, ModuleType] = {
    "deepseek_v3": deepseek_v3,
    "kimi_k2": deepseek_v3,
    "kimi_k25": deepseek_v3,
    "glm4_moe": glm4_moe,
    "minimax_m2": minimax_m2,
    "qwen2_moe": qwen2_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
}


def architecture(model_type: str) -> ModuleType:
    """The module of a model_type; raises FormatError with the supported ones listed."""
    if model_type not in ARCHITECTURES:
        raise FormatError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def check_kernels(model: nn.Module, dtype: mx.Dtype) -> None:
    """Compares every kernel that the model's layers use on a GPU with plain operations, before it is needed.

    Args:
        dtype: of the activations.
    """
    language = gpu.current()
    for module in model.modules() if language is not None else ():
        check = getattr(module, "check_kernels", None)
        if check is not None:
            check(language, dtype)
