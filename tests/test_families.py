"""Qwen3-Next and Qwen3-MoE, each as a Qwen3.5-MoE model written differently, whose logits must be the same.

What transformers computes for them is compared in tests/reference; here nothing but names, orders and missing parts
differs from an architecture that is checked already.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import LAYOUTS, NORMS, Array, Spec, array, quantized, stack, write_checkpoint

from mlx_flashmoe import convert, load
from mlx_flashmoe.convert.binding import describe
from mlx_flashmoe.errors import FormatError, SourceError
from mlx_flashmoe.layout import Manifest
from mlx_flashmoe.models import architecture

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20))
FULL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
# Two key heads that serve two value heads each, so that the order of rows matters.
HYBRID = Spec(dtype="F32", text_only=True, layers=3, key_heads=2, value_heads=4, value_head=64)
ATTENTION = Spec(
    dtype="F32",
    text_only=True,
    interval=1,
    heads=4,
    kv_heads=2,
    attention_bias=True,
    overrides={"rope_parameters": FULL_ROTARY},
)


def checkpoint(
    folder: Path, spec: Spec, tensors: dict[str, Array] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint without the stand-in for a tokenizer, so that it can be loaded once converted."""
    write_checkpoint(folder, spec, tensors=tensors, config=config)
    (folder / "tokenizer.json").unlink()
    return folder


def logits(folder: Path, source: Path) -> np.ndarray:
    convert(source, folder, q_bits=16)
    model, _ = load(folder)
    return np.asarray(model(mx.array(TOKENS)))


def published(weights: dict[str, Array], spec: Spec, layout: str, zero_centred: bool) -> dict[str, Array]:
    """Weights by name, one tensor an expert, norms as weight - 1 if ``zero_centred`` -> as that layout has them."""
    if layout == "per_expert":
        return weights
    out = stack(weights, spec, fuse=layout == "fused")
    if layout == "fused":
        return out
    for name, a in out.items():
        if name.endswith("conv1d.weight"):
            out[name] = Array(a.dtype, (a.shape[0], a.shape[2], 1), a.data)
        elif zero_centred and (name.endswith(NORMS) or name == "model.norm.weight"):
            out[name] = array(a.float32() + 1, a.dtype)
    return out


