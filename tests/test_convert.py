"""Conversion: every byte of a converted folder is what the checkpoint and the options say."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import (
    LAYOUTS,
    NORMS,
    Array,
    Spec,
    array,
    quantized,
    save_safetensors,
    to_bytes,
    to_mlx,
    write_checkpoint,
)

from mlx_flashmoe.convert import convert, plan, transform, units
from mlx_flashmoe.convert.safetensors import SafetensorsFile
from mlx_flashmoe.layout import Manifest, Quantization

PARTS = ("weight", "scales", "biases")


def blob(folder: Path, layer: int, expert: int) -> dict[tuple[str, str], bytes]:
    """The components of one expert as they lie in its layer's file."""
    m = Manifest.load(folder)
    entry = next(e for e in m.layers if e.layer == layer)
    layout = m.layout_of(entry)
    with open(folder / entry.file, "rb") as f:
        f.seek(expert * layout.blob_size)
        data = f.read(layout.blob_size)
    assert zlib.crc32(data) == entry.crc32[expert]
    return {(p, part): data[c.offset : c.offset + c.nbytes] for p, part, c in layout.components()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the manifest, which names its source."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "flashmoe.json"
    }


def dense(folder: Path) -> dict[str, Array]:
    found = {}
    for entry in Manifest.load(folder).dense:
        content = (folder / entry.file).read_bytes()
        assert (len(content), zlib.crc32(content)) == (entry.size, entry.crc32)
        file = SafetensorsFile(folder / entry.file)
        found.update({n: Array(t.dtype, t.shape, t.read().tobytes()) for n, t in file.tensors.items()})
        file.close()
    return found


def mx_quantized(a: Array, bits: int, group_size: int) -> tuple[bytes, bytes, bytes]:
    weight, scales, biases = mx.quantize(to_mlx(a), group_size, bits)
    return to_bytes(weight), to_bytes(scales), to_bytes(biases)


