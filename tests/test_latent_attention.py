"""Latent attention: both ways of computing it are the paper's, keep what the paper keeps, and take what is stated."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import Array, array, quantized, random_weights, write_checkpoint
from mlx.utils import tree_flatten
from test_fp8 import KINDS, fp8

from mlx_flashmoe import convert, load
from mlx_flashmoe.convert.binding import describe
from mlx_flashmoe.errors import FormatError, SourceError
from mlx_flashmoe.kernels import head_products
from mlx_flashmoe.models import architecture, latent_attention
from mlx_flashmoe.models.cache import LatentCache
from mlx_flashmoe.models.config import mixed_at_once
from mlx_flashmoe.models.latent_attention import LatentAttention
from mlx_flashmoe.models.quantized import quantize
from mlx_flashmoe.models.together import join
from mlx_flashmoe.prefix_cache import PrefixCache

SMALL: dict[str, Any] = dict(
    model_type="deepseek_v3",
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=24,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    moe_intermediate_size=64,
    intermediate_size=96,
    first_k_dense_replace=1,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
# What the released config.json files say.
ALIKE: dict[str, Any] = dict(
    hidden_size=7168,
    num_hidden_layers=61,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=2048,
    intermediate_size=18432,
    num_experts_per_tok=8,
    n_shared_experts=1,
    norm_topk_prob=True,
    moe_layer_freq=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    rms_norm_eps=1e-6,
)
YARN = dict(type="yarn", original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0, beta_slow=1)
DEEPSEEK_V3: dict[str, Any] = dict(
    **ALIKE,
    model_type="deepseek_v3",
    vocab_size=129280,
    num_attention_heads=128,
    num_key_value_heads=128,
    n_routed_experts=256,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=3,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=163840,
    rope_theta=10000,
    rope_scaling=dict(YARN, factor=40, beta_fast=32),
)
KIMI_K2: dict[str, Any] = dict(
    **ALIKE,
    model_type="kimi_k2",
    vocab_size=163840,
    num_attention_heads=64,
    num_key_value_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    max_position_embeddings=131072,
    rope_theta=50000.0,
    rope_scaling=dict(YARN, factor=32.0, beta_fast=1.0),
)


def config(**changes: Any) -> latent_attention.LatentConfig:
    return architecture("deepseek_v3").Config.from_dict({**SMALL, **changes})


def layer(settings: latent_attention.LatentConfig, bits: int = 16) -> LatentAttention:
    module = LatentAttention(settings)
    rng = np.random.default_rng(0)
    for name, a in tree_flatten(module.parameters()):
        values = rng.standard_normal(a.shape) * a.shape[-1] ** -0.5
        module.load_weights(
            [(name, mx.array(1 + values if a.ndim == 1 else values, mx.float32))], strict=False
        )
    if bits != 16:
        paths = [p for p, m in module.named_modules() if isinstance(m, nn.Linear)]
        quantize(module, {p: {"bits": bits, "group_size": 32} for p in paths})
        join(module)
    return module


def dequantized(m: Any) -> np.ndarray:
    if not isinstance(m, nn.QuantizedLinear):
        return np.array(m.weight, np.float64)
    return np.array(mx.dequantize(m.weight, m.scales, m.biases, m.group_size, m.bits), np.float64)


def papers(m: LatentAttention, x: np.ndarray) -> np.ndarray:
    """Equations 9 to 19 of arXiv:2405.04434 in float64, for one sequence x [T, D]."""
    c = m._config
    heads, nope = c.num_attention_heads, c.qk_nope_head_dim

    def product(name: str, x: np.ndarray) -> np.ndarray:
        return x @ dequantized(m[name]).T

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.array(m[name].weight)

    def rotate(x: np.ndarray) -> np.ndarray:
        """x [T, …, dims], pairs side by side."""
        dims = x.shape[-1]
        angles = np.arange(len(x))[:, None] / c.rope.theta ** (np.arange(0, dims, 2) / dims)
        turned = x.reshape(*x.shape[:-1], -1, 2) @ np.array([1, 1j])
        turned *= np.exp(1j * angles).reshape(len(x), *[1] * (x.ndim - 2), -1)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    q = product("q_b_proj", norm("q_a_layernorm", product("q_a_proj", x))).reshape(len(x), heads, -1)
    latent, key = np.split(product("kv_a_proj_with_mqa", x), [c.kv_lora_rank], axis=-1)
    made = product("kv_b_proj", norm("kv_a_layernorm", latent)).reshape(len(x), heads, -1)
    key = rotate(key)
    scores = np.einsum("thd,shd->hts", q[..., :nope], made[..., :nope])
    scores += np.einsum("thd,sd->hts", rotate(q[..., nope:]), key)
    scores = scores / np.sqrt(q.shape[-1]) + np.triu(np.full((len(x), len(x)), -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return product("o_proj", np.einsum("hts,shd->thd", weights, made[..., nope:]).reshape(len(x), -1))


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("held", [1, 20000, 1 << 25], ids=["a head at once", "some heads", "all heads"])
@pytest.mark.parametrize("absorbs", [True, False, None])
def test_it_is_the_papers(
    monkeypatch: pytest.MonkeyPatch, bits: int, held: int, absorbs: bool | None
) -> None:
    """However many tokens come at once, absorbed or expanded, and however many heads are computed at once."""
    monkeypatch.setattr(latent_attention, "HELD", held)
    if absorbs is not None:
        monkeypatch.setattr(latent_attention.LatentConfig, "absorbs", lambda self, tokens, keys: absorbs)
    module = layer(config(), bits)
    x = np.random.default_rng(1).standard_normal((2, 40, 64)).astype(np.float32)
    want = np.stack([papers(module, sequence.astype(np.float64)) for sequence in x])
    cache = module.make_cache()
    bounds = [0, 21, 22, 23, 37, 40]
    pieces = [module(mx.array(x[:, a:b]), cache) for a, b in itertools.pairwise(bounds)]
    for got in (module(mx.array(x), None), mx.concatenate(pieces, axis=1)):
        assert np.abs(np.array(got) - want).max() < 2e-5 * np.abs(want).max() * (4 if bits < 16 else 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("transpose", [True, False])
def test_products_of_each_head(bits: int, tokens: int, transpose: bool) -> None:
    rng = np.random.default_rng(bits)
    weight = mx.array(rng.standard_normal((3, 24, 64)), mx.float32)
    parts = mx.quantize(weight, 32, bits)
    x = mx.array(rng.standard_normal((2, 3, tokens, 64 if transpose else 24)), mx.float32)
    matrices = np.array(mx.dequantize(*parts, 32, bits), np.float64)
    want = np.array(x, np.float64) @ (matrices.swapaxes(-1, -2) if transpose else matrices)
    # Rows of a larger matrix, as half of each head's are.
    wider = [mx.concatenate([p, p], axis=1)[:, 24:] for p in parts]
    for given in (parts, wider):
        got = np.array(head_products(x, *given, 32, bits, transpose))
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_it_absorbs_where_that_is_less_work() -> None:
    settings = architecture("deepseek_v3").Config.from_dict(DEEPSEEK_V3)

    def products(tokens: int, keys: int) -> tuple[int, int]:
        """Multiplications of a head, absorbed and expanded."""
        absorbed = tokens * (128 * 512 + keys * (512 + 64) + keys * 512 + 512 * 128)
        expanded = keys * 512 * (128 + 128) + tokens * keys * (128 + 64 + 128)
        return absorbed, expanded

    for tokens, keys in itertools.product([1, 2, 16, 45, 64, 170, 171, 256], [1, 64, 256, 4096, 131072]):
        absorbed, expanded = products(tokens, keys)
        assert settings.absorbs(tokens, keys) == (absorbed <= expanded), (tokens, keys)
    assert settings.absorbs(170, 1 << 20) and not settings.absorbs(171, 1 << 20)
    assert settings.absorbs(46, 64) and not settings.absorbs(47, 64)


@pytest.mark.parametrize(("released", "per_token"), [(DEEPSEEK_V3, 70272), (KIMI_K2, 70272)])
def test_a_token_leaves_its_latent_and_a_key_behind(released: dict[str, Any], per_token: int) -> None:
    """576 values in each of 61 layers; expanded, DeepSeek-V3's would be 40960."""
    settings = architecture(released["model_type"]).Config.from_dict(released)
    kept = settings.num_hidden_layers * settings.cached * 2
    assert kept == per_token
    tokens = 32 * LatentCache.step
    assert settings.kv_bytes(tokens, mx.bfloat16) == tokens * per_token
    long = 1 << 17
    head = long * (2 * (128 + 128) + 64 + 3 * mixed_at_once()) * 2  # one's keys, values and scores
    besides = settings.kv_bytes(long, mx.bfloat16) - long * per_token
    assert besides == pytest.approx(head - latent_attention.HELD, rel=0.01)
    module = layer(config())
    cache = module.make_cache()
    module(mx.zeros((1, 300, 64)), cache)
    assert cache.nbytes == 512 * (64 + 16) * 4


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("past", [0, 3000])
@pytest.mark.parametrize("held", [1 << 20, 1 << 22])
def test_what_it_takes_is_planned(monkeypatch: pytest.MonkeyPatch, tokens: int, past: int, held: int) -> None:
    monkeypatch.setattr(latent_attention, "HELD", held)
    settings = config(num_attention_heads=16, num_key_value_heads=16, q_lora_rank=64)
    module = layer(settings, bits=4)
    cache = module.make_cache()
    if past:
        cache.update(mx.random.normal((1, 1, past, settings.cached)))
    x = mx.random.normal((1, tokens, 64))
    mx.eval(x, cache.state, module.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(module(x, cache))
    taken = mx.get_peak_memory() - before
    besides = settings.kv_bytes(past + tokens, mx.float32)
    cached = (past + tokens + LatentCache.step) * settings.cached * 4  # of this layer; it grows: old and new
    few = 1 << 16  # masks and the like
    assert taken <= mixed_at_once() * settings.mixing_bytes(mx.float32) + besides - cached + few


# Whole models


def checkpoint(folder: Path, tensors: dict[str, Array], settings: dict[str, Any] = SMALL) -> Path:
    write_checkpoint(folder, tensors=tensors, config=settings)
    (folder / "tokenizer.json").unlink()
    return folder


def logits(folder: Path) -> np.ndarray:
    model, _ = load(folder)
    return np.asarray(model(mx.array(np.arange(48)[None])))


def test_a_kept_prompt_goes_on_bit_for_bit(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "src", random_weights(SMALL)), tmp_path / "dst", q_bits=4, q_group_size=32)
    model, _ = load(tmp_path / "dst")
    tokens = mx.array(np.random.default_rng(2).integers(0, 96, (1, 340)))
    whole = model.make_cache()
    model(tokens[:, :300], whole)
    for directory in (None, tmp_path / "kept"):
        prefixes = PrefixCache(model.identity, memory_bytes=1 << 30, directory=directory)
        prefixes.keep(tokens[0, :300].tolist(), whole)
        if directory is not None:  # another process: what is on the disk
            prefixes = PrefixCache(model.identity, directory=directory)
        other = model.make_cache()
        assert prefixes.restore(tokens[0].tolist(), other) == 300
        for a, b in zip(whole, other, strict=True):
            assert np.array_equal(np.array(a.latents[:, :, :300]), np.array(b.latents[:, :, :300]))
        again = model.make_cache()
        model(tokens[:, :300], again)
        for start, stop in ((300, 301), (301, 340)):
            want, got = (model(tokens[:, start:stop], cache) for cache in (again, other))
            assert np.array_equal(np.asarray(want), np.asarray(got))


