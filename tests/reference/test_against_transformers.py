"""The promise "exact": the model computes what Hugging Face transformers computes in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is the reference; pip install .[reference]")
pytest.importorskip("transformers", reason="transformers is the reference; pip install .[reference]")
pytest.importorskip("safetensors", reason="safetensors writes the checkpoints; pip install .[reference]")

import mlx.core as mx
import numpy as np
import torch
from checkpoints_hf import SHAPES, dequantized_state, random_model, reference_logits, save, with_weights

from mlx_flashmoe import convert, load

POSITIONS = 80
NEW_TOKENS = 32


def tokens_for(vocab: int, seed: int = 1, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (batch, POSITIONS))


def assert_same(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-3) -> None:
    difference = np.abs(got - want).max()
    assert difference <= tolerance, f"logits differ by {difference:.2e}"
    assert (got.argmax(-1) == want.argmax(-1)).all()


def greedy(model, prompt: np.ndarray) -> list[int]:
    cache = model.make_cache()
    logits = model(mx.array(prompt), cache)
    tokens = []
    for _ in range(NEW_TOKENS):
        tokens.append(int(mx.argmax(logits[0, -1])))
        logits = model(mx.array([[tokens[-1]]]), cache)
    return tokens


@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, layout) for shape, (family, _) in SHAPES.items() for layout in family.layouts],
)
def test_unquantized(tmp_path: Path, shape: str, layout: str) -> None:
    reference = random_model(shape)
    convert(save(reference, tmp_path / "src", layout), tmp_path / "dst", q_bits=16)
    model, _ = load(tmp_path / "dst")
    tokens = tokens_for(reference.config.vocab_size, batch=2)
    want = reference_logits(reference, tokens)
    whole = np.asarray(model(mx.array(tokens)))
    # transformers' chunked and recurrent forms differ by 5e-5 between themselves.
    assert_same(whole, want, tolerance=2e-4)

    for pieces in ([(0, 33), (33, 34), (34, 77), (77, 80)], [(i, i + 1) for i in range(POSITIONS)]):
        cache = model.make_cache()
        parts = [np.asarray(model(mx.array(tokens[:, a:b]), cache)) for a, b in pieces]
        assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= 1e-4

    prompt = tokens[:1, :20]
    with torch.no_grad():
        theirs = reference.generate(torch.from_numpy(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert greedy(model, prompt) == theirs[0, 20:].tolist()


@pytest.mark.parametrize(
    ("shape", "bits", "group"),
    [
        ("base", 4, 64),
        ("base", 2, 32),
        ("base", 3, 64),
        ("base", 6, 32),
        ("base", 8, 64),
        ("odd pattern, wide values", 4, 32),
        ("tied, one kv head, many experts", 4, 64),
        ("Qwen3-Next", 4, 64),
        ("Qwen3-Next, wide values, tied, weights as they are, YaRN", 3, 32),
        ("Qwen3-MoE", 4, 64),
        ("Qwen3-MoE, tied, bias, YaRN", 8, 32),
        ("DeepSeek-V3", 4, 32),
        ("DeepSeek-V3, YaRN with mscale, bias, wide values", 3, 64),
        ("Kimi K2", 8, 32),
        ("GLM-4.5", 4, 64),
        ("MiniMax-M2", 4, 64),
        ("Qwen2-MoE", 4, 64),
    ],
)
def test_quantized(tmp_path: Path, shape: str, bits: int, group: int) -> None:
    original = random_model(shape)
    source = save(original, tmp_path / "src", SHAPES[shape][0].layouts[0])
    convert(source, tmp_path / "dst", q_bits=bits, q_group_size=group)
    reference = with_weights(original, dequantized_state(tmp_path / "dst"))
    model, _ = load(tmp_path / "dst")
    tokens = tokens_for(original.config.vocab_size)
    assert_same(np.asarray(model(mx.array(tokens))), reference_logits(reference, tokens))
    prompt = tokens[:, :20]
    with torch.no_grad():
        theirs = reference.generate(torch.from_numpy(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert greedy(model, prompt) == theirs[0, 20:].tolist()


@pytest.mark.parametrize("shape", ["base", "Qwen3-Next", "Qwen3-MoE", "GLM-4.5", "DeepSeek-V3", "MiniMax-M2"])
def test_released_in_bfloat16(tmp_path: Path, shape: str) -> None:
    """bfloat16 weights are those of the reference exactly; (1 + weight) norms lose nothing."""
    original = random_model(shape).to(torch.bfloat16)
    source = save(original, tmp_path / "src", SHAPES[shape][0].layouts[0], torch.bfloat16)
    convert(source, tmp_path / "dst", q_bits=16)
    model, _ = load(tmp_path / "dst")
    # Not original.float(): .to(bfloat16) has rounded the rotary frequencies too, which are no weights.
    # That alone is 4e-3 on these logits.
    reference = with_weights(original, original.float().state_dict())
    tokens = tokens_for(reference.config.vocab_size)
    assert_same(np.asarray(model(mx.array(tokens))), reference_logits(reference, tokens), tolerance=2e-4)


@pytest.mark.parametrize(
    "shape",
    [
        "base",
        "Qwen3-MoE, many heads, weights as they are",
        "GLM-4.5, groups, two shared experts, three layers without experts, tied",
        "DeepSeek-V3",
        "MiniMax-M2",
    ],
)
def test_fewer_active_experts(tmp_path: Path, shape: str) -> None:
    reference = random_model(shape)
    convert(save(reference, tmp_path / "src", "per expert"), tmp_path / "dst", q_bits=16)
    model, _ = load(tmp_path / "dst", active_experts=2)
    for layer in reference.model.layers:
        if hasattr(layer.mlp, "gate"):  # not where a layer has no experts
            layer.mlp.gate.top_k = 2
    tokens = tokens_for(reference.config.vocab_size)
    assert_same(np.asarray(model(mx.array(tokens))), reference_logits(reference, tokens), tolerance=2e-4)


@pytest.mark.parametrize(
    "shape", ["tied, one kv head, many experts", "Qwen3-Next", "Qwen3-MoE", "GLM-4.5", "DeepSeek-V3"]
)
def test_residency_never_changes_a_bit(tmp_path: Path, shape: str) -> None:
    original = random_model(shape)
    convert(save(original, tmp_path / "src", "per expert"), tmp_path / "dst", q_bits=4, q_group_size=32)
    tokens = mx.array(tokens_for(original.config.vocab_size))
    want = None
    for memory in ("auto", "os", "400kB", "1MB"):
        model, _ = load(tmp_path / "dst", expert_memory=memory)
        for _ in ("cold", "warm"):
            cache = model.make_cache()
            logits = [model(tokens[:, :70], cache)]
            logits += [model(tokens[:, i : i + 1], cache) for i in range(70, POSITIONS)]
            got = np.asarray(mx.concatenate(logits, axis=1))
            want = got if want is None else want
            assert np.array_equal(got, want), memory
        resident = model.arena.resident
        assert resident == (memory == "auto")