def check_experts(folder: Path, spec: Spec, bits: int, group_size: int) -> None:
    weights = spec.weights()
    for layer in range(spec.layers):
        for e in range(spec.experts):
            found = blob(folder, layer, e)
            for p in ("gate", "up", "down"):
                published = weights[f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"]
                if bits == 16:
                    assert found.pop((p, "weight")) == published.data
                    continue
                for part, expected in zip(PARTS, mx_quantized(published, bits, group_size)):
                    assert found.pop((p, part)) == expected, (layer, e, p, part)
            assert not found


def check_dense(folder: Path, spec: Spec, layout: str, bits: int, group_size: int) -> None:
    """Everything but experts; dims that the group size does not divide stay as published."""
    found = dense(folder)
    recorded = dict(Manifest.load(folder).dense_quantization)
    for name, a in spec.weights().items():
        path = name.removesuffix(".weight")
        if ".experts." in name:
            continue
        q = (8, 64) if path.endswith(("mlp.gate", "shared_expert_gate")) else (bits, group_size)
        norm = name.endswith(NORMS) or name == "model.norm.weight"
        if path.endswith("conv1d"):
            assert found.pop(name) == Array(a.dtype, (a.shape[0], a.shape[2], 1), a.data)
        elif norm and layout == "stacked":
            assert found.pop(name) == array(a.float32() + 1, spec.dtype)
        elif norm:
            assert found.pop(name) == array(a.float32() + np.float32(1), "F32"), name
        elif len(a.shape) == 1 or bits == 16 or a.shape[1] % q[1]:
            assert found.pop(name) == a, name
        else:
            assert recorded.pop(path) == Quantization(*q)
            for part, expected in zip(PARTS, mx_quantized(a, *q)):
                assert found.pop(f"{path}.{part}").data == expected, (path, part)
    assert not found and not recorded


@pytest.mark.parametrize(
    ("bits", "group_size", "layout", "shards", "dtype"),
    [
        (4, 64, "fused", 1, "BF16"),
        (4, 64, "per_expert", 3, "BF16"),
        (4, 64, "stacked", 2, "BF16"),
        (2, 32, "fused", 3, "F16"),
        (3, 128, "per_expert", 1, "F32"),
        (6, 64, "stacked", 1, "F32"),
        (8, 32, "per_expert", 5, "BF16"),
        (16, 64, "fused", 1, "BF16"),
        (16, 64, "stacked", 1, "F32"),
        (16, 64, "per_expert", 2, "F16"),
    ],
)
def test_every_value(
    tmp_path: Path, bits: int, group_size: int, layout: str, shards: int, dtype: str
) -> None:
    spec = Spec(dtype=dtype, inner=128, shared=128, seed=bits)
    write_checkpoint(tmp_path / "source", spec, layout, shards=shards)
    made = convert(tmp_path / "source", tmp_path / "out", q_bits=bits, q_group_size=group_size)
    assert made == Manifest.load(tmp_path / "out")
    check_experts(tmp_path / "out", spec, bits, group_size)
    check_dense(tmp_path / "out", spec, layout, bits, group_size)


def test_four_bits_in_groups_of_64_is_the_default(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    check_experts(tmp_path / "out", Spec(), 4, 64)
    check_dense(tmp_path / "out", Spec(), "fused", 4, 64)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(text_only=True),
        Spec(tied=True, layers=3, interval=3),
        Spec(tied=True, text_only=True),
        Spec(attention_bias=True, interval=1, kv_heads=2),
        Spec(interval=5, experts=7, value_heads=4, key_heads=2, layers=1),
        Spec(shared=96, vocab=33),
        Spec(hidden=64, overrides={"layer_types": None, "full_attention_interval": 2}),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_configurations(tmp_path: Path, spec: Spec, layout: str) -> None:
    write_checkpoint(tmp_path / "source", spec, layout)
    convert(tmp_path / "source", tmp_path / "out", q_bits=4)
    check_experts(tmp_path / "out", spec, 4, 64)
    check_dense(tmp_path / "out", spec, layout, 4, 64)


def test_layouts_give_the_same_blobs(tmp_path: Path) -> None:
    found = []
    for layout in LAYOUTS:
        write_checkpoint(tmp_path / layout, Spec(), layout, shards=2)
        convert(tmp_path / layout, tmp_path / f"{layout}-out", q_bits=3)
        found.append({n: b for n, b in files(tmp_path / f"{layout}-out").items() if n.startswith("experts")})
    assert len(found[0]) == 2 and found[0] == found[1] == found[2]


def test_a_tied_checkpoint_may_have_its_lm_head(tmp_path: Path) -> None:
    spec = Spec(tied=True)
    tensors = spec.published("fused")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "source", spec, tensors=tensors)
    lines: list[str] = []
    convert(tmp_path / "source", tmp_path / "out", note=lines.append)
    check_dense(tmp_path / "out", spec, "fused", 4, 64)
    assert "lm_head.* (tied" in lines[0]


def test_the_outer_tie_flag_counts(tmp_path: Path) -> None:
    """As in transformers, where the model with vision goes by its own flag, not by its text part's."""
    spec = Spec(overrides={"tie_word_embeddings": True})
    write_checkpoint(tmp_path / "source", spec)
    convert(tmp_path / "source", tmp_path / "out")
    check_dense(tmp_path / "out", spec, "fused", 4, 64)


def write_quantized(
    folder: Path, bits: int, group_size: int, exceptions: dict | None = None
) -> dict[str, Array]:
    """A stacked checkpoint as mlx-lm quantizes it; returns its tensors."""
    spec = Spec(inner=128)
    tensors, settings = quantized(spec.published("stacked"), bits, group_size, exceptions or {})
    config = {**spec.config(), "quantization": settings, "quantization_config": settings}
    write_checkpoint(folder, tensors=tensors, config=config, shards=2)
    return tensors


MIXED = {
    "layers.1.mlp.switch_mlp.down_proj": (6, 32),
    "model.embed_tokens": (8, 64),
    "lm_head": None,
    "layers.0.linear_attn.out_proj": (2, 32),
}


def check_as_published(folder: Path, tensors: dict[str, Array], changed: tuple[str, ...] = ()) -> None:
    """Every tensor of a stacked checkpoint is there byte for byte, but for the modules named."""
    everything = dense(folder)
    m = Manifest.load(folder)
    for name, a in tensors.items():
        if name.startswith("vision_tower") or name.removeprefix("language_model.").startswith(changed or "-"):
            continue
        if ".switch_mlp." not in name:
            assert everything[name.removeprefix("language_model.")] == a, name
            continue
        layer = int(name.split(".")[3])
        p, part = name.split("switch_mlp.")[1].replace("_proj", "").split(".")
        for e in range(m.layers[0].num_experts):
            each = len(a.data) // a.shape[0]
            assert blob(folder, layer, e)[p, part] == a.data[e * each : (e + 1) * each], (name, e)


@pytest.mark.parametrize(
    ("asked", "exceptions"),
    [
        ((None, None), {}),
        ((4, None), {}),
        ((4, 64), {}),
        ((16, None), {}),
        ((None, None), MIXED),
        ((4, 64), MIXED),
    ],
)
def test_quantized_checkpoints_are_repacked_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple, exceptions: dict
) -> None:
    tensors = write_quantized(tmp_path / "source", 4, 64, exceptions)
    monkeypatch.setattr(transform, "quantize", None)  # and without a detour
    m = convert(tmp_path / "source", tmp_path / "out", q_bits=asked[0], q_group_size=asked[1])
    check_as_published(tmp_path / "out", tensors)
    names = set(dense(tmp_path / "out"))
    assert {f"{path}.scales" for path in m.dense_quantization} == {n for n in names if n.endswith("scales")}
    if exceptions:
        assert len(m.layouts) == 2 and [e.layout for e in m.layers] == [0, 1]
        assert m.layouts[1].down.bits == 6 and m.layouts[1].down.group_size == 32
        assert m.dense_quantization["model.embed_tokens"] == Quantization(8, 64)
        assert "lm_head" not in m.dense_quantization


