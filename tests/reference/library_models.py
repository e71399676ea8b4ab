"""Small random models of the libraries' architectures, made, quantized and saved by the libraries themselves.

The tables say which architectures run. docs/models.md is made of them (``python tests/reference/library_models.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_flashmoe.external import library as libraries

VOCABULARY = 96
TOKENS = np.random.default_rng(1).integers(1, 90, (2, 12))


# Settings by the names that most architectures have; a library leaves out those that its own has not.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    expert_ffn_hidden_size=32,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=6,
    num_local_experts=6,
    n_routed_experts=6,
    moe_num_experts=6,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_topk=2,
    moe_top_k=2,
    moe_k=2,
    n_shared_experts=1,
    num_shared_experts=1,
    num_shared_expert=1,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    rms_norm_eps=1e-5,
    layer_norm_epsilon=1e-5,
    layernorm_epsilon=1e-5,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    partial_rotary_factor=0.5,
    sliding_window=8,
    max_position_embeddings=512,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    use_qkv_bias=False,
    use_qk_norm=True,
    tie_word_embeddings=False,
)
LATENT: dict[str, Any] = dict(num_key_value_heads=4)  # multi-head latent attention has as many as queries
INDEXER: dict[str, Any] = dict(
    index_head_dim=16, index_n_heads=4, index_topk=4
)  # fewer than the prompt's tokens
GRANITE: dict[str, Any] = dict(
    logits_scaling=1.0, attention_multiplier=0.25, embedding_multiplier=2.0, residual_multiplier=0.5
)
MAMBA: dict[str, Any] = dict(
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_d_conv=4,
    mamba_n_groups=1,
    mamba_proj_bias=False,
    mamba_conv_bias=True,
    mamba_expand=2,
)
YARN: dict[str, Any] = dict(type="yarn", factor=4.0, mscale_all_dim=1.0, original_max_position_embeddings=128)
ROPE: dict[str, Any] = dict(rope_theta=10000.0, rope_type="default")
LONGCAT: dict[str, Any] = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=2,
    num_layers=2,
    num_hidden_layers=2,
    ffn_hidden_size=64,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention"]
KDA: dict[str, Any] = dict(num_heads=4, head_dim=16, short_conv_kernel_size=4)

MROPE: dict[str, Any] = dict(rope_type="default", type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
DELTA_NET: dict[str, Any] = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)
DELTA_LAYERS = ["linear_attention", "full_attention", "linear_attention"]

MLX_LM: dict[str, dict[str, Any]] = {
    "Klear": dict(mlp_only_layers=[0], decoder_sparse_step=1, num_key_value_heads=4),
    "afmoe": dict(layer_types=WINDOWS, num_dense_layers=1),
    "bailing_hybrid": dict(layer_group_size=2, group_norm_size=1, **LATENT),
    "bailing_moe": dict(moe_router_enable_expert_bias=True, score_function="sigmoid", topk_group=1),
    "bailing_moe_linear": dict(layer_group_size=2, group_norm_size=1, topk_group=1),
    "bailing_moe_v3": dict(layer_group_size=2, **LATENT),
    "deepseek": dict(),
    "deepseek_v2": dict(topk_method="group_limited_greedy", n_group=2, rope_scaling=YARN, **LATENT),
    "deepseek_v3": dict(n_group=2, **LATENT),
    "deepseek_v32": dict(**INDEXER, **LATENT),
    "deepseek_v41": dict(
        num_hidden_layers=4,
        head_dim=32,
        o_groups=2,
        o_lora_rank=16,
        compress_ratios=[0, 4, 4, 0],
        kv_source_layer_ids=[0, 1, 2, 3],
        index_source_layer_ids=[1, 1, 2, 2],
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        scoring_func="sqrtsoftplus",
    ),
    "dots1": dict(),
    "ernie4_5_moe": dict(),
    "exaone_moe": dict(layer_types=WINDOWS, is_moe_layer=[False, True, True]),
    "gemma4": dict(
        layer_types=WINDOWS,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
        global_head_dim=32,
        enable_moe_block=True,
        top_k_experts=2,
    ),
    "glm4_moe": dict(),
    "glm4_moe_lite": dict(**LATENT),
    "glm_moe_dsa": dict(rope_parameters=dict(rope_theta=10000.0), **INDEXER, **LATENT),
    "gpt_oss": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "granitemoe": dict(**GRANITE),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=32, **GRANITE, **MAMBA
    ),
    "hunyuan": dict(
        num_hidden_layers=4,
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling=dict(alpha=1000.0, factor=1.0, type="dynamic"),
    ),
    "jamba": dict(
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, **MAMBA
    ),
    "kimi_k25": dict(**LATENT),
    "kimi_k3": dict(
        linear_attn_config=dict(
            kda_layers=[1, 3], full_attn_layers=[2], gate_lower_bound=-5.0, use_full_rank_gate=True, **KDA
        ),
        routed_expert_hidden_size=32,
        latent_moe_use_norm=True,
        num_expert_group=1,
        mla_use_output_gate=True,
        attn_res_block_size=2,
        activation_situ_beta=2.0,
        activation_situ_linear_beta=3.0,
        num_key_value_heads=4,
    ),
    "kimi_linear": dict(
        linear_attn_config=dict(kda_layers=[1, 3], **KDA), model_max_length=512, num_expert_group=1, **LATENT
    ),
    "kimi_vl": dict(**LATENT),
    "laguna": dict(layer_types=WINDOWS, mlp_layer_types=["dense", "sparse", "sparse"]),
    "lfm2_moe": dict(
        layer_types=["conv", "full_attention", "conv"],
        conv_bias=False,
        conv_L_cache=3,
        use_expert_bias=True,
        num_dense_layers=1,
    ),
    "llama4": dict(
        attention_chunk_size=8,
        interleave_moe_layer_step=2,
        num_hidden_layers=4,
        intermediate_size_mlp=64,
        num_experts_per_tok=1,
    ),
    "longcat_flash": dict(**LONGCAT),
    "longcat_flash_ngram": dict(ngram_vocab_size_ratio=3, **LONGCAT),
    "mellum": dict(layer_types=WINDOWS, rope_parameters={kind: ROPE for kind in set(WINDOWS)}),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[0, 1, 0],
        moe_layer_freq=[0, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=8,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        swa_v_head_dim=16,
    ),
    "minimax": dict(shared_intermediate_size=32, rotary_dim=8),
    "minimax_m3_vl": dict(
        intermediate_size=32,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        moe_layer_freq=[0, 1, 1],
        sparse_attention_config=dict(
            sparse_num_index_heads=2,
            sparse_index_dim=16,
            sparse_block_size=4,
            sparse_topk_blocks=2,
            sparse_local_block=1,
            sparse_attention_freq=[0, 1, 1],
        ),
    ),
    "mistral4": dict(
        rope_parameters=dict(llama_4_scaling_beta=0.1, original_max_position_embeddings=8, **ROPE), **LATENT
    ),
    "mixtral": dict(),
    "muse_spark": dict(
        post_norm_eps=1e-5,
        rope_parameters=ROPE,
        layer_rope_theta=[10000.0, 0.0, 10000.0],
        layer_types=WINDOWS,
        final_logit_softcapping=30.0,
        output_multiplier=0.5,
        moe_hidden_size=32,
        num_shared_experts=0,
    ),
    "nemotron_h": dict(
        num_hidden_layers=4,
        hybrid_override_pattern=["M", "E", "*", "E"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=2,
        use_conv_bias=True,
        moe_shared_expert_intermediate_size=32,
    ),
    "olmoe": dict(),
    "phimoe": dict(),
    "phixtral": dict(num_vocab=VOCABULARY, model_dim=64, num_heads=4, num_layers=2, rotary_dim=8),
    "qwen2_moe": dict(),
    "qwen3_5_moe": dict(
        layer_types=DELTA_LAYERS,
        full_attention_interval=2,
        rope_parameters=dict(partial_rotary_factor=0.5, **MROPE),
        **DELTA_NET,
    ),
    "qwen3_moe": dict(decoder_sparse_step=1, mlp_only_layers=[], partial_rotary_factor=1.0),
    "qwen3_next": dict(decoder_sparse_step=1, mlp_only_layers=[], full_attention_interval=2, **DELTA_NET),
    "qwen3_vl_moe": dict(decoder_sparse_step=1, mlp_only_layers=[]),
    "solar_open": dict(),
    "step3p5": dict(
        num_attention_groups=2,
        share_expert_dim=32,
        layer_types=WINDOWS,
        moe_layers_enum="1,2",
        swiglu_limits=[0, 0, 7.0],
        swiglu_limits_shared=[0, 0, 16.0],
        attention_other_setting=dict(num_attention_heads=4, num_attention_groups=2),
    ),
}

# Towers that are never run: as small as they can be.
VISION: dict[str, Any] = dict(
    depth=1,
    num_hidden_layers=1,
    vt_num_hidden_layers=1,
    layers=1,
    n_layers=1,
    hidden_size=32,
    embed_dim=32,
    width=32,
    vt_hidden_size=32,
    mm_hidden_size=32,
    qkv_hidden_size=32,
    text_hidden_size=64,
    intermediate_size=32,
    vt_intermediate_size=32,
    out_hidden_size=64,
    projection_dim=64,
    projection_intermediate_size=32,
    num_heads=2,
    heads=2,
    vt_num_attention_heads=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=16,
    patch_size=4,
    spatial_patch_size=4,
    image_size=8,
    num_position_embeddings=4,
    position_embedding_size=8,
    init_pos_emb_height=2,
    init_pos_emb_width=2,
    num_patches=4,
    window_size=4,
    fullatt_block_indexes=[0],
    vocab_size=8,
    mlp_ratio=1.0,
    num_channels=3,
    norm_eps=1e-5,
    initializer_range=0.02,
    rope_theta=10000.0,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    vision_output_dim=32,
    pixel_shuffle_ratio=0.5,
    projector_dropout=0.0,
    projector_input_dim=32,
    projector_output_dim=32,
    merge_kernel_size=[2, 2],
)
AUDIO: dict[str, Any] = dict(
    out_hidden_size=64,
    audio_channels=2,
    input_local_attn_heads=2,
    input_local_dim=32,
    input_local_head_dim=16,
    input_local_intermediate_size=32,
    input_local_layers=1,
    projection_layers=1,
    speech_vocab_size=8,
    speech_zeroemb_idx=7,
    d_model=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    output_dim=64,
    downsample_hidden_size=8,
)

# klear is Klear there, mistral4 a part of mistral3.
ONLY_MLX_LM = ("Klear", "bailing_hybrid", "bailing_moe_v3", "mistral4")
# Those that mlx-lm has too are asked of mlx-vlm: its checkpoints name their tensors in another way.
MLX_VLM: dict[str, dict[str, Any]] = {
    **{kind: own for kind, own in MLX_LM.items() if kind not in ONLY_MLX_LM},
    "cohere2_moe": dict(layer_types=WINDOWS),
    "deepseek_v4": dict(
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=32,
        compress_ratios=[0, 4, 128, 4],
        num_hash_layers=1,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=2,
        scoring_func="sqrtsoftplus",
        vision_n_layers=0,
    ),
    "deepseek_v41": {
        **MLX_LM["deepseek_v41"],
        "kv_source_layer_ids": [1, 2],
        "candidate_source_layer_id": 1,
        "engram_layer_ids": [],
        "vision_num_layers": 1,
        "vision_hidden_size": 32,
        "vision_num_heads": 2,
        "vision_intermediate_size": 32,
    },
    "deepseek_vl_v2": dict(
        topk_method="greedy",
        scoring_func="softmax",
        projector_config=dict(input_dim=32, n_embed=64),
        **LATENT,
    ),
    "ernie4_5_moe_vl": dict(  # experts for text, and others for images
        moe_num_experts=[6, 4],
        pixel_hidden_size=32,
        moe_intermediate_size=[32, 32],
        moe_layer_start_index=[1, 1],
        moe_layer_end_index=[2, 2],
        mrope_section=[3, 3, 2],
    ),
    "flint": dict(layer_types=WINDOWS, rope_parameters={kind: ROPE for kind in set(WINDOWS)}),
    "gemma4_text": MLX_LM["gemma4"],
    "glm4v_moe": dict(rope_parameters=dict(partial_rotary_factor=0.5, **MROPE)),
    "glm5_next": dict(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        linear_attn_config=KDA,
        linear_head_dim=16,
        linear_num_heads=4,
        index_kpool=2,
        qk_head_dim=16,
        qk_rope_head_dim=0,
        **INDEXER,
        **LATENT,
    ),
    "hy_v4": dict(indexer_types=["full", "full", "shared"], **INDEXER, **LATENT),
    "inkling": dict(
        dense_mlp_idx=1,
        dense_intermediate_size=64,
        intermediate_size=32,
        local_layer_ids=[0, 2],
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        n_shared_experts=2,
    ),
    "klear": MLX_LM["Klear"],
    "kolibri1": dict(layer_types=WINDOWS),
    "llada2_moe": dict(),
    "longcat_flash_sparse": LONGCAT,
    "mimo_v2": MLX_LM["mimo_v2_flash"],
    "minimax_m3": MLX_LM["minimax_m3_vl"],
    "mistral3": MLX_LM["mistral4"],
    "mistral_large3": dict(**LATENT),
    "moondream3": dict(moe_start_layer=1, rope_dim=8, num_key_value_heads=4),
    "qwen3_omni_moe": dict(decoder_sparse_step=1, mlp_only_layers=[], rope_scaling=MROPE),
    "qwen4_exp": dict(
        layer_types=DELTA_LAYERS,
        full_attention_interval=2,
        hc_lowrank=16,
        ple_layer_ids=[1, 3],
        ple_embed_dim=32,
        heads_per_ngram=2,
        ngram_vocab_size_base=64,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        indexer_n_heads=4,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        eos_token_id=VOCABULARY - 1,
        rope_parameters=dict(partial_rotary_factor=0.5, **MROPE),
        **DELTA_NET,
    ),
    "step3p7": MLX_LM["step3p5"],
    "xing4_0": dict(**LATENT),
    "youtu_vl": dict(**LATENT),
    "zaya1_vl": dict(moe_router_topk=2, ffn_hidden_size=64, zaya_mlp_expansion=16, tie_word_embeddings=True),
}

# Where the language model is of another type than the whole.
TEXT_TYPES = {
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "kimi_k3": "kimi_linear",
    "mistral3": "mistral4",
}
VISION_TYPES = {
    "glm4v_moe": {"model_type": "glm4v_moe"},
    "llama4": {"model_type": "llama4"},
    "deepseek_vl_v2": {"model_type": "vision"},
}
# What of the tables cannot run: a part of what is said of it, and why, for readers.
REFUSED = {
    ("mlx-vlm", "deepseek_v41"): ("weights", "weights outputs before it rounds them; what mlx-lm wrote runs"),
    ("mlx-vlm", "granitemoe"): ("embedding_multiplier", "its language model alone computes something else"),
    ("mlx-vlm", "moondream3"): ("no activation of their own", "experts and router are one module"),
    ("mlx-vlm", "zaya1_vl"): ("linear_fc1, linear_fc2", "experts and their weights are one module"),
}
# Architectures that the libraries themselves run on Metal alone.
METAL = ("muse_spark",)
# mlx-vlm 0.7.10 does not run what it quantizes of these.
UNQUANTIZED = (("mlx-vlm", "kimi_k3"),)
ONES = ("gate_scale", "out_scale")  # factors of experts, for which only NVFP4 has a use
TABLES = {"mlx-lm": MLX_LM, "mlx-vlm": MLX_VLM}


def config(name: str, model_type: str) -> dict[str, Any]:
    """The config.json of a row: the settings stand where either kind of model looks for them."""
    text = {**COMMON, **TABLES[name][model_type]}
    inner = {"model_type": TEXT_TYPES.get(model_type, model_type), **text}
    whole = {**text, "text_config": inner, "model_type": model_type}
    if name == "mlx-lm":
        return whole
    if model_type == "qwen3_omni_moe":  # a model of models
        thinker = {
            **whole,
            "vision_config": VISION,
            "audio_config": AUDIO,
            "model_type": "qwen3_omni_moe_thinker",
        }
        talker = {"text_config": inner, "code_predictor_config": {}}
        return {
            "model_type": model_type,
            "thinker_config": thinker,
            "talker_config": talker,
            "code2wav_config": {},
            "enable_audio_output": False,
        }
    vision = {**VISION, **VISION_TYPES.get(model_type, {})}
    return {**whole, "vision_config": vision, "audio_config": None if model_type == "gemma4" else AUDIO}


def make(
    name: str,
    config: dict[str, Any],
    folder: Path,
    bits: int | None,
    group: int = 32,
    mode: str = "affine",
    predicate: Callable[[str, nn.Module], Any] | None = None,
) -> Path:
    """Writes a checkpoint of a library's whole model, as the library's own convert command would.

    Args:
        bits: of quantization; None for unquantized.
        predicate: how each module is quantized; None as the model itself says.
    """
    mx.random.seed(0)
    model = libraries.LIBRARIES[name].whole(config)
    model.update(tree_unflatten([(path, _random(path, a)) for path, a in tree_flatten(model.parameters())]))
    config = json.loads(json.dumps(config))
    with contextlib.redirect_stdout(io.StringIO()):  # they print
        _save(name, model, config, folder, bits and (group, bits, mode, predicate))
    return folder


def _random(path: str, array: mx.array) -> mx.array:
    """The library's own first value, with something in the place of zeros and ones."""
    if path.endswith(ONES) or not mx.issubdtype(array.dtype, mx.floating):
        return array
    plain = array.ndim < 2 or mx.all(array == array.reshape(-1)[0]).item()
    return (array + 0.05 * mx.random.normal(array.shape)).astype(array.dtype) if plain else array


