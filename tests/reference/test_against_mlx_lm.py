"""A checkpoint as the MLX community publishes it (stacked, quantized by mlx-lm) gives mlx-lm's logits."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch makes the checkpoint; pip install .[reference]")
pytest.importorskip("mlx_lm", reason="mlx-lm is the reference; pip install .[reference]")

import mlx.core as mx
import numpy as np
from checkpoints_hf import SHAPES, random_model, save
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_flashmoe import convert, load


@pytest.mark.parametrize(
    ("shape", "bits", "group"),
    [
        ("base", 4, 64),
        ("base", 8, 32),
        ("base", 3, 32),
        ("base", None, None),
        ("Qwen3-Next", 4, 64),
        ("Qwen3-Next, equal heads, bias, kernel 3", None, None),
        ("Qwen3-MoE", 4, 64),
        ("Qwen3-MoE, many heads, weights as they are", None, None),
        ("GLM-4.5", 4, 64),
        ("GLM-4.5-Air, no norms in attention, no bias, scores as they are", None, None),
        ("Qwen2-MoE", 4, 64),
        ("MiniMax-M2", 4, 64),
        ("MiniMax-M2", None, None),
    ],
)
def test_mlx_community_checkpoint(tmp_path: Path, shape: str, bits: int | None, group: int | None) -> None:
    source = save(random_model(shape), tmp_path / "src", SHAPES[shape][0].layouts[0])
    theirs, config = load_model(source, lazy=True)
    if bits is not None:
        theirs, config = quantize_model(theirs, config, group, bits)
    published = tmp_path / "published"
    save_model(published, theirs)
    save_config(config, published / "config.json")
    (published / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())

    convert(published, tmp_path / "dst", q_bits=bits or 16)
    ours, _ = load(tmp_path / "dst")
    theirs, _ = load_model(published)
    tokens = mx.array(np.random.default_rng(1).integers(0, 320, (1, 80)))
    want, got = np.asarray(theirs(tokens)), np.asarray(ours(tokens))
    assert np.abs(got - want).max() <= 2e-3
    assert (got.argmax(-1) == want.argmax(-1)).all()
