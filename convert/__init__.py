"""The converter: a checkpoint in, a folder of expert blobs and dense safetensors out."""
