"""The on-disk layout: where components lie, and that a manifest is either right or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.layout import (
    ALIGNMENT,
    BITS,
    GROUP_SIZES,
    PAGE,
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
    st.lists(st.tuples(st.sampled_from((*BITS, 16)), st.sampled_from(GROUP_SIZES)), min_size=3, max_size=3),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_components_are_aligned_and_apart(
    hidden: int, inner: int, q: list[tuple[int, int]], dtype: str
) -> None:
    named = {p: Quantization(*v) for p, v in zip(("gate", "up", "down"), q)}
    layout = BlobLayout.build(hidden, inner, named, dtype)
    position = 0
    for name, part, c in layout.components():
        assert c.offset % ALIGNMENT == 0 and position <= c.offset < position + ALIGNMENT
        position = c.offset + c.nbytes
        p = layout.projections[name]
        if part == "weight" and p.bits != 16:
            assert c.nbytes * 8 == p.out_dims * p.in_dims * p.bits
    assert position <= layout.blob_size < position + PAGE and layout.blob_size % PAGE == 0
    assert BlobLayout.from_json(json.loads(json.dumps(layout.to_json())), "x") == layout


@pytest.mark.parametrize("hidden", [0, -128, 96])
def test_impossible_layouts(hidden: int) -> None:
    with pytest.raises(ValueError):
        BlobLayout.build(hidden, 128, same_for_all(4, 64), "bfloat16")


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


def parsed() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(manifest().to_json()))
    return data


def write_files(folder: Path, m: Manifest) -> None:
    (folder / "experts").mkdir()
    for entry in m.layers:
        (folder / entry.file).write_bytes(bytes(entry.num_experts * m.layout_of(entry).blob_size))
    for dense in m.dense:
        (folder / dense.file).write_bytes(bytes(dense.size))
    m.save(folder)


def test_save_and_load(tmp_path: Path) -> None:
    m = manifest()
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


def test_another_version() -> None:
    with pytest.raises(FormatError, match="format version 2, but this release reads version 1"):
        Manifest.from_json({**parsed(), "format_version": 2})


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
    ],
)
def test_contradictions_are_refused(path: tuple[str | int, ...], value: object) -> None:
    data = parsed()
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
    root = parsed()
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
    content = bytearray(json.dumps(manifest().to_json()).encode())
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
