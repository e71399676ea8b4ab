"""The on-disk layout: where components lie, and that a manifest is either right or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.layout import (
    ALIGNMENT,
    BITS,
    FLOATS,
    GROUP_SIZES,
    PAGE,
    PROJECTIONS,
    BlobLayout,
    DenseEntry,
    LayerEntry,
    Manifest,
    Quantization,
)


def same_for_all(bits: int, group_size: int) -> dict[str, Quantization]:
    return dict.fromkeys(("gate", "up", "down"), Quantization(bits, group_size))


def test_the_397b_at_4_bits_is_432_pages() -> None:
    layout = BlobLayout.build(4096, 1024, same_for_all(4, 64), "bfloat16")
    assert layout.blob_size == 7_077_888 == 432 * PAGE
    assert layout.gate.weight.shape == (1024, 512) and layout.down.scales.shape == (4096, 16)


@given(
    st.integers(1, 6).map(lambda n: 128 * n),
    st.integers(1, 6).map(lambda n: 128 * n),
    st.lists(st.tuples(st.sampled_from((*BITS, 16)), st.sampled_from(GROUP_SIZES)), min_size=2, max_size=3),
    st.sampled_from(FLOATS),
    st.dictionaries(st.sampled_from(PROJECTIONS), st.sampled_from(FLOATS)),
)
def test_components_are_aligned_and_apart(
    hidden: int, inner: int, q: list[tuple[int, int]], dtype: str, bias: dict[str, str]
) -> None:
    named = {p: Quantization(*v) for p, v in zip(PROJECTIONS[-len(q) :], q)}
    bias = {p: d for p, d in bias.items() if p in named}
    layout = BlobLayout.build(hidden, inner, named, dtype, bias)
    assert list(layout.projections) == list(named) and layout.biased == bool(bias)
    assert {p: v.bias.dtype for p, v in layout.projections.items() if v.bias} == bias
    position = 0
    for name, part, c in layout.components():
        assert c.offset % ALIGNMENT == 0 and position <= c.offset < position + ALIGNMENT
        position = c.offset + c.nbytes
        p = layout.projections[name]
        if part == "weight" and p.bits != 16:
            assert c.nbytes * 8 == p.out_dims * p.in_dims * p.bits
        if part == "bias":
            assert c.shape == (p.out_dims, 1) and c is list(p.components.values())[-1]
    assert position <= layout.blob_size < position + PAGE and layout.blob_size % PAGE == 0
    assert BlobLayout.from_json(json.loads(json.dumps(layout.to_json())), "x") == layout


@pytest.mark.parametrize("hidden", [0, -128, 96])
def test_impossible_layouts(hidden: int) -> None:
    with pytest.raises(ValueError):
        BlobLayout.build(hidden, 128, same_for_all(4, 64), "bfloat16")


@pytest.mark.parametrize(
    ("names", "dtype", "bias", "says"),
    [
        (("gate", "up", "down"), "uint32", {}, "got 'uint32'"),
        (("gate", "up", "down"), "bfloat16", {"up": "uint32"}, "got 'uint32'"),
        (("up", "down"), "bfloat16", {"gate": "bfloat16"}, "has up, down, but got gate"),
        (("up", "down", "fc1"), "bfloat16", {}, "has up, down, but got fc1"),
    ],
)
def test_impossible_projections(names: tuple[str, ...], dtype: str, bias: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BlobLayout.build(128, 128, dict.fromkeys(names, Quantization(4, 64)), dtype, bias)


def manifest() -> Manifest:
    mixed = {"gate": Quantization(4, 64), "up": Quantization(4, 64), "down": Quantization(6, 32)}
    return Manifest(
        model_type="qwen3_5_moe",
        source={"path": "org/name", "revision": None},
        dense_quantization={"model.embed_tokens": Quantization(4, 64), "lm_head": Quantization(8, 32)},
        layouts=(
            BlobLayout.build(128, 64, same_for_all(4, 64), "bfloat16"),
            BlobLayout.build(128, 64, mixed, {"gate": "bfloat16", "up": "bfloat16", "down": "float32"}),
        ),
        layers=(LayerEntry(0, 2, 0, (1, 2**32 - 1)), LayerEntry(1, 2, 1, (0, 7))),
        dense=(DenseEntry("model.safetensors", 123, 456),),
    )


def newer() -> Manifest:
    """One that uses all that version 2 adds."""
    two = {"up": Quantization(4, 64), "down": Quantization(16, 0)}
    return replace(
        manifest(),
        library="mlx-lm",
        layouts=(
            BlobLayout.build(128, 64, two, "bfloat16", {"down": "float32"}),
            BlobLayout.build(128, 64, same_for_all(4, 64), "float16", {"gate": "bfloat16", "up": "float16"}),
        ),
        layers=(
            LayerEntry(0, 2, 0, (1, 2**32 - 1), "model.layers.0.mlp.switch_mlp"),
            LayerEntry(1, 2, 1, (0, 7), "model.layers.1.mlp.switch_mlp"),
        ),
    )


EVERY_VERSION = pytest.mark.parametrize("written", [manifest, newer])


def parsed(m: Manifest | None = None) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps((m or manifest()).to_json()))
    return data


def write_files(folder: Path, m: Manifest) -> None:
    (folder / "experts").mkdir()
    for entry in m.layers:
        (folder / entry.file).write_bytes(bytes(entry.num_experts * m.layout_of(entry).blob_size))
    for dense in m.dense:
        (folder / dense.file).write_bytes(bytes(dense.size))
    m.save(folder)


@EVERY_VERSION
def test_save_and_load(tmp_path: Path, written: Callable[[], Manifest]) -> None:
    m = written()
    write_files(tmp_path, m)
    assert Manifest.load(tmp_path) == m
    assert [p.name for p in tmp_path.glob("*.part")] == []
    assert m.expert_bytes == sum((tmp_path / e.file).stat().st_size for e in m.layers)


@pytest.mark.parametrize("name", ["experts/layer_001.bin", "model.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "short", "long"])
def test_a_file_missing_or_of_another_size(tmp_path: Path, name: str, fault: str) -> None:
    write_files(tmp_path, manifest())
    path = tmp_path / name
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if fault == "short" else path.read_bytes() + b"x")
    with pytest.raises(FormatError, match=f"{name}.*{'missing' if fault == 'missing' else 'should have'}"):
        Manifest.load(tmp_path)


def test_not_a_converted_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        Manifest.load(tmp_path / "x")
    with pytest.raises(FormatError, match=r"no flashmoe\.json in it"):
        Manifest.load(tmp_path)
    for text, says in (
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a mlx-flashmoe"),
    ):
        (tmp_path / "flashmoe.json").write_text(text)
        with pytest.raises(FormatError, match=says):
            Manifest.load(tmp_path)
    (tmp_path / "flashmoe.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="cannot be read"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("version", [0, 3, 1.0, "1", None, [1]])
def test_another_version(version: object) -> None:
    with pytest.raises(FormatError, match=r"format version .*, but this release reads versions 1 and 2"):
        Manifest.from_json({**parsed(), "format_version": version})


# As the first release wrote it.
VERSION_1 = (
    '{"format":"mlx-flashmoe","format_version":1,"model_type":"qwen3_moe","source":{"path":"org/name","revision":null},'
    '"dense_quantization":{"lm_head":{"bits":8,"group_size":32}},"layouts":[{"hidden_size":64,"intermediate_size":32,'
    '"gate":{"out_dims":32,"in_dims":64,"bits":4,"group_size":32,"weight":{"dtype":"uint32","shape":[32,8],"offset":0},'
    '"scales":{"dtype":"bfloat16","shape":[32,2],"offset":1024},"biases":{"dtype":"bfloat16","shape":[32,2],'
    '"offset":1280}},"up":{"out_dims":32,"in_dims":64,"bits":4,"group_size":32,"weight":{"dtype":"uint32",'
    '"shape":[32,8],"offset":1536},"scales":{"dtype":"bfloat16","shape":[32,2],"offset":2560},"biases":'
    '{"dtype":"bfloat16","shape":[32,2],"offset":2816}},"down":{"out_dims":64,"in_dims":32,"bits":16,"group_size":0,'
    '"weight":{"dtype":"bfloat16","shape":[64,32],"offset":3072},"scales":null,"biases":null},"blob_size":16384}],'
    '"layers":[{"layer":0,"num_experts":2,"layout":0,"crc32":[1,4294967295]}],'
    '"dense":[{"file":"model.safetensors","size":123,"crc32":456}]}'
)


def test_version_1_is_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    mixed = {"gate": Quantization(4, 32), "up": Quantization(4, 32), "down": Quantization(16, 0)}
    m = Manifest.from_json(json.loads(VERSION_1))
    assert m.layouts == (BlobLayout.build(64, 32, mixed, "bfloat16"),)
    assert (m.library, m.layers[0].module, m.format_version) == (None, None, 1)
    m.save(tmp_path)
    assert (tmp_path / "flashmoe.json").read_text() == VERSION_1


@pytest.mark.parametrize(
    "used",
    [
        {"layouts": newer().layouts[:1] * 2},
        {"layouts": newer().layouts[1:] * 2},
        {"library": "mlx-vlm", "layers": newer().layers},
    ],
)
def test_what_version_1_has_not_is_version_2_and_nothing_else_is(used: dict[str, Any]) -> None:
    m = replace(manifest(), **used)
    assert parsed(m)["format_version"] == 2 and Manifest.from_json(parsed(m)) == m
    for data, other in ((parsed(m), 1), (parsed(), 2)):
        with pytest.raises(FormatError, match=f"format version {other} with contents of {3 - other}"):
            Manifest.from_json({**data, "format_version": other})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers", 0, "layout"), 2),
        (("layers", 0, "layout"), -1),
        (("layers", 0, "layer"), 1),
        (("layers", 0, "layer"), -1),
        (("layers", 0, "num_experts"), 3),
        (("layers", 0, "num_experts"), "2"),
        (("layers", 0, "num_experts"), float("inf")),
        (("layers", 0, "crc32"), "12"),
        (("layers", 0, "crc32", 0), 1.0),
        (("layers", 0, "crc32", 0), True),
        (("layers", 0, "crc32", 0), -1),
        (("layers", 0, "crc32", 0), 1 << 32),
        (("layouts", 0, "blob_size"), 16385),
        (("layouts", 0, "hidden_size"), -128),
        (("layouts", 0, "gate", "weight", "offset"), 4),
        (("layouts", 0, "gate", "weight", "shape", 0), 63),
        (("layouts", 0, "gate", "scales", "dtype"), "float64"),
        (("layouts", 0, "gate", "bits"), 5),
        (("layouts", 0, "down", "scales"), None),
        (("layouts", 0), None),
        (("dense", 0, "file"), "../model.safetensors"),
        (("dense", 0, "file"), "/model.safetensors"),
        (("dense", 0, "file"), "model\0.safetensors"),
        (("dense", 0, "file"), "\ud800.safetensors"),
        (("dense", 0, "file"), "model.bin"),
        (("dense", 0, "size"), -1),
        (("dense_quantization", "lm_head", "bits"), 5),
        (("dense_quantization", "lm_head", "group_size"), 0),
        (("dense_quantization",), []),
        (("source",), [["path", "x"]]),
        (("model_type",), None),
        (("unknown",), 1),
        (("library",), "mlx-lm"),
        (("layers", 0, "module"), "model.layers.0.mlp.switch_mlp"),
        (("layouts", 0, "up", "bias"), None),
    ],
)
def test_contradictions_are_refused(path: tuple[str | int, ...], value: object) -> None:
    refused(parsed(), path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("library",), None),
        (("library",), "mlx"),
        (("library",), ["mlx-lm"]),
        (("layers", 0, "module"), None),
        (("layers", 0, "module"), 3),
        (("layers", 0, "module"), ""),
        (("layers", 0, "module"), "model..mlp"),
        (("layers", 0, "module"), "model.layers.1.mlp.switch_mlp"),
        (("layouts", 0, "gate"), None),
        (("layouts", 0, "gate"), parsed()["layouts"][0]["gate"]),
        (("layouts", 0, "up", "bias"), None),
        (("layouts", 0, "down", "bias"), None),
        (("layouts", 0, "down", "bias", "dtype"), "uint32"),
        (("layouts", 0, "down", "bias", "dtype"), ["float32"]),
        (("layouts", 0, "down", "bias", "offset"), 0),
        (("layouts", 0, "down", "bias", "shape"), [128]),
    ],
)
def test_contradictions_of_version_2_are_refused(path: tuple[str | int, ...], value: object) -> None:
    refused(parsed(newer()), path, value)


def refused(data: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    node: Any = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(FormatError) as e:
        Manifest.from_json(data, "x/flashmoe.json")
    assert str(e.value).startswith("x/flashmoe.json") and "\n" not in str(e.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-1, 128) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(st.data())
def test_any_change_is_refused_or_kept_exactly(data: st.DataObject) -> None:
    """Replaces, deletes or duplicates random nodes: FormatError, or a manifest that says just what the JSON says."""
    root = parsed(data.draw(st.sampled_from([manifest, newer]))())
    for _ in range(data.draw(st.integers(1, 2))):
        node: Any = root
        while True:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        change = data.draw(st.sampled_from(["replace", "delete", "duplicate"]))
        if change == "replace":
            node[key] = data.draw(json_values)
        elif change == "delete":
            del node[key]
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        if not root:
            break
    try:
        found = Manifest.from_json(root)
    except FormatError:
        return
    assert json.loads(json.dumps(found.to_json())) == root


@settings(max_examples=200)
@given(st.data())
def test_damaged_text_is_refused_or_kept_exactly(tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    written = data.draw(st.sampled_from([manifest, newer]))
    content = bytearray(json.dumps(written().to_json()).encode())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] = data.draw(st.integers(0, 255))
    else:
        del content[at : at + data.draw(st.integers(1, 200))]
    (folder / "flashmoe.json").write_bytes(content)
    with pytest.raises(FormatError):  # at the latest because there are no files
        Manifest.load(folder)
    try:
        found = Manifest.from_json(json.loads(content))
    except (ValueError, FormatError):
        return
    assert json.loads(json.dumps(found.to_json())) == json.loads(content)
