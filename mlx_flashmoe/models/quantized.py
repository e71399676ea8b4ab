"""Quantized dense layers: mlx.nn's, over the project's own product, which is fast on the CPU too."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import quantized_matmul


class QuantizedLinear(nn.QuantizedLinear):
    """x [..., in] -> [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        assert self.biases is not None  # affine quantization has them
        y = quantized_matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """Token ids [...] -> [..., dims]; and the head of a model whose embeddings are tied."""

    def as_linear(self, x: mx.array) -> mx.array:
        assert self.biases is not None
        return quantized_matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)


def quantize(model: nn.Module, modules: dict[str, dict[str, int]]) -> None:
    """Replaces the named Linear and Embedding modules by quantized ones, to be filled with weights.

    Args:
        modules: path -> {"bits", "group_size"}.
    """
    nn.quantize(model, class_predicate=lambda path, module: modules.get(path, False))
    ours: dict[type, type] = {nn.QuantizedLinear: QuantizedLinear, nn.QuantizedEmbedding: QuantizedEmbedding}
    for _, module in model.named_modules():
        if type(module) in ours:
            module.__class__ = ours[type(module)]