def test_quantized_without_a_word_in_config_json(tmp_path: Path) -> None:
    """Bits and group sizes follow from shapes."""
    tensors, _ = quantized(Spec().published("stacked"), 6, 32, {})
    write_checkpoint(tmp_path / "source", tensors=tensors)
    m = convert(tmp_path / "source", tmp_path / "out")
    assert m.layouts[0].up.bits == 6 and m.layouts[0].up.group_size == 32
    check_as_published(tmp_path / "out", tensors)


@pytest.mark.parametrize(("group_size", "expected"), [(None, 64), (32, 32), (128, 128)])
def test_fewer_bits_quantize_the_dequantized_values(
    tmp_path: Path, group_size: int | None, expected: int
) -> None:
    tensors = write_quantized(tmp_path / "source", 8, 64)
    convert(tmp_path / "source", tmp_path / "out", q_bits=3, q_group_size=group_size)

    def again(path: str, index: int | None = None) -> list[bytes]:
        parts = [to_mlx(tensors[f"language_model.{path}.{part}"]) for part in PARTS]
        if index is not None:
            parts = [p[index] for p in parts]
        values = mx.dequantize(*parts, group_size=64, bits=8)
        return [to_bytes(v) for v in mx.quantize(values, expected, 3)]

    for p in ("gate", "up", "down"):
        made = [blob(tmp_path / "out", 1, 2)[p, part] for part in PARTS]
        assert made == again(f"model.layers.1.mlp.switch_mlp.{p}_proj", 2)
    found = dense(tmp_path / "out")
    for path in ("lm_head", "model.embed_tokens", "model.layers.1.self_attn.q_proj"):
        assert [found[f"{path}.{part}"].data for part in PARTS] == again(path)
    kept = ["model.layers.0.mlp.gate"]
    if expected == 128:
        kept.append("model.layers.1.self_attn.o_proj")  # its 64 inputs are no whole group
    for path in kept:
        assert all(found[f"{path}.{part}"] == tensors[f"language_model.{path}.{part}"] for part in PARTS)


@pytest.mark.parametrize("group_size", [None, 64])
def test_fewer_bits_leave_what_has_no_more(tmp_path: Path, group_size: int | None) -> None:
    exceptions = {"linear_attn.out_proj": (2, 32), "linear_attn.in_proj_z": (4, 32), "lm_head": None}
    tensors = write_quantized(tmp_path / "source", 6, 64, exceptions)
    m = convert(tmp_path / "source", tmp_path / "out", q_bits=4, q_group_size=group_size)
    found = dense(tmp_path / "out")
    for path, bits in (
        ("model.layers.0.linear_attn.out_proj", 2),
        ("model.layers.0.linear_attn.in_proj_z", 4),
    ):
        assert m.dense_quantization[path] == Quantization(bits, 32)
        assert all(found[f"{path}.{part}"] == tensors[f"language_model.{path}.{part}"] for part in PARTS)
    assert m.dense_quantization["lm_head"] == Quantization(4, 64)
    assert [found[f"lm_head.{p}"].data for p in PARTS] == list(
        mx_quantized(tensors["language_model.lm_head.weight"], 4, 64)
    )


def test_modules_that_the_group_does_not_divide_are_named(tmp_path: Path) -> None:
    spec = Spec(shared=96, hidden=128)
    write_checkpoint(tmp_path / "source", spec)
    lines: list[str] = []
    m = convert(tmp_path / "source", tmp_path / "out", q_bits=4, note=lines.append)
    kept = [line for line in lines if "shared_expert.down_proj" in line]
    assert len(kept) == 1 and ": 2 (" in kept[0]
    assert not any("shared_expert.down_proj" in path for path in m.dense_quantization)