def _save(
    name: str, model: nn.Module, config: dict[str, Any], folder: Path, quantization: tuple[Any, ...] | None
) -> None:
    if name == "mlx-lm":
        from mlx_lm.utils import quantize_model, save_config, save_model

        if quantization is not None:
            group, bits, mode, predicate = quantization
            model, config = quantize_model(model, config, group, bits, mode=mode, quant_predicate=predicate)
        save_model(folder, model)
    else:
        from mlx_vlm.quant_utils import quantize_model
        from mlx_vlm.utils import save_config, save_weights, skip_multimodal_module

        if quantization is not None:
            group, bits, mode, predicate = quantization
            own = predicate or getattr(model, "quant_predicate", None)

            def text_alone(path: str, module: nn.Module) -> Any:
                return not skip_multimodal_module(path) and (own is None or own(path, module))

            model, config = quantize_model(model, config, group, bits, mode=mode, quant_predicate=text_alone)
        save_weights(folder, model)
    save_config(config, folder / "config.json")


def resident(name: str, folder: Path) -> nn.Module:
    """A checkpoint's whole model, as the library loads it: everything in memory."""
    module = importlib.import_module(f"{name.replace('-', '_')}.utils")
    loaded = module.load_model(folder)
    return loaded[0] if isinstance(loaded, tuple) else loaded


