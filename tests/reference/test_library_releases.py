"""Checkpoints as they are published: under other names than a library's, with experts one by one or fused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch makes the checkpoints; pip install .[reference]")
pytest.importorskip("mlx_lm", reason="mlx-lm is a reference; pip install .[reference]")

import library_models as lib
import mlx.core as mx
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlx_flashmoe import convert, load
from mlx_flashmoe.convert import external

NOT_THEIRS = ("rope_", "partial_", "head_dim", "q_lora", "kv_lora", "qk_", "v_head", "scoring", "topk_method")
SETTINGS = {name: value for name, value in lib.COMMON.items() if not name.startswith(NOT_THEIRS)}


def by_transformers(model_type: str, folder: Path, **own: Any) -> None:
    """A small random model as transformers saves it: with the names of its first release."""
    torch.manual_seed(0)
    settings = {**SETTINGS, "dtype": "float32", "pad_token_id": 0, **own}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(folder)
    path = folder / "config.json"
    # Released config.json files have it here, which is where the library looks.
    path.write_text(json.dumps({"rope_theta": 10000.0, **json.loads(path.read_text())}))


def mxfp4_gpt_oss(folder: Path) -> None:
    """The release of gpt-oss: gate's and up's rows take turns in one matrix of MXFP4 blocks."""
    config = lib.config("mlx-lm", "gpt_oss")
    lib.make("mlx-lm", config, folder, None)
    tensors = mx.load(str(folder / "model.safetensors"))
    layers = [
        name.removesuffix("gate_proj.weight") for name in tensors if name.endswith("experts.gate_proj.weight")
    ]
    for at in layers:
        part = {
            n: [tensors.pop(f"{at}{p}_proj.{n}") for p in ("gate", "up", "down")] for n in ("weight", "bias")
        }
        for n, (gate, up, down) in part.items():
            both = mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
            for name, value in (("gate_up_proj", both), ("down_proj", down)):
                if n == "bias":
                    tensors[f"{at}{name}_bias"] = value
                    continue
                blocks, scales = mx.quantize(value, mode="mxfp4")
                tensors[f"{at}{name}_blocks"] = blocks.view(mx.uint8).reshape(*scales.shape, 16)
                tensors[f"{at}{name}_scales"] = scales
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "model.safetensors.index.json").unlink()
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn"],
    }
    (folder / "config.json").write_text(json.dumps(config))


V4_NAMES = {
    "language_model.model.layers.": "layers.",
    "language_model.model.embed_tokens.": "embed.",
    "language_model.model.norm.": "norm.",
    "language_model.model.hc_head.": "hc_head_",
    "language_model.lm_head.": "head.",
    ".attn_hc.": ".hc_attn_",
    ".ffn_hc.": ".hc_ffn_",
    "gate.e_score_correction_bias": "gate.bias",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
V4_FP8 = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")


def fp4_deepseek_v4(folder: Path) -> None:
    """DeepSeek-V4's tensors: experts of FP4 packed in int8, others of FP8 in blocks of 128 x 128, all scales E8M0.

    Its config.json says no ``weight_block_size``: mlx-vlm 0.7.10 takes its experts for FP8 if it does.
    """
    wide = dict.fromkeys(
        ("hidden_size", "moe_intermediate_size", "q_lora_rank", "head_dim", "o_lora_rank"), 128
    )
    config = {**lib.config("mlx-vlm", "deepseek_v4"), **wide, "qk_rope_head_dim": 32, "index_head_dim": 32}
    lib.make("mlx-vlm", config, folder, None)
    released: dict[str, tuple[str, mx.array]] = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        for ours, theirs in V4_NAMES.items():
            name = name.replace(ours, theirs)
        path, _, part = name.rpartition(".")
        if ".switch_mlp." in name:
            for e, matrix in enumerate(value):
                codes, scales = mx.quantize(matrix, mode="mxfp4")
                one = path.replace("switch_mlp", f"experts.{e}")
                released |= {
                    f"{one}.weight": ("I8", codes.view(mx.int8)),
                    f"{one}.scale": ("F8_E8M0", scales),
                }
        elif path.endswith(V4_FP8) and part == "weight" and ".compressor." not in path:
            matrix = value.reshape(-1, value.shape[-1])
            blocks = mx.full([side // 128 for side in matrix.shape], 121, mx.uint8)  # 2**-6
            released |= {
                f"{path}.weight": ("F8_E4M3", mx.to_fp8(matrix * 64)),
                f"{path}.scale": ("F8_E8M0", blocks),
            }
        else:
            released[name] = ({mx.float32: "F32", mx.int32: "I32"}[value.dtype], value)
    write_safetensors(folder / "model.safetensors", released)
    (folder / "model.safetensors.index.json").unlink()
    config["quantization_config"] = {
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_safetensors(path: Path, arrays: dict[str, tuple[str, mx.array]]) -> None:
    """Also with dtypes that MLX has no name for."""
    data = [np.array(array.reshape(-1).view(mx.uint8)).tobytes() for _, array in arrays.values()]
    ends = np.cumsum([len(one) for one in data]).tolist()
    header = {
        name: {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end - len(one), end]}
        for (name, (dtype, array)), one, end in zip(arrays.items(), data, ends)
    }
    text = json.dumps(header).encode()
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *data]))


# model_type -> what writes it, and whether its experts are copied byte for byte (else the library computes them).
RELEASED: dict[str, tuple[str, Callable[[Path], None], bool]] = {
    "mixtral": (
        "mlx-lm",
        lambda folder: by_transformers("mixtral", folder),
        True,
    ),  # w1, w2, w3 of each expert
    "olmoe": ("mlx-lm", lambda folder: by_transformers("olmoe", folder), True),
    "dots1": ("mlx-lm", lambda folder: by_transformers("dots1", folder), True),
    # gate and up in one matrix
    "granitemoe": ("mlx-lm", lambda folder: by_transformers("granitemoe", folder, **lib.GRANITE), False),
    "gpt_oss": ("mlx-lm", mxfp4_gpt_oss, False),
    "deepseek_v4": ("mlx-vlm", fp4_deepseek_v4, True),
}


@pytest.mark.parametrize("model_type", RELEASED)
def test_a_release_computes_what_the_library_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    mx.disable_compile()
    library, write, copied = RELEASED[model_type]
    write(tmp_path / "src")
    want = lib.logits(lib.resident(library, tmp_path / "src"), lib.TOKENS)

    computed: list[str] = []
    tensor = external._Computed.tensor
    monkeypatch.setattr(
        external._Computed, "tensor", lambda self, n, a: computed.append(n) or tensor(self, n, a)
    )
    before = (tmp_path / "src" / "model.safetensors").stat().st_mtime_ns
    convert(tmp_path / "src", tmp_path / "dst", q_bits=16)
    assert copied == (
        not any("experts" in name or "switch_mlp" in name for name in computed if "shared" not in name)
    )
    assert (tmp_path / "src" / "model.safetensors").stat().st_mtime_ns == before

    for memory in ("auto", "os"):
        ours, _ = load(tmp_path / "dst", expert_memory=memory)
        assert np.abs(np.asarray(ours(mx.array(lib.TOKENS)).astype(mx.float32)) - want).max() <= 1e-4