def test_pieces_and_several_dense_files_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "whole", q_bits=4)
    largest = 0
    real = SafetensorsFile.read_into

    def read_into(self: SafetensorsFile, offset: int, buffers: list[memoryview]) -> None:
        nonlocal largest
        if offset > 8:  # not the header
            largest = max(largest, sum(map(len, buffers)))
        real(self, offset, buffers)

    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)
    monkeypatch.setattr(units, "PIECE", 2048)
    monkeypatch.setattr(plan, "DENSE_FILE_BYTES", 20_000)
    m = convert(tmp_path / "source", tmp_path / "pieces", q_bits=4)
    n = len(m.dense)
    assert n > 3
    assert [d.file for d in m.dense] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert sum(d.size for d in m.dense) < n * 25_000
    assert dense(tmp_path / "pieces") == dense(tmp_path / "whole")
    whole, pieces = files(tmp_path / "whole"), files(tmp_path / "pieces")
    assert [pieces[f"experts/layer_00{i}.bin"] == whole[f"experts/layer_00{i}.bin"] for i in (0, 1)] == [
        True
    ] * 2
    # What is read at once is a piece, or one expert's matrix, never a whole stack of them.
    assert 0 < largest <= 64 * 128 * 2
    for d in m.dense:
        loaded = mx.load(str(tmp_path / "pieces" / d.file))
        assert all(v.size for v in loaded.values())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:9_973], at))
    write_checkpoint(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    check_experts(tmp_path / "out", Spec(), 4, 64)
    check_dense(tmp_path / "out", Spec(), "fused", 4, 64)


def test_gaps_in_blobs_are_zero(tmp_path: Path) -> None:
    """Also where a thread's buffer held blobs of another layout before."""
    write_quantized(tmp_path / "source", 4, 64, MIXED)
    m = convert(tmp_path / "source", tmp_path / "out")
    for entry in m.layers:
        data = np.fromfile(tmp_path / "out" / entry.file, np.uint8).reshape(entry.num_experts, -1)
        for _, _, c in m.layout_of(entry).components():
            data[:, c.offset : c.offset + c.nbytes] = 0
        assert not data.any()


def test_progress_and_notes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", Spec(layers=3))
    seen: list[tuple[int, int, str]] = []
    lines: list[str] = []
    convert(tmp_path / "source", tmp_path / "out", progress=lambda *a: seen.append(a), note=lines.append)
    done = [d for d, _, _ in seen]
    assert done == sorted(done) and done[0] == 0
    used = [a for n, a in Spec(layers=3).published("fused").items() if "visual" not in n and "mtp" not in n]
    assert {total for _, total, _ in seen} == {sum(len(a.data) for a in used)} == {done[-1]}
    assert {"dense part", "layer 1 of 3", "layer 3 of 3"} <= {what for _, _, what in seen}
    assert lines[0] == "left out, not used for text: 3 tensors (2 of model.visual.*, 1 of mtp.*)"
    assert lines[1].startswith("3 layers of 4 experts: 4 bits in groups of 64; 16,384 bytes per expert: ")
    assert (
        lines[2]
        == "an expert is padded to a multiple of 16,384 bytes: fewer bits do not make one of 16,384 smaller"
    )
    assert lines[-1] == "it takes less than a minute"
    assert lines[-2].startswith("to read 993 kB, to write 327 kB; disk space needed 329 kB of ")
    assert not any("\n" in line for line in lines)


def test_what_is_kept_as_published(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    for name in (
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "LICENSE",
        "README.md",
        "x.py",
        ".hidden.json",
    ):
        (source / name).write_text(name)
    convert(source, tmp_path / "out")
    kept = [
        *("LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ]
    written = {n: b for n, b in files(tmp_path / "out").items() if not n.endswith((".bin", ".safetensors"))}
    assert written == {name: (source / name).read_bytes() for name in kept}


def test_an_empty_folder_serves(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    convert(str(tmp_path / "source"), str(tmp_path / "out"))
    assert Manifest.load(tmp_path / "out").source == {
        "path": str(tmp_path / "source"),
        "revision": None,
        "asked": {"revision": None, "recipe": {}},
        "files": {
            path.name: zlib.crc32(path.read_bytes())
            for path in (tmp_path / "source").iterdir()
            if path.suffix != ".safetensors"
        },
    }


def test_index_with_one_file(tmp_path: Path) -> None:
    """As mlx-lm writes it: one file, and an index all the same."""
    source = write_checkpoint(tmp_path / "source", Spec(), "stacked")
    names = Spec().published("stacked")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "out")
    check_experts(tmp_path / "out", Spec(), 4, 64)


def test_unaligned_data(tmp_path: Path) -> None:
    """Published tensors may start at any byte."""
    tensors = {"mtp.odd": Array("U8", (3,), b"abc"), **Spec(dtype="F32").published("fused")}
    write_checkpoint(tmp_path / "source", Spec(dtype="F32"))
    save_safetensors(tmp_path / "source/model.safetensors", tensors)
    convert(tmp_path / "source", tmp_path / "out", q_bits=8)
    check_experts(tmp_path / "out", Spec(dtype="F32"), 8, 64)
    check_dense(tmp_path / "out", Spec(dtype="F32"), "fused", 8, 64)
