"""FP8 checkpoints as they are published: dequantized exactly, quantized as their values would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Array, Spec, array, to_bytes, write_checkpoint
from test_convert import blob, dense

from mlx_flashmoe.convert import convert, verify
from mlx_flashmoe.layout import Quantization

BLOCK = 128
PARTS = ("weight", "scales", "biases")


def float8(codes: np.ndarray) -> np.ndarray:
    """e4m3 without infinities: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    return sign * np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))


def fp8(
    shape: tuple[int, ...], rng: np.random.Generator, scales: str, block: tuple[int, int]
) -> tuple[Array, Array, np.ndarray]:
    """A random matrix (or a stack): codes, scales of its blocks, and its values in float64."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # not a number
    high, wide = block
    blocks = (*shape[:-2], -(-shape[-2] // high), -(-shape[-1] // wide))
    scale = array((rng.random(blocks) * 1e-3 + 1e-4).astype(np.float32), scales)
    spread = np.repeat(np.repeat(scale.float32().astype(np.float64), high, -2), wide, -1)
    values = float8(codes) * spread[..., : shape[-2], : shape[-1]]
    return Array("F8_E4M3", shape, codes.tobytes()), scale, values


def expected(values: np.ndarray, bits: int, group_size: int) -> list[bytes]:
    w, s, b = mx.quantize(mx.array(values.astype(np.float32)), group_size, bits)
    return [to_bytes(w), to_bytes(s.astype(mx.bfloat16)), to_bytes(b.astype(mx.bfloat16))]


# How scales are laid out -> config.json's quantization_config, and the end of their names.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        "_scale_inv",
    ),
    "rows": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        "dynamic": True,
                        "num_bits": 8,
                        "strategy": "token",
                        "type": "float",
                    },
                    "targets": ["Linear"],
                    "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "type": "float"},
                }
            },
            "ignore": ["lm_head"],
        },
        "_scale",
    ),
}
# Dims that blocks of 128 do not divide, and, fused, a block with rows of both gate and up.
SPEC = Spec(hidden=192, inner=96, shared=96, extras=False, layers=2)


def write(folder: Path, layout: str, scales: str, kind: str = "blocks") -> dict[str, np.ndarray]:
    """A checkpoint with experts and q_proj in FP8, the rest as published; the values of those, by name."""
    rng = np.random.default_rng(5)
    config, end = KINDS[kind]
    tensors: dict[str, Array] = {}
    values: dict[str, np.ndarray] = {}
    for name, a in SPEC.published(layout).items():
        if ".experts." not in name and "q_proj" not in name:
            tensors[name] = a
            continue
        block = (BLOCK, BLOCK) if kind == "blocks" else (1, a.shape[-1])
        tensors[name], tensors[name + end], values[name] = fp8(a.shape, rng, scales, block)
    write_checkpoint(
        folder, tensors=tensors, config={**SPEC.config(), "quantization_config": config}, shards=3
    )
    return values


def expert(values: dict[str, np.ndarray], layout: str, layer: int, e: int, p: str) -> np.ndarray:
    at = f"model.language_model.layers.{layer}.mlp.experts"
    if layout == "per_expert":
        return values[f"{at}.{e}.{p}_proj.weight"]
    if p == "down":
        return values[f"{at}.down_proj"][e]
    both = values[f"{at}.gate_up_proj"][e]
    return both[: SPEC.inner] if p == "gate" else both[SPEC.inner :]


@pytest.mark.parametrize("scales", ["BF16", "F32"])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_from_its_values(tmp_path: Path, layout: str, bits: int, scales: str, kind: str) -> None:
    values = write(tmp_path / "source", layout, scales, kind)
    m = convert(tmp_path / "source", tmp_path / "out", q_bits=bits, q_group_size=32)
    for layer in range(2):
        for e in range(SPEC.experts):
            found = blob(tmp_path / "out", layer, e)
            for p in ("gate", "up", "down"):
                wanted = expected(expert(values, layout, layer, e, p), bits, 32)
                assert [found[p, part] for part in PARTS] == wanted, (layer, e, p)
    q = values["model.language_model.layers.1.self_attn.q_proj.weight"]
    made = dense(tmp_path / "out")
    assert [made[f"model.layers.1.self_attn.q_proj.{part}"].data for part in PARTS] == expected(q, bits, 32)
    assert m.layouts[0].gate.scales is not None and m.layouts[0].gate.scales.dtype == "bfloat16"
    verify(tmp_path / "out", tmp_path / "source")


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_round_to_bfloat16(tmp_path: Path, layout: str, kind: str) -> None:
    values = write(tmp_path / "source", layout, "BF16", kind)
    lines: list[str] = []
    m = convert(tmp_path / "source", tmp_path / "out", q_bits=16, note=lines.append)
    assert "FP8 that is not quantized becomes bfloat16" in lines
    for p in ("gate", "up", "down"):
        wanted = array(expert(values, layout, 1, 3, p).astype(np.float32), "BF16").data
        assert blob(tmp_path / "out", 1, 3)[p, "weight"] == wanted
    assert not m.dense_quantization


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rows that begin in the middle of a block."""
    from mlx_flashmoe.convert import units

    write(tmp_path / "source", "fused", "BF16", kind)
    convert(tmp_path / "source", tmp_path / "whole", q_group_size=32)
    monkeypatch.setattr(units, "PIECE", 3000)
    m = convert(tmp_path / "source", tmp_path / "pieces", q_group_size=32)
    assert dense(tmp_path / "whole") == dense(tmp_path / "pieces")
    assert m.dense_quantization["model.layers.1.self_attn.q_proj"] == Quantization(4, 32)