def test_fp8_is_its_values(tmp_path: Path) -> None:
    """Every matrix that DeepSeek publishes in FP8, with blocks that 128 does not divide."""
    rng = np.random.default_rng(3)
    plain = random_weights(SMALL, "BF16")
    blocks = dict(plain)
    for name, a in plain.items():
        if len(a.shape) == 2 and not any(part in name for part in ("embed", "lm_head", ".gate.")):
            blocks[name], blocks[f"{name}_scale_inv"], values = fp8(a.shape, rng, "F32", (128, 128))
            plain[name] = array(values.astype(np.float32), "BF16")
    convert(checkpoint(tmp_path / "a", plain), tmp_path / "want", q_bits=16)
    convert(
        checkpoint(tmp_path / "b", blocks, {**SMALL, "quantization_config": KINDS["blocks"][0]}),
        tmp_path / "got",
        q_bits=16,
    )
    assert np.array_equal(logits(tmp_path / "got"), logits(tmp_path / "want"))


def stacked(tensors: dict[str, Array]) -> dict[str, Array]:
    """As mlx-lm has it."""
    out = {name: a for name, a in tensors.items() if ".experts." not in name}
    for name, a in tensors.items():
        if ".experts.0." in name:
            every = [tensors[name.replace(".experts.0.", f".experts.{e}.")] for e in range(8)]
            data = b"".join(e.data for e in every)
            out[name.replace("experts.0", "switch_mlp")] = Array(a.dtype, (8, *a.shape), data)
    return out


