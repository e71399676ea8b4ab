"""Layers whose graph is built once and replayed, as on a GPU; here on the CPU with kernels that are plain MLX."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashmoe import convert, load
from mlx_flashmoe.kernels import gated_delta, on_cpu, reference
from mlx_flashmoe.models import fused
from mlx_flashmoe.selftest.checkpoints import VOCABULARY, write_checkpoint

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or "MLX_DISABLE_COMPILE" in os.environ or mx.default_device() != mx.cpu,
    reason="MLX compiles for the CPU with a C++ compiler",
)


def logits(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, int]:
    """Of tokens one by one, after a prompt; and how often Python built a layer's graph."""
    model, _ = load(folder, dtype=mx.float32, expert_memory="1GB")
    cache = model.make_cache()
    mx.eval(model(mx.array(tokens[None, :5]), cache))
    layer = model.model.model.layers[-1].mlp
    built = 0
    plain = type(layer).route

    def counted(self: object, x: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal built
        built += self is layer
        return plain(self, x)

    type(layer).route = counted
    try:
        rows = [np.array(model(mx.array([[t]]), cache)[0, 0]) for t in tokens[5:].tolist()]
    finally:
        type(layer).route = plain
    return np.stack(rows), built


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "glm4_moe"])
def test_replaying_a_layer_changes_nothing(
    tmp_path: Path, model_type: str, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source", model_type)
    convert(tmp_path / "source", tmp_path / "model", q_bits=4 if quantized else 16)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 15)
    monkeypatch.setattr(on_cpu, "module", lambda: reference)
    monkeypatch.setattr(gated_delta, "_on_cpu", lambda: None)
    want, built = logits(tmp_path / "model", tokens)
    assert built == 10
    monkeypatch.setattr(fused, "replays", lambda x: x.size == x.shape[-1])
    got, built = logits(tmp_path / "model", tokens)
    assert built == 1
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