def qwen3_next(spec: Spec) -> tuple[dict[str, Any], dict[str, Array]]:
    """The same model with fused projections: config.json and weights."""
    weights = spec.weights()
    keys = spec.key_heads * spec.key_head
    served = spec.value_heads // spec.key_heads
    for i in range(spec.layers):
        at = f"model.layers.{i}.linear_attn."
        if at + "in_proj_qkv.weight" not in weights:
            continue
        qkv, z, a, b = (
            weights.pop(f"{at}in_proj_{name}.weight").float32() for name in ("qkv", "z", "a", "b")
        )
        q, k, v = qkv[:keys], qkv[keys : 2 * keys], qkv[2 * keys :]
        qkvz: list[np.ndarray] = []
        ba: list[np.ndarray] = []
        for head in range(spec.key_heads):
            key = slice(head * spec.key_head, (head + 1) * spec.key_head)
            value = slice(head * served * spec.value_head, (head + 1) * served * spec.value_head)
            qkvz += [q[key], k[key], v[value], z[value]]
            ba += [b[head * served : (head + 1) * served], a[head * served : (head + 1) * served]]
        weights[at + "in_proj_qkvz.weight"] = array(np.concatenate(qkvz), "F32")
        weights[at + "in_proj_ba.weight"] = array(np.concatenate(ba), "F32")
    config = {**spec.config(), "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    return config, weights


def qwen3_moe(spec: Spec) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """A model without gates and shared experts: config.json, weights, and those of a Qwen3.5 model equal to it."""
    weights, equal = spec.weights(), spec.weights()
    for name, a in spec.weights().items():
        if ".shared_expert" in name:
            del weights[name]
            equal[name] = array(np.zeros(a.shape, np.float32), "F32")
        elif ".q_proj." in name:
            rows = a.float32().reshape(spec.heads, 2, spec.head, -1)
            weights[name] = array(rows[:, 0].reshape(-1, *a.shape[1:]), "F32")
            # A gate of 100 is open: its sigmoid is 1 to the last bit.
            rows[:, 1] = 100 if name.endswith(".bias") else 0
            equal[name] = array(rows.reshape(a.shape), "F32")
        elif name.endswith(NORMS) or name == "model.norm.weight":
            weights[name] = array(a.float32() + 1, "F32")
    config = {**spec.config(), "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config["norm_topk_prob"] = True
    return config, weights, equal


@pytest.mark.parametrize("layout", LAYOUTS)
def test_qwen3_next_is_qwen3_5_with_fused_projections(tmp_path: Path, layout: str) -> None:
    want = logits(tmp_path / "want", checkpoint(tmp_path / "a", HYBRID))
    config, weights = qwen3_next(HYBRID)
    tensors = published(weights, HYBRID, layout, zero_centred=True)
    tensors["mtp.layers.0.mlp.gate.weight"] = array(np.ones((3, 5)), "F32")
    source = checkpoint(tmp_path / "b", HYBRID, tensors, config)
    assert np.array_equal(logits(tmp_path / "got", source), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_qwen3_moe_is_qwen3_5_with_open_gates(tmp_path: Path, layout: str) -> None:
    config, weights, equal = qwen3_moe(ATTENTION)
    source = checkpoint(tmp_path / "a", ATTENTION, equal)
    want = logits(tmp_path / "want", source)
    tensors = published(weights, ATTENTION, layout, zero_centred=False)
    source = checkpoint(tmp_path / "b", ATTENTION, tensors, config)
    assert np.array_equal(logits(tmp_path / "got", source), want)
    # As transformers writes it, and with the size of a head left to be inferred.
    config["num_local_experts"] = config.pop("num_experts")
    del config["head_dim"]
    source = checkpoint(tmp_path / "c", ATTENTION, tensors, config)
    assert np.array_equal(logits(tmp_path / "again", source), want)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
def test_quantized_by_mlx_lm_is_repacked_and_streams(tmp_path: Path, family: str) -> None:
    if family == "qwen3_next":
        spec = HYBRID
        config, weights = qwen3_next(spec)
    else:
        spec = ATTENTION
        config, weights, _ = qwen3_moe(spec)
    tensors, config["quantization"] = quantized(published(weights, spec, "stacked", True), 4, 32, {})
    convert(checkpoint(tmp_path / "src", spec, tensors, config), tmp_path / "dst")
    manifest = Manifest.load(tmp_path / "dst")
    entry, layout = manifest.layers[0], manifest.layouts[0]
    blobs = np.fromfile(tmp_path / "dst" / entry.file, np.uint8).reshape(spec.experts, -1)
    stacked = tensors["model.layers.0.mlp.switch_mlp.up_proj.weight"].data
    part = layout.up.weight
    assert blobs[:, part.offset : part.offset + part.nbytes].tobytes() == stacked
    answers = []
    for memory in ("auto", "os"):
        model, _ = load(tmp_path / "dst", expert_memory=memory)
        cache = model.make_cache()
        steps = [model(mx.array(TOKENS[:1, :12]), cache)]
        steps += [model(mx.array(TOKENS[:1, i : i + 1]), cache) for i in range(12, 20)]
        answers.append(np.asarray(mx.concatenate(steps, axis=1)))
    assert np.array_equal(*answers)


REFUSED = [
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope type 'dynamic'"),
    ({"rope_parameters": {**FULL_ROTARY, "rope_type": "yarn"}}, "factor is missing"),
    ({"rope_parameters": {**FULL_ROTARY, "rope_type": "yarn", "factor": 0}}, "rope_parameters"),
    ({"norm_topk_prob": ...}, "norm_topk_prob is missing"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    config, _, _ = qwen3_moe(ATTENTION)
    changed = {k: v for k, v in {**config, "rope_theta": 1e4, **changes}.items() if v is not ...}
    with pytest.raises(FormatError, match=says):
        architecture("qwen3_moe").Config.from_dict(changed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mlp_only_layers": [0]}, "intermediate_size is missing"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers, not 3"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers must be a list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1, not 0"),
        ({"decoder_sparse_step": 99, "intermediate_size": 64}, "no layer has experts"),
        ({"mlp_only_layers": [0], "intermediate_size": 64}, r"layers\.0\.mlp\.gate_proj\.weight.* missing"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
def test_layers_without_experts_have_to_be_described(
    tmp_path: Path, family: str, changes: dict[str, Any], says: str
) -> None:
    config, weights = qwen3_next(HYBRID) if family == "qwen3_next" else qwen3_moe(ATTENTION)[:2]
    source = checkpoint(tmp_path / "src", HYBRID, weights, {**config, "intermediate_size": None, **changes})
    with pytest.raises(SourceError, match=says):
        convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


GLM: dict[str, Any] = dict(
    attention_bias=True,
    partial_rotary_factor=0.5,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=1,
)
# What the released config.json files say, and the parameters that the model cards state.
RELEASED: dict[str, tuple[float, dict[str, Any]]] = {
    "Qwen3-Next-80B-A3B": (
        80e9,
        dict(
            model_type="qwen3_next",
            hidden_size=2048,
            num_hidden_layers=48,
            full_attention_interval=4,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            partial_rotary_factor=0.25,
            rope_theta=10000000,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            num_experts=512,
            num_experts_per_tok=10,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
    ),
    "Qwen3-30B-A3B": (
        30.5e9,
        dict(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_experts=128,
            moe_intermediate_size=768,
        ),
    ),
    "Qwen3-235B-A22B": (
        235e9,
        dict(
            hidden_size=4096,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_experts=128,
            moe_intermediate_size=1536,
        ),
    ),
    "Qwen3-Coder-480B-A35B": (
        480e9,
        dict(
            hidden_size=6144,
            num_hidden_layers=62,
            num_attention_heads=96,
            num_key_value_heads=8,
            num_experts=160,
            moe_intermediate_size=2560,
        ),
    ),
    "Qwen2-57B-A14B": (
        57e9,
        dict(
            model_type="qwen2_moe",
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_experts=64,
            moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
            norm_topk_prob=False,
        ),
    ),
    "GLM-4.5-Air": (
        106e9,
        dict(
            model_type="glm4_moe",
            vocab_size=151552,
            hidden_size=4096,
            intermediate_size=10944,
            num_hidden_layers=46,
            num_attention_heads=96,
            num_key_value_heads=8,
            n_routed_experts=128,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            routed_scaling_factor=1.0,
            use_qk_norm=False,
            **GLM,
        ),
    ),
    "GLM-4.6": (
        355e9,
        dict(
            model_type="glm4_moe",
            vocab_size=151552,
            hidden_size=5120,
            intermediate_size=12288,
            num_hidden_layers=92,
            num_attention_heads=96,
            num_key_value_heads=8,
            n_routed_experts=160,
            moe_intermediate_size=1536,
            first_k_dense_replace=3,
            routed_scaling_factor=2.5,
            use_qk_norm=True,
            **GLM,
        ),
    ),
    "MiniMax-M2": (
        229e9,
        dict(
            model_type="minimax_m2",
            vocab_size=200064,
            hidden_size=3072,
            intermediate_size=1536,
            num_hidden_layers=62,
            num_attention_heads=48,
            num_key_value_heads=8,
            num_local_experts=256,
            rotary_dim=64,
            scoring_func="sigmoid",
            use_routing_bias=True,
            use_qk_norm=True,
            qk_norm_type="per_layer",
            shared_intermediate_size=0,
        ),
    ),
}
ALIKE: dict[str, Any] = dict(
    model_type="qwen3_moe",
    vocab_size=151936,
    num_key_value_heads=4,
    head_dim=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_sliding_window=False,
)


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_describe_models_of_their_size(name: str) -> None:
    parameters, its_own = RELEASED[name]
    config = {**ALIKE, **its_own}
    settings = architecture(config["model_type"]).Config.from_dict(config)
    assert getattr(settings, "norm_topk_prob", True) == config["norm_topk_prob"]
    assert settings.dtype == "bfloat16" and settings.rope.yarn is None
    described = describe(config["model_type"], config, name)
    dense = sum(math.prod(module.shape) for module in described.modules)
    experts = len(described.moe_layers) * described.num_experts
    experts *= 3 * described.hidden_size * described.intermediate_size
    assert dense + experts == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("GLM-4.6", {"n_group": 7}, "n_group 7 does not part 160 experts into equal groups of 2 or more"),
        ("GLM-4.6", {"n_group": 160}, "n_group 160 does not part 160 experts"),
        ("GLM-4.6", {"n_group": 0}, "n_group must be a whole number from 1"),
        ("GLM-4.6", {"n_group": 4, "topk_group": 5}, "topk_group 5 is more than the 4 of n_group"),
        (
            "GLM-4.6",
            {"n_group": 80, "topk_group": 3},
            "num_experts_per_tok 8 is more than topk_group 3 of the n_group",
        ),
        (
            "GLM-4.6",
            {"first_k_dense_replace": 92},
            "first_k_dense_replace must be a whole number from 0 to 91",
        ),
        ("GLM-4.6", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number"),
        ("GLM-4.6", {"first_k_dense_replace": ...}, "first_k_dense_replace is missing"),
        ("GLM-4.6", {"n_routed_experts": "many"}, "n_routed_experts must be a whole number"),
        ("GLM-4.6", {"n_routed_experts": 0}, "n_routed_experts must be a whole number"),
        ("GLM-4.6", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be a whole number"),
        (
            "MiniMax-M2",
            {"scoring_func": "softmax"},
            "scoring_func 'softmax' is not supported, only 'sigmoid'",
        ),
        ("MiniMax-M2", {"qk_norm_type": "per_head"}, "qk_norm_type 'per_head' is not supported"),
        ("MiniMax-M2", {"shared_intermediate_size": 1536}, "shared_intermediate_size 1536 is not supported"),
        ("MiniMax-M2", {"rotary_dim": 0}, "rotary_dim must be"),
        ("MiniMax-M2", {"num_local_experts": 4}, "num_experts_per_tok is more than the 4 of num_experts"),
    ],
)
def test_experts_that_config_json_contradicts(name: str, changes: dict[str, Any], says: str) -> None:
    config = {**ALIKE, **RELEASED[name][1], **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(FormatError, match=says):
        architecture(config["model_type"]).Config.from_dict(config)


def test_yarn_as_qwen_recommends_it() -> None:
    """Rotations fast enough are as they were, slow ones four times slower: arXiv:2309.00071, with 32 and 1 turns."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**ALIKE, **RELEASED["Qwen3-235B-A22B"][1], "rope_scaling": scaling}
    rope = architecture("qwen3_moe").Config.from_dict(config).rope
    assert rope.yarn is not None
    turns = 32768 / (2 * np.pi * 1e6 ** (np.arange(64) / 64))
    stretched = np.asarray(rope.yarn.stretched(rope.dims, rope.theta))
    assert np.all(stretched[turns > 40] == 0) and np.all(stretched[turns < 0.8] == 1)
    assert np.all(np.diff(stretched) >= 0)
    assert rope.yarn.attention_factor == pytest.approx(1.138629, abs=1e-6)


def yarn(factor: float | None = 4.0, original: int | None = 32768, kind: str = "rope_type") -> dict[str, Any]:
    settings = {kind: "yarn", "factor": factor, "original_max_position_embeddings": original}
    return {name: value for name, value in settings.items() if value is not None or name == "factor"}


PLAIN = {"rope_type": "default", "rope_theta": 1e6}
MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [11, 11, 10]}

CONTEXTS: list[tuple[dict[str, Any], int | None]] = [
    # As published, and as the model cards ask for YaRN: max_position_embeddings stays.
    ({"max_position_embeddings": 262144}, 262144),
    ({"max_position_embeddings": 40960, "rope_scaling": yarn()}, 131072),
    ({"max_position_embeddings": 262144, "rope_parameters": {**PLAIN, **yarn(4, 262144)}}, 1048576),
    # The longer one counts: it may have been raised by hand too.
    ({"max_position_embeddings": 131072, "rope_scaling": yarn()}, 131072),
    ({"max_position_embeddings": 262144, "rope_scaling": yarn(2)}, 262144),
    ({"max_position_embeddings": 32768, "rope_scaling": yarn(0.5)}, 32768),
    # Older spellings, and one beside the other.
    ({"max_position_embeddings": 32768, "rope_scaling": yarn(kind="type")}, 131072),
    ({"max_position_embeddings": 32768, "rope_parameters": PLAIN, "rope_scaling": yarn(kind="type")}, 131072),
    ({"max_position_embeddings": 32768, "rope_parameters": yarn(), "rope_scaling": MROPE}, 131072),
    ({"max_position_embeddings": 32768, "rope_parameters": yarn(), "rope_scaling": None}, 131072),
    ({"max_position_embeddings": 32768, "rope_scaling": MROPE}, 32768),
    # What is left out is derived.
    ({"max_position_embeddings": 32768, "rope_scaling": yarn(original=None)}, 131072),
    ({"max_position_embeddings": 131072, "rope_scaling": yarn(factor=None)}, 131072),
    ({"max_position_embeddings": ..., "rope_scaling": yarn()}, 131072),
    ({"max_position_embeddings": ...}, None),
    ({"max_position_embeddings": None}, None),
    ({"max_position_embeddings": 32768, "rope_scaling": yarn(1.5)}, 49152),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("changes", "tokens"), CONTEXTS)
def test_the_context_that_a_model_is_made_for(
    changes: dict[str, Any], tokens: int | None, nested: bool
) -> None:
    text = {**ALIKE, **RELEASED["Qwen3-235B-A22B"][1], **changes}
    text = {name: value for name, value in text.items() if value is not ...}
    config = {"model_type": text["model_type"], "text_config": text} if nested else text
    settings = architecture("qwen3_moe").Config.from_dict(config)
    assert settings.context_length == tokens
    assert settings.rope.theta == 1e6
    stretched = any("yarn" in (changes.get(s) or {}).values() for s in ("rope_parameters", "rope_scaling"))
    assert (settings.rope.yarn is not None) == stretched


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 0},
        {"max_position_embeddings": -1, "rope_scaling": yarn()},
        {"max_position_embeddings": "long"},
        {"max_position_embeddings": [4096]},
        {"rope_scaling": yarn(float("inf"))},
        {"rope_scaling": yarn(float("nan"))},
        {"rope_scaling": [4]},
        {"rope_scaling": "yarn"},
    ],
)
def test_a_context_that_is_no_number_is_refused(changes: dict[str, Any]) -> None:
    config = {**ALIKE, **RELEASED["Qwen3-235B-A22B"][1], "max_position_embeddings": 32768, **changes}
    with pytest.raises(FormatError, match=r"config\.json: .* malformed"):
        architecture("qwen3_moe").Config.from_dict(config)