def test_quantized_by_mlx_lm_is_repacked(tmp_path: Path) -> None:
    tensors, quantization = quantized(stacked(random_weights(SMALL)), 4, 32, {"mlp.gate": None})
    source = checkpoint(tmp_path / "src", tensors, {**SMALL, "quantization": quantization})
    convert(source, tmp_path / "dst")
    parts = {k: a for k, a in tensors.items() if "layers.1.self_attn.kv_b_proj" in k}
    loaded = mx.load(str(tmp_path / "dst" / "model.safetensors"))
    for name, a in parts.items():
        assert np.array(loaded[name].view(mx.uint32)).tobytes() == a.data
    assert np.isfinite(logits(tmp_path / "dst")).all()


def test_halves_that_mlx_lm_quantized_apart_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = stacked(random_weights(SMALL))
    for i in range(3):
        at = f"model.layers.{i}.self_attn"
        del tensors[f"{at}.kv_b_proj.weight"]
        tensors[f"{at}.embed_q.weight"] = array(np.zeros((4, 64, 32)), "F32")
        tensors[f"{at}.unembed_out.weight"] = array(np.zeros((4, 24, 64)), "F32")
    monkeypatch.setattr(
        sys.modules["mlx_flashmoe.convert.binding"], "find", lambda config, names=(): []
    )  # no mlx-lm
    with pytest.raises(
        SourceError, match=r"embed_q.*kv_b_proj.*convert the original.*mlx-flashmoe\[mlx-lm\]"
    ):
        convert(checkpoint(tmp_path / "src", tensors), tmp_path / "dst")


