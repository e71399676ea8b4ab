"""Converts a checkpoint with the layer shapes of Qwen3.5-397B-A17B, made up here, and measures the conversion.

    python examples/true_shapes.py --layers 2 --layout mlx4            3.6 GB a layer
    python examples/true_shapes.py --layers 1 --layout fused           12.9 GB a layer, bfloat16

Then generates from the result. Prints the peak resident memory of the converting and of the generating process,
as the operating system counts it, and the rates. The weights repeat a random block: their values mean nothing,
their sizes and the work they cause are the real ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_flashmoe.convert.binding import describe
from mlx_flashmoe.convert.safetensors import DTYPE_BITS, build_header

TRUE_VOCABULARY = 248320
BLOCK = 16 << 20
Entry = tuple[str, str, tuple[int, ...]]


def config(layers: int, vocabulary: int) -> dict[str, Any]:
    """The 397B's config.json, with fewer layers: all linear attention but the last (with two or more)."""
    kinds = ["linear_attention"] * layers
    if layers > 1:
        kinds[-1] = "full_attention"
    text = {
        "attention_bias": False,
        "eos_token_id": 248044,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 1024,
        "num_attention_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "shared_expert_intermediate_size": 1024,
        "vocab_size": vocabulary,
    }
    return {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": False}


def tensors(settings: dict[str, Any], layout: str) -> list[Entry]:
    """(name, dtype, shape) of everything in the checkpoint, as published in that layout."""
    architecture = describe(settings["model_type"], settings, "config.json")
    experts, hidden = architecture.num_experts, architecture.hidden_size
    inner = architecture.intermediate_size
    out: list[Entry] = []

    def quantized(path: str, shape: tuple[int, ...], bits: int) -> None:
        groups = (*shape[:-1], shape[-1] // 64)
        out.append((f"{path}.weight", "U32", (*shape[:-1], shape[-1] * bits // 32)))
        out.extend([(f"{path}.scales", "BF16", groups), (f"{path}.biases", "BF16", groups)])

    for module in architecture.modules:
        path = f"language_model.{module.path}"
        if layout == "fused":
            path = module.path.replace("model.", "model.language_model.", 1)
        name = path if module.kind == "plain" else f"{path}.weight"
        if module.kind in ("linear", "router") and layout == "mlx4":
            quantized(path, module.shape, 8 if module.kind == "router" else 4)
        elif module.kind == "conv" and layout == "fused":
            out.append((name, "BF16", (module.shape[0], 1, module.shape[1])))
        else:
            out.append((name, "BF16", module.shape))
    for i in architecture.moe_layers:
        if layout == "fused":
            at = f"model.language_model.layers.{i}.mlp.experts"
            out.append((f"{at}.gate_up_proj", "BF16", (experts, 2 * inner, hidden)))
            out.append((f"{at}.down_proj", "BF16", (experts, hidden, inner)))
        else:
            at = f"language_model.model.layers.{i}.mlp.switch_mlp"
            quantized(f"{at}.gate_proj", (experts, inner, hidden), 4)
            quantized(f"{at}.up_proj", (experts, inner, hidden), 4)
            quantized(f"{at}.down_proj", (experts, hidden, inner), 4)
    return out


def content(name: str, dtype: str, layout: str, rng: np.random.Generator) -> bytes:
    """A block to fill a tensor with: sizes of values that keep activations finite in a model of a few layers."""

    def bfloat16(values: np.ndarray) -> bytes:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()

    n = BLOCK // 2
    if dtype == "U32":
        return rng.bytes(BLOCK)
    if name.endswith(".scales"):
        return bfloat16(np.full(n, 1 / 512))
    if name.endswith(".biases"):
        return bfloat16(np.full(n, -7.5 / 512))
    if "norm" in name:
        return bfloat16(np.full(n, 0.0 if layout == "fused" and "linear_attn" not in name else 1.0))
    return bfloat16(rng.standard_normal(n) / 64)


def make_checkpoint(folder: Path, layers: int, layout: str, vocabulary: int) -> int:
    """Writes the checkpoint, in files of about 5 GB; returns its bytes."""
    settings = config(layers, vocabulary)
    if layout == "mlx4":
        settings["quantization"] = {"bits": 4, "group_size": 64, "mode": "affine"}
        for i in range(layers):
            for name in ("gate", "shared_expert_gate"):
                path = f"language_model.model.layers.{i}.mlp.{name}"
                settings["quantization"][path] = {"bits": 8, "group_size": 64}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    shards: list[list[Entry]] = [[]]
    size = total = 0
    for entry in tensors(settings, layout):
        nbytes = math.prod(entry[2]) * DTYPE_BITS[entry[1]] // 8
        if shards[-1] and size + nbytes > 5e9:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
        total += nbytes
    rng = np.random.default_rng(0)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as f:
            f.write(build_header(shard))
            for name, dtype, shape in shard:
                block = content(name, dtype, layout, rng)
                left = math.prod(shape) * DTYPE_BITS[dtype] // 8
                while left:
                    left -= f.write(block[:left])
                weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return total


CONVERT = """
import json, sys, time
from mlx_flashmoe import system
from mlx_flashmoe.convert import convert
started = time.perf_counter()
convert(sys.argv[1], sys.argv[2], q_bits=json.loads(sys.argv[3]))
seconds = time.perf_counter() - started
print(json.dumps({"peak": system.peak_memory(), "seconds": seconds}))
"""


def measure_conversion(source: Path, destination: Path, q_bits: int | None) -> dict[str, float]:
    """Converts in a process of its own: {"peak": bytes resident at most, "seconds": …}."""
    command = [sys.executable, "-c", CONVERT, str(source), str(destination), json.dumps(q_bits)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    measured: dict[str, float] = json.loads(result.stdout)
    return measured


GENERATE = """
import json, sys, time
import mlx.core as mx, numpy as np
from mlx_flashmoe import load, system
from mlx_flashmoe.generate import generate_step
model, _ = load(sys.argv[1], expert_memory=sys.argv[2])
cache = model.make_cache()
prompt = np.random.default_rng(0).integers(0, model.vocab_size, int(sys.argv[3]))
started = time.perf_counter()
tokens = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=8, prompt_cache=cache)]
seconds = time.perf_counter() - started
planned = model.plan.dense + model.plan.arena + sum(layer.nbytes for layer in cache)
peak, read = system.peak_memory(), model.stats().bytes_read
print(json.dumps({"peak": peak, "planned": planned, "seconds": seconds, "read": read}))
"""


def measure_generation(folder: Path, expert_memory: str, prompt: int) -> dict[str, float]:
    """Generates 8 tokens after a prompt, in a process of its own.

    Returns:
        "peak" bytes resident at most, "planned" bytes of dense part, arena and KV cache, "read" expert bytes,
        "seconds".
    """
    command = [sys.executable, "-c", GENERATE, str(folder), expert_memory, str(prompt)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    measured: dict[str, float] = json.loads(result.stdout)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--layout", choices=["mlx4", "fused"], default="mlx4")
    parser.add_argument("--vocabulary", type=int, default=TRUE_VOCABULARY)
    parser.add_argument("--q-bits", type=int)
    parser.add_argument("--expert-memory", default="1GB")
    parser.add_argument("--prompt", type=int, default=300, help="tokens")
    parser.add_argument("--work", type=Path, help="folder for a few tens of GB; default: a temporary one")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="true-shapes-", dir=args.work))
    try:
        started = time.perf_counter()
        size = make_checkpoint(work / "source", args.layers, args.layout, args.vocabulary)
        print(f"checkpoint: {size / 1e9:.2f} GB, made in {time.perf_counter() - started:.0f} s", flush=True)
        measured = measure_conversion(work / "source", work / "converted", args.q_bits)
        print(
            f"conversion: peak resident memory {measured['peak'] / 1e9:.3f} GB, {measured['seconds']:.1f} s, "
            f"{size / measured['seconds'] / 1e6:.0f} MB/s of the checkpoint",
            flush=True,
        )
        measured = measure_generation(work / "converted", args.expert_memory, args.prompt)
        print(
            f"generation: peak resident memory {measured['peak'] / 1e9:.3f} GB; dense part, arena and KV cache are "
            f"{measured['planned'] / 1e9:.3f} GB, so {(measured['peak'] - measured['planned']) / 1e9:.3f} GB besides; "
            f"{args.prompt} prompt tokens and 8 more took {measured['seconds']:.1f} s "
            f"and read {measured['read'] / 1e9:.2f} GB"
        )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
