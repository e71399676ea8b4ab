"""Facts about a model, for lists of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_flashmoe.layout import Manifest


@dataclass(frozen=True)
class Facts:
    """The contents of a converted folder.

    Attributes:
        family: the checkpoint's model_type.
        parameters: of all experts and everything else.
        bits: of an expert's weights; 16 where they are not quantized.
        size: of the files, in bytes.
    """

    family: str
    parameters: int
    bits: int
    size: int

    @classmethod
    def of(cls, manifest: Manifest, dense: Mapping[str, mx.array]) -> Facts:
        """Counts them.

        Args:
            dense: the tensors that are not experts', by name.
        """
        parameters = 0
        for entry in manifest.layers:
            matrices = manifest.layout_of(entry).projections.values()
            parameters += entry.num_experts * sum(
                m.out_dims * (m.in_dims + (m.bias is not None)) for m in matrices
            )
        for name, tensor in dense.items():
            module, _, kind = name.rpartition(".")
            quantization = manifest.dense_quantization.get(module)
            if quantization is None or not quantization.quantized:
                parameters += tensor.size
            elif kind == "weight":  # scales and biases are no parameters
                parameters += tensor.size * 32 // quantization.bits
        bits = max(m.bits for m in manifest.layout_of(manifest.layers[-1]).projections.values())
        return cls(manifest.model_type, parameters, bits, manifest.expert_bytes + manifest.dense_bytes)

    @property
    def parameter_size(self) -> str:
        """For people: "397B", "1.8M"."""
        n, unit = float(self.parameters), ""
        for larger in ("K", "M", "B", "T"):
            if n < 1000:
                break
            n, unit = n / 1000, larger
        return f"{n:.0f}{unit}" if n >= 100 or not unit else f"{n:.1f}{unit}"

    @property
    def quantization(self) -> str:
        """For people: "4-bit", "BF16"."""
        return "BF16" if self.bits == 16 else f"{self.bits}-bit"


UNKNOWN = Facts("unknown", 0, 16, 0)
"""Facts about a model that was not loaded from a folder."""
