"""Integers that compressed-tensors has packed, as Kimi publishes its experts: kept as they are, or quantized anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Array, Spec, array, write_checkpoint
from test_convert import blob, dense
from test_fp8 import expected

from mlx_flashmoe.convert import convert, verify
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import Quantization

SPEC = Spec(extras=False, layers=2)


def config(bits: int = 4, group: int = 32, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "group_size": group, "strategy": "group", "symmetric": True, "type": "int"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, **changes}}},
        "ignore": ["lm_head"],
    }


def packed(
    shape: tuple[int, int], bits: int, group: int, rng: np.random.Generator
) -> tuple[dict[str, Array], np.ndarray]:
    """A random matrix: its tensors by the end of their names, and its values."""
    integers = rng.integers(0, 1 << bits, shape)
    per_word = 32 // bits
    words = sum(
        integers[:, i::per_word].astype(np.uint64) << np.uint64(i * bits) for i in range(per_word)
    ).astype(np.uint32)
    scales = array((rng.random((shape[0], shape[1] // group)) * 0.1).astype(np.float32), "BF16")
    values = (integers - (1 << bits - 1)) * np.repeat(scales.float32().astype(np.float64), group, -1)
    tensors = {
        "weight_packed": Array("I32", words.shape, words.tobytes()),
        "weight_scale": scales,
        "weight_shape": Array("I64", (2,), np.array(shape, np.int64).tobytes()),
    }
    return tensors, values


def write(
    folder: Path, bits: int, group: int, where: str = "outside"
) -> tuple[dict[str, Array], dict[str, np.ndarray]]:
    """A checkpoint with experts and q_proj packed; the tensors, and the values of those, by name."""
    rng = np.random.default_rng(7)
    tensors: dict[str, Array] = {}
    values: dict[str, np.ndarray] = {}
    for name, a in SPEC.published("per_expert").items():
        if ".experts." not in name and "q_proj" not in name:
            tensors[name] = a
            continue
        parts, values[name] = packed((a.shape[0], a.shape[1]), bits, group, rng)
        tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    settings = SPEC.config()
    (settings if where == "outside" else settings["text_config"])["quantization_config"] = config(bits, group)
    write_checkpoint(folder, tensors=tensors, config=settings, shards=3)
    return tensors, values


@pytest.mark.parametrize("where", ["outside", "inside"])  # text_config
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32)])
def test_kept_as_they_are(tmp_path: Path, bits: int, group: int, where: str) -> None:
    tensors, values = write(tmp_path / "source", bits, group, where)
    m = convert(tmp_path / "source", tmp_path / "out", q_bits=None if bits == 4 else bits)
    for layer in range(2):
        for e in range(SPEC.experts):
            found = blob(tmp_path / "out", layer, e)
            for p in ("gate", "up", "down"):
                at = f"model.language_model.layers.{layer}.mlp.experts.{e}.{p}_proj."
                scales = tensors[at + "weight_scale"]
                assert found[p, "weight"] == tensors[at + "weight_packed"].data
                assert found[p, "scales"] == scales.data
                assert found[p, "biases"] == array(scales.float32() * -(2 ** (bits - 1)), "BF16").data
    name = "model.layers.1.self_attn.q_proj"
    assert m.dense_quantization[name] == Quantization(bits, group)
    assert m.dense_quantization[name.replace("q_", "k_")] == Quantization(bits, 64)  # it was plain
    made = {part: a for part, a in dense(tmp_path / "out").items() if name in part}
    arrays = [
        mx.load(str(tmp_path / "out" / "model.safetensors"))[f"{name}.{p}"]
        for p in ("weight", "scales", "biases")
    ]
    exact = mx.dequantize(arrays[0], *(a.astype(mx.float32) for a in arrays[1:]), group, bits)
    assert len(made) == 3
    assert np.array_equal(np.array(exact), values["model.language_model.layers.1.self_attn.q_proj.weight"])
    verify(tmp_path / "out", tmp_path / "source")


def test_fewer_bits_are_of_the_exact_values(tmp_path: Path) -> None:
    _, values = write(tmp_path / "source", 4, 32)
    convert(tmp_path / "source", tmp_path / "out", q_bits=3, q_group_size=32)
    for p in ("gate", "up", "down"):
        wanted = expected(values[f"model.language_model.layers.1.mlp.experts.2.{p}_proj.weight"], 3, 32)
        found = blob(tmp_path / "out", 1, 2)
        assert [found[p, part] for part in ("weight", "scales", "biases")] == wanted


def test_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_flashmoe.convert import units

    write(tmp_path / "source", 4, 32)
    convert(tmp_path / "source", tmp_path / "whole")
    monkeypatch.setattr(units, "PIECE", 3000)
    convert(tmp_path / "source", tmp_path / "pieces")
    assert dense(tmp_path / "whole") == dense(tmp_path / "pieces")
    assert blob(tmp_path / "whole", 1, 3) == blob(tmp_path / "pieces", 1, 3)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (config(symmetric=False), "symmetric False"),
        (config(group=48), "group_size 48"),
        (config(num_bits=3), r"\('int', 3, 'group'\)"),
        (config(strategy="channel"), r"\('int', 4, 'channel'\)"),
        ({**config(), "format": "naive-quantized"}, "format 'naive-quantized'"),
        (
            {
                **config(),
                "config_groups": {**config()["config_groups"], "b": config(8)["config_groups"]["group_0"]},
            },
            "config_groups of compressed-tensors differ",
        ),
        (config(group=128), "groups of 128 do not divide 64 inputs|has shape"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, said: dict[str, Any], error: str) -> None:
    tensors, _ = write(tmp_path / "source", 4, 32)
    write_checkpoint(
        tmp_path / "source", tensors=tensors, config={**SPEC.config(), "quantization_config": said}
    )
    for file in (tmp_path / "source").glob("model*-of-*"):
        file.unlink()
    (tmp_path / "source" / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match=error):
        convert(tmp_path / "source", tmp_path / "out")
