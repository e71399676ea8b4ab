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


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "shape",
    [
        "DeepSeek-V3, YaRN with mscale, bias, wide values",
        "DeepSeek-V3",
        "Kimi K2",
    ],
)
def test_latent_attention_before_and_after_mlx_lm_took_it_apart(
    tmp_path: Path, shape: str, bits: int | None
) -> None:
    """Older checkpoints of the community have kv_b_proj; of newer ones there are halves, which mlx-lm runs."""
    source = save(random_model(shape), tmp_path / "src", "released")
    model, config = load_model(source, lazy=True)
    if bits is not None:
        # kv_b_proj stays whole and unquantized: mlx-lm would quantize its halves along other groups.
        def some(path: str, module: object) -> bool:
            return hasattr(module, "to_quantized") and not path.endswith(("embed_q", "unembed_out"))

        model, config = quantize_model(model, config, 32, bits, quant_predicate=some)
    apart = tmp_path / "apart"
    save_model(apart, model)
    save_config(config, apart / "config.json")
    (apart / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert convert(apart, tmp_path / "halves", q_bits=None if bits else 16).library == "mlx-lm"

    published = tmp_path / "published"
    published.mkdir()
    tensors = {}
    for file in apart.glob("*.safetensors"):
        tensors.update(mx.load(str(file)))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        keys, values = (tensors.pop(f"{at}.{half}.weight") for half in ("embed_q", "unembed_out"))
        whole = mx.concatenate([keys.swapaxes(-1, -2), values], axis=1)
        tensors[f"{at}.kv_b_proj.weight"] = mx.contiguous(whole.reshape(-1, whole.shape[-1]))
    mx.save_safetensors(str(published / "model.safetensors"), tensors, {"format": "mlx"})
    for name in ("config.json", "tokenizer.json"):
        (published / name).write_bytes(((apart if name == "config.json" else source) / name).read_bytes())
    theirs, _ = load_model(published)
    convert(published, tmp_path / "dst", q_bits=bits or 16)
    tokens = mx.array(np.random.default_rng(1).integers(0, 320, (1, 80)))
    want = np.asarray(theirs(tokens))
    for converted in ("dst", "halves"):
        ours, _ = load(tmp_path / converted)
        got = np.asarray(ours(tokens))
        assert np.abs(got - want).max() <= 2e-3
        assert (got.argmax(-1) == want.argmax(-1)).all()
