"""Empty checkpoints with the shapes of published models, for doctor: every header, and no weights on the disk.

    python examples/published_shapes.py DIR
    python -m mlx_flashmoe doctor DIR/Qwen3.5-35B-A3B-4bit --sim-memory 48GB --sim-disk 5GB/s --sim-bandwidth 273GB/s

4 bits in mlx-community's layout, the text model alone. The files are sparse: they have the true sizes, and take a few
kilobytes. Nothing can be converted from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from true_shapes import TRUE_VOCABULARY, Entry, config, tensors

from mlx_flashmoe.convert.safetensors import DTYPE_BITS, build_header

SHARD_BYTES = 5 * 10**9
# The values that differ from the 397B's configuration, from the models' cards. The 122B's linear_num_value_heads is
# derived: with 64 the text model has the 122B parameters of its name, with 32 1.6B fewer.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3.5-35B-A3B-4bit": {
        "hidden_size": 2048,
        "linear_num_value_heads": 32,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "shared_expert_intermediate_size": 512,
    },
    "Qwen3.5-122B-A10B-4bit": {
        "hidden_size": 3072,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
    },
    "Qwen3.5-397B-A17B-4bit": {"num_hidden_layers": 60},
}


def write(folder: Path, model: str) -> Path:
    """Writes the checkpoint ``model``, a key of MODELS, into a new folder of that name; returns its path."""
    settings = config(1, TRUE_VOCABULARY)
    text = settings["text_config"]
    text.update(MODELS[model])
    layers = text["num_hidden_layers"]
    text["layer_types"] = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    settings["quantization"] = {"bits": 4, "group_size": 64, "mode": "affine"}
    for i in range(layers):
        for gate in ("gate", "shared_expert_gate"):
            path = f"language_model.model.layers.{i}.mlp.{gate}"
            settings["quantization"][path] = {"bits": 8, "group_size": 64}
    out = folder / model
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(settings))
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in tensors(settings, "mlx4"):
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _bytes(entry)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        path = out / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = build_header(shard)
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(map(_bytes, shard)))
        weight_map.update(dict.fromkeys((name for name, _, _ in shard), path.name))
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out


def _bytes(entry: Entry) -> int:
    return math.prod(entry[2]) * DTYPE_BITS[entry[1]] // 8


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    for made in MODELS:
        print(write(parser.parse_args().folder, made))