@pytest.mark.parametrize("released", [DEEPSEEK_V3, KIMI_K2], ids=["DeepSeek-V3", "Kimi K2"])
def test_released_configurations_describe_models_of_their_size(released: dict[str, Any]) -> None:
    described = describe(released["model_type"], released, "")
    dense = sum(np.prod(module.shape) for module in described.modules)
    experts = len(described.moe_layers) * described.num_experts
    total = dense + experts * 3 * described.hidden_size * described.intermediate_size
    # The model cards: 671B without the layer that predicts further tokens; 1T, exactly 1.026T.
    assert total == pytest.approx({256: 671e9, 384: 1.026e12}[described.num_experts], rel=0.001)


def test_scores_of_a_longer_context() -> None:
    """DeepSeek-V3: 0.1 ln 40 + 1 = 1.3689, squared; rotations are not scaled where both mscales are equal."""
    settings = architecture("deepseek_v3").Config.from_dict(DEEPSEEK_V3)
    assert settings.rope.dims == 64 and settings.context_length == 163840
    assert settings.rope.yarn is not None and settings.rope.yarn.attention_factor == 1
    assert settings.rope.yarn.score_factor == pytest.approx(1.368888**2, abs=1e-5)
    small = {name: value for name, value in SMALL.items() if name != "model_type"}
    small |= dict(rope_scaling=DEEPSEEK_V3["rope_scaling"], qk_nope_head_dim=48)
    assert LatentAttention(config(**small))._scale == pytest.approx(1.368888**2 / 8, abs=1e-5)
    plain = replace(settings.rope.yarn, mscale_all_dim=0.0)
    assert plain.score_factor == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only sigmoid"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"kv_lora_rank": ...}, "kv_lora_rank is missing"),
        ({"qk_rope_head_dim": ...}, "qk_rope_head_dim is missing"),
        ({"q_lora_rank": "no"}, "q_lora_rank must be a whole number"),
        ({"rope_interleave": 2}, "rope_interleave must be true or false"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    changed = {k: v for k, v in {**SMALL, **changes}.items() if v is not ...}
    with pytest.raises(FormatError, match=says):
        architecture("deepseek_v3").Config.from_dict(changed)
