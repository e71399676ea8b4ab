"""The converter: a checkpoint in, a folder of expert blobs and dense safetensors out."""

from mlx_flashmoe.convert.repack import convert
from mlx_flashmoe.convert.verify import verify

__all__ = ["convert", "verify"]
