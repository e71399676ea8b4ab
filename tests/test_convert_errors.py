"""Bad input to a conversion: one clear line, a named exception, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, Spec, quantized, save_safetensors, write_checkpoint

from mlx_flashmoe.convert import convert
from mlx_flashmoe.errors import ConversionError, FlashMoEError, FormatError, SourceError
from mlx_flashmoe.layout import Manifest
from mlx_flashmoe.models import ARCHITECTURES

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"
LM = "model.language_model."


def refused(source: object, out: Path | str, kind: type[FlashMoEError], says: str, **options: Any) -> None:
    """The conversion raises that, in one line, and leaves no destination behind."""
    out = Path(out)
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(kind, match=says) as e:
        convert(str(source), out, **options)
    line = str(e.value)
    assert "\n" not in line and len(line) < 500
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    with pytest.raises(FormatError):
        Manifest.load(out)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    data = change(data) or data
    path.write_text(json.dumps(data))


def remap(name: str, file: object) -> Callable[[Path], None]:
    return lambda s: edit_json(s / INDEX, lambda d: d["weight_map"].update({LM + name: file}))


def text_config(**changes: Any) -> Callable[[Path], None]:
    def change(data: dict[str, Any]) -> None:
        for key, value in changes.items():
            data["text_config"].pop(key) if value is ... else data["text_config"].update({key: value})

    return lambda s: edit_json(s / "config.json", change)


def top_config(**changes: Any) -> Callable[[Path], None]:
    return lambda s: edit_json(s / "config.json", lambda d: d.update(changes))


def cut(path: str, to: int) -> Callable[[Path], None]:
    return lambda s: os.truncate(s / path, to if to > 0 else (s / path).stat().st_size + to)


BAD_SOURCES: list[tuple[Callable[[Path], Any], str]] = [
    # config.json
    (lambda s: (s / "config.json").unlink(), r"config\.json is missing"),
    (lambda s: (s / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    (lambda s: (s / "config.json").write_bytes(b"\xff\xff"), r"config\.json: not valid JSON"),
    (lambda s: (s / "config.json").write_text("[" * 100_000), r"config\.json: not valid JSON"),
    (lambda s: (s / "config.json").write_text("[1]"), r"config\.json: not a JSON object"),
    (
        top_config(model_type="no_such_model"),
        f"model_type 'no_such_model' is not supported; supported: {', '.join(sorted(ARCHITECTURES))}",
    ),
    (top_config(model_type=None), "model_type None is not supported"),
    (top_config(model_type=["x"] * 9000), r"model_type \[.{,80}\] is not supported"),
    (top_config(text_config=3), "text_config is not an object"),
    (top_config(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
    (text_config(hidden_size=...), r"config\.json \(text_config\): hidden_size is missing"),
    (text_config(num_experts=0), "num_experts must be a whole number from 1 to 65536, not 0"),
    (text_config(num_experts=-4), "num_experts must be a whole number"),
    (text_config(num_experts=4.0), "num_experts must be a whole number"),
    (text_config(num_experts=True), "num_experts must be a whole number"),
    (text_config(num_hidden_layers=10**9), "num_hidden_layers must be a whole number from 1 to 4096"),
    (text_config(num_experts_per_tok=5), "num_experts_per_tok is more than the 4"),
    (text_config(layer_types=["linear_attention"]), "layer_types does not list the 2 layers"),
    (text_config(layer_types=["linear_attention", "mamba"]), "layer_types has 'mamba'"),
    (text_config(layer_types=None), "full_attention_interval is missing"),
    # config.json against the tensors
    (
        text_config(hidden_size=64),
        r"model-0000\d-of-00003\.safetensors: tensor 'model\.language_model\.embed_tokens\.weight' has shape "
        r"\[96, 128\], but .*config\.json implies \[96, 64\]",
    ),
    (text_config(vocab_size=97), r"embed_tokens\.weight' has shape \[96, 128\], but .* implies \[97, 128\]"),
    (
        text_config(moe_intermediate_size=32),
        r"gate_up_proj' has shape \[4, 128, 128\].*implies \[4, 64, 128\]",
    ),
    (text_config(num_experts=8), r"mlp\.gate\.weight' has shape \[4, 128\].*implies \[8, 128\]"),
    (
        text_config(linear_conv_kernel_dim=3),
        r"conv1d\.weight' has shape \[128, 1, 4\].*implies \[128, 1, 3\]",
    ),
    (
        text_config(
            num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "full_attention"]
        ),
        r"source: \d+ tensors \('model\.language_model\.layers\.2\.mlp\.gate\.weight', .*, …\) missing",
    ),
    (
        text_config(num_hidden_layers=1, layer_types=["linear_attention"]),
        r"source: \d+ tensors \('model\.language_model\.layers\.1\..* are not part of the model",
    ),
    (
        text_config(attention_bias=True),
        r"4 tensors \('model\.language_model\.layers\.1\.self_attn\.q_proj\.bias'",
    ),
    # quantization
    (
        top_config(quantization_config={"quant_method": "gptq"}),
        "quantization_config is 'gptq'; only unquantized checkpoints, FP8 .e4m3. and MLX affine quantization are read",
    ),
    (
        top_config(quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}),
        r"FP8 in blocks of \[64, 64\]; blocks of \[128, 128\] are read",
    ),
    (top_config(quantization_config={"quant_method": "fp8"}), r"FP8 in blocks of None"),
    (
        top_config(
            quantization_config={
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}
                },
            }
        ),
        r"compressed-tensors of format 'pack-quantized' .*\('int', 4, 'group'\), group_size None",
    ),
    (
        top_config(quantization_config={"quant_method": "compressed-tensors"}),
        r"compressed-tensors of format None",
    ),
    (
        top_config(quantization={"mode": "mxfp4", "bits": 4, "group_size": 32}),
        "mode 'mxfp4' is not supported",
    ),
    (
        top_config(quantization={"bits": 4, "group_size": 64, "lm_head": {"mode": "nvfp4"}}),
        "lm_head: quantization mode 'nvfp4' is not supported",
    ),
    (top_config(quantization={"bits": 4}), "quantization: no bits and group_size in it"),
    (top_config(quantization=[4]), "quantization is not an object"),
    # files
    (lambda s: (s / FIRST).unlink(), f"{FIRST} is missing, but {INDEX} names it"),
    (cut(FIRST, -1), f"{FIRST}.*truncated"),
    (cut(FIRST, 5), f"{FIRST}: 5 bytes are too few.*truncated"),
    (cut(FIRST, 30), f"{FIRST}: the header should have .* truncated"),
    (
        lambda s: os.truncate(s / FIRST, (s / FIRST).stat().st_size + 3),
        f"{FIRST}: 3 bytes of the file belong to no",
    ),
    (lambda s: (s / FIRST).write_bytes(b"\x04\0\0\0\0\0\0\0nope"), f"{FIRST}: the header is not JSON"),
    (lambda s: ((s / FIRST).unlink(), (s / FIRST).mkdir()), f"{FIRST} is not a file"),
    (lambda s: [p.unlink() for p in s.glob("model*")], f"neither model.safetensors nor {INDEX}"),
    (lambda s: (s / INDEX).write_text("nope"), f"{INDEX}: not valid JSON"),
    (lambda s: (s / INDEX).write_text("{}"), f"{INDEX}: no weight_map in it"),
    (lambda s: (s / "flashmoe.json").write_text("{}"), "is a converted model already"),
    # the index
    (
        remap("norm.weight", "../other.safetensors"),
        r"norm\.weight' is in '\.\./other\.safetensors', which is not",
    ),
    (remap("norm.weight", "/etc/x.safetensors"), "which is not the name of a file in this folder"),
    (remap("norm.weight", "a/b.safetensors"), "which is not the name of a file in this folder"),
    (remap("norm.weight", "a\\b.safetensors"), "which is not the name of a file in this folder"),
    (remap("norm.weight", ".."), "which is not the name of a file in this folder"),
    (remap("norm.weight", "a\0.safetensors"), "which is not the name of a file in this folder"),
    (remap("norm.weight", "\ud800.safetensors"), "which is not the name of a file in this folder"),
    (remap("norm.weight", "config.json"), "which is not the name of a file in this folder"),
    (remap("norm.weight", 3), "which is not the name of a file in this folder"),
    (remap("absent.weight", FIRST), rf"{FIRST}: tensor '.*absent\.weight' is not in it, but {INDEX} says so"),
    (
        lambda s: edit_json(s / INDEX, lambda d: d["weight_map"].pop("lm_head.weight") and None),
        "source: tensor 'lm_head.weight' missing",
    ),
]


@pytest.mark.parametrize(("spoil", "says"), BAD_SOURCES)
def test_bad_source(tmp_path: Path, spoil: Callable[[Path], Any], says: str) -> None:
    source = write_checkpoint(tmp_path / "source", shards=3)
    spoil(source)
    refused(source, tmp_path / "out", SourceError, says)


def replaced(
    name: str, a: Array | None, layout: str = "fused", rename: str | None = None
) -> dict[str, Array]:
    tensors = Spec().published(layout)
    old = tensors.pop(name)
    if a is not None or rename is not None:
        tensors[rename or name] = a or old
    return tensors


def zeros(dtype: str, *shape: int) -> Array:
    size = {"BF16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1, "U32": 4}[dtype]
    return Array(dtype, shape, bytes(int(np.prod(shape)) * size))


EXPERT = f"{LM}layers.1.mlp.experts.2"
STACK = "language_model.model.layers.1.mlp.switch_mlp"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (replaced(f"{LM}norm.weight", None), rf"tensor '{LM}norm\.weight' missing"),
        (
            replaced(f"{LM}layers.0.mlp.experts.down_proj", None),
            r"layers\.0\.mlp\.experts\.down_proj' missing",
        ),
        (replaced(f"{EXPERT}.up_proj.weight", None, "per_expert"), rf"'{EXPERT}\.up_proj\.weight' missing"),
        (replaced(f"{STACK}.down_proj.weight", None, "stacked"), rf"'{STACK}\.down_proj\.weight' missing"),
        (replaced("lm_head.weight", zeros("F8_E4M3", 96, 128)), "tensor 'lm_head.weight_scale_inv' missing"),
        (
            replaced("lm_head.weight", zeros("F8_E4M3", 96, 64)),
            r"has shape \[96, 64\], but .* implies \[96, 128\]",
        ),
        (replaced("lm_head.weight", zeros("U32", 96, 16)), "tensor 'lm_head.scales' missing"),
        (replaced(f"{LM}norm.weight", zeros("I8", 128)), "dtype I8 is not supported"),
        (
            replaced(f"{EXPERT}.up_proj.weight", zeros("F32", 64, 128), "per_expert"),
            r"experts\.2\.up_proj\.weight' is F32, but expert 0 of its layer is BF16",
        ),
        (
            replaced(
                f"{EXPERT}.up_proj.weight", None, "per_expert", f"{LM}layers.1.mlp.experts.4.up_proj.weight"
            ),
            r"experts\.2\.up_proj\.weight' missing",
        ),
        (
            replaced("mtp.fc.weight", None, rename="model.unheard_of.weight"),
            r"tensor 'model\.unheard_of\.weight' is not part of the model",
        ),
        (
            replaced("mtp.fc.weight", None, rename="model.norm.weight"),
            r"norm\.weight'.* are the same tensor of the model",
        ),
        (
            replaced(f"{LM}layers.0.linear_attn.conv1d.weight", zeros("BF16", 128, 4, 1)),
            r"conv1d\.weight' has shape \[128, 4, 1\], but .* implies \[128, 1, 4\]",
        ),
    ],
)
def test_bad_tensors(tmp_path: Path, tensors: dict[str, Array], says: str) -> None:
    write_checkpoint(tmp_path / "source", tensors=tensors)
    refused(tmp_path / "source", tmp_path / "out", SourceError, says)


def test_millions_of_missing_tensors_are_not_all_listed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Spec(experts=1, per_token=1), "per_expert")
    tensors = Spec(experts=1).published("per_expert")
    for i in range(2):
        tensors[f"{LM}layers.{i}.mlp.gate.weight"] = zeros("BF16", 60_000, 128)
    save_safetensors(source / "model.safetensors", tensors)
    text_config(num_experts=60_000)(source)
    refused(source, tmp_path / "out", SourceError, r"10000 tensors \(.*experts\.1\.gate_proj.*, …\) missing")


def quantized_source(folder: Path, bits: int, group_size: int, **exceptions: Any) -> dict[str, Array]:
    tensors, settings = quantized(Spec().published("stacked"), bits, group_size, exceptions)
    write_checkpoint(folder, tensors=tensors, config={**Spec().config(), "quantization": settings})
    return tensors


def test_bad_quantized_sources(tmp_path: Path) -> None:
    tensors = quantized_source(tmp_path / "source", 4, 64)
    source, out = tmp_path / "source", tmp_path / "out"
    refused(
        source,
        out,
        ConversionError,
        "at 4 bits already: 6 bits cannot bring back .*ask for 4 or fewer .--q-bits",
        q_bits=6,
    )
    refused(
        source,
        out,
        ConversionError,
        "4 bits in groups of 64 already.*leave --q-group-size 32 out",
        q_group_size=32,
    )
    edit_json(source / "config.json", lambda d: d["quantization"].update(bits=8))
    refused(
        source, out, SourceError, "its shape says 4 bits in groups of 64, but .* says 8 bits in groups of 64"
    )
    edit_json(source / "config.json", lambda d: d.pop("quantization") and None)
    for part, a, says in (
        ("biases", None, r"'language_model\.lm_head\.biases' missing"),
        ("biases", zeros("BF16", 96, 3), r"has shape \[96, 3\], but .* implies \[96, 2\]"),
        ("biases", zeros("F32", 96, 2), "dtype F32 is not supported here; BF16 would be"),
        ("scales", zeros("BF16", 96, 3), "is no affine quantization of the"),
        ("scales", zeros("BF16", 96, 0), "is no affine quantization of the"),
        ("scales", zeros("BF16"), "is no affine quantization of the"),
        ("weight", zeros("U32", 96, 28), "is no affine quantization of the"),
        ("weight", zeros("U32"), "is no affine quantization of the"),
        ("weight", zeros("BF16", 96, 128), r"'language_model\.lm_head\.scales'.* are not part of the model"),
    ):
        changed = {**tensors, f"language_model.lm_head.{part}": a}
        save_safetensors(source / "model.safetensors", {n: a for n, a in changed.items() if a is not None})
        refused(source, out, SourceError, says)


def test_five_bits_can_only_be_made_fewer(tmp_path: Path) -> None:
    quantized_source(tmp_path / "source", 5, 64)
    refused(
        tmp_path / "source", tmp_path / "out", SourceError, "quantized at 5 bits; 2, 3, 4, 6, 8 are supported"
    )
    assert convert(tmp_path / "source", tmp_path / "out", q_bits=4).layouts[0].gate.bits == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"q_bits": 5}, "q_bits must be one of 2, 3, 4, 6, 8, 16, not 5"),
        ({"q_bits": 4.0}, "q_bits must be one of"),
        ({"q_bits": "4"}, "q_bits must be one of"),
        ({"q_group_size": 16}, "q_group_size must be one of 32, 64, 128, not 16"),
        (
            {"q_group_size": 128},
            r"group size 128 does not divide the 64 inputs of the experts' down_proj \(layer 0\); "
            "--q-group-size 32, 64 would",
        ),
        ({"revision": "main"}, r"a revision \(main\) is for Hugging Face ids"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    write_checkpoint(tmp_path / "source")
    refused(tmp_path / "source", tmp_path / "out", ConversionError, says, **options)


def test_no_group_size_fits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", Spec(inner=48))
    refused(tmp_path / "source", tmp_path / "out", ConversionError, "48 inputs.*only --q-bits 16 would")
    convert(tmp_path / "source", tmp_path / "out", q_bits=16)


def test_bad_paths(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "source"), tmp_path / "out"
    refused(tmp_path / "nowhere", out, SourceError, "nowhere: no such folder, and not a Hugging Face id")
    refused(source / "config.json", out, SourceError, "is a file; give the checkpoint's folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, SourceError, r"config\.json is missing")
    # The same folder for both, a checkpoint to write to, a folder with anything else: each has its own advice.
    refused(source, source, ConversionError, "source is the checkpoint itself: .*for example source-4bit")
    refused(source, f"{source}/../source/", ConversionError, "is the checkpoint itself")
    other = write_checkpoint(tmp_path / "other one")
    refused(
        source,
        other,
        ConversionError,
        "is a checkpoint: it goes after --hf-path.*for example 'other one-4bit'",
    )
    refused(
        source,
        tmp_path,
        ConversionError,
        rf"is not empty: .*takes a new folder, for example {tmp_path}/NAME$",
    )
    (tmp_path / "file").write_text("mine")
    refused(source, tmp_path / "file", ConversionError, "file is a file; choose another folder")
    refused(source, tmp_path / "file/out", ConversionError, "file cannot be written: Not a directory")
    os.symlink(tmp_path / "gone", tmp_path / "link")
    refused(source, tmp_path / "link", ConversionError, "link is a link to nowhere")
    assert (tmp_path / "file").read_text() == "mine"


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 150_000))
    source = write_checkpoint(tmp_path / "source")
    refused(
        source,
        tmp_path / "a/b/out",
        ConversionError,
        r"2\d\d kB of disk space are needed, but only 150 kB are free",
    )
    assert not (tmp_path / "a").exists()
