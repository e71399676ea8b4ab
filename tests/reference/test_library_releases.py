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


# model_type -> what writes it, and whether its experts are copied byte for byte (else the library computes them).
RELEASED: dict[str, tuple[Callable[[Path], None], bool]] = {
    "mixtral": (lambda folder: by_transformers("mixtral", folder), True),  # w1, w2 and w3 of each expert
    "olmoe": (lambda folder: by_transformers("olmoe", folder), True),
    "dots1": (lambda folder: by_transformers("dots1", folder), True),
    "granitemoe": (
        lambda folder: by_transformers("granitemoe", folder, **lib.GRANITE),
        False,
    ),  # gate and up in one
    "gpt_oss": (mxfp4_gpt_oss, False),
}


@pytest.mark.parametrize("model_type", RELEASED)
def test_a_release_computes_what_the_library_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    mx.disable_compile()
    write, copied = RELEASED[model_type]
    write(tmp_path / "src")
    want = lib.logits(lib.resident("mlx-lm", tmp_path / "src"), lib.TOKENS)

    computed: list[str] = []
    tensor = external._Computed.tensor
    monkeypatch.setattr(
        external._Computed, "tensor", lambda self, n, a: computed.append(n) or tensor(self, n, a)
    )
    convert(tmp_path / "src", tmp_path / "dst", q_bits=16)
    assert copied == (not computed)

    for memory in ("auto", "os"):
        ours, _ = load(tmp_path / "dst", expert_memory=memory)
        assert np.abs(np.asarray(ours(mx.array(lib.TOKENS)).astype(mx.float32)) - want).max() <= 1e-4
