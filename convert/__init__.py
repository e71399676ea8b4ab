"""The converter: a checkpoint in, a folder of expert blobs and dense safetensors out."""

from mlx_flashmoe.convert.repack import convert

__all__ = ["convert"]