def logits(model: nn.Module, tokens: np.ndarray, cache: list[Any] | None = None) -> np.ndarray:
    """[B, T] -> [B, T, V] in float32."""
    output = model(mx.array(tokens), **_nothing_else(model), cache=cache)
    return np.asarray(getattr(output, "logits", output).astype(mx.float32))


def _nothing_else(model: nn.Module) -> dict[str, None]:
    """mlx-vlm's models do not all give their arguments for images a default."""
    asked = list(inspect.signature(model.__call__).parameters.values())[1:]
    return {
        one.name: None for one in asked if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD
    }


def in_pieces(call: Callable[[np.ndarray, Any], np.ndarray], tokens: np.ndarray, cache: Any) -> np.ndarray:
    """Logits of a prompt in two chunks, then token by token."""
    cuts = [0, 5, 8, *range(9, tokens.shape[1] + 1)]
    return np.concatenate([call(tokens[:, a:b], cache) for a, b in pairwise(cuts)], 1)


def resident_in_pieces(name: str, model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """As ``in_pieces``, the way that the library's own generate calls a model."""
    if name == "mlx-lm":
        from mlx_lm.models.cache import make_prompt_cache
    else:
        from mlx_vlm.models.cache import make_prompt_cache

        # The whole model would see a new prompt in every chunk.
        model = libraries.LIBRARIES[name].language(model)
    return in_pieces(lambda t, cache: logits(model, t, cache), tokens, make_prompt_cache(model))


def rows() -> list[tuple[str, str, int | None]]:
    """(library, model_type, bits) of all that runs here; those that mlx-vlm has from mlx-lm, quantized alone."""
    found: list[tuple[str, str, int | None]] = []
    for name, table in TABLES.items():
        for kind in table:
            if (name, kind) in REFUSED or (kind in METAL and not mx.metal.is_available()):
                continue
            if name == "mlx-lm" or kind not in MLX_LM or (name, kind) in UNQUANTIZED:
                found.append((name, kind, None))
            if (name, kind) not in UNQUANTIZED:
                found.append((name, kind, 4))
    return found


def result(name: str, model_type: str) -> str:
    """What becomes of a row, for readers."""
    if (name, model_type) in REFUSED:
        return f"refused: {REFUSED[name, model_type][1]}"
    if model_type in METAL:
        return (
            f"refused where there is no Metal, without which {name} itself does not run it; not checked with"
        )
    if (name, model_type) in UNQUANTIZED:
        return f"the same logits, unquantized; {name} itself does not run what it quantizes"
    return (
        "the same logits, unquantized and at 4 bits"
        if name == "mlx-lm" or model_type not in MLX_LM
        else ("the same logits at 4 bits")
    )


def table() -> str:
    """docs/models.md's table."""
    lines = ["| `model_type` | through | result |", "| --- | --- | --- |"]
    lines += [
        f"| `{kind}` | {name} | {result(name, kind)} |"
        for kind, name in sorted(((kind, name) for name, own in TABLES.items() for kind in own), key=_by_name)
    ]
    return "\n".join(lines) + "\n"


def _by_name(row: tuple[str, str]) -> tuple[str, str]:
    return row[0].lower(), row[1]


if __name__ == "__main__":
    sys.stdout.write(table())
