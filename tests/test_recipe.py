"""Mixed recipes: bits by projection and by layer, from options and from a file, to the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import Spec, quantized, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_convert import PARTS, blob, mx_quantized

from mlx_flashmoe.cli import main
from mlx_flashmoe.convert import convert
from mlx_flashmoe.convert.recipe import Choice, Recipe, read_recipe
from mlx_flashmoe.errors import ConversionError, FlashMoEError
from mlx_flashmoe.layout import Manifest

FILE = """
bits = 4
group_size = 64
down = 6

[layers."0,2-3"]
bits = 8
group_size = 32

[layers."1"]
gate_up = 3
"""


def chosen(folder: Path) -> list[list[tuple[int, int]]]:
    """(bits, group size) of gate, up and down, layer by layer."""
    m = Manifest.load(folder)
    return [[(p.bits, p.group_size) for p in m.layout_of(entry).projections.values()] for entry in m.layers]


def test_a_file(tmp_path: Path) -> None:
    spec = Spec(layers=4, inner=128)
    source = write_checkpoint(tmp_path / "source", spec)
    (tmp_path / "recipe.toml").write_text(FILE)
    m = convert(source, tmp_path / "out", recipe=tmp_path / "recipe.toml")
    eight = [(8, 32)] * 3
    assert chosen(tmp_path / "out") == [eight, [(3, 64), (3, 64), (6, 64)], eight, eight]
    assert len(m.layouts) == 2
    assert m.source["asked"]["recipe"]["layers"]["1"] == {"gate_up": 3}
    weights = spec.weights()
    for layer, qs in enumerate(chosen(tmp_path / "out")):
        found = blob(tmp_path / "out", layer, 2)
        for p, (bits, group) in zip(("gate", "up", "down"), qs):
            published = weights[f"model.layers.{layer}.mlp.experts.2.{p}_proj.weight"]
            for part, expected in zip(PARTS, mx_quantized(published, bits, group)):
                assert found[p, part] == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bits = 3", "3 bits in groups of 64"),
        ("bits = 16", "as published, unquantized"),
        ("down = 6", "gate and up 4 bits, down 6 bits, in groups of 64"),
        ("down = 16", "gate and up 4 bits in groups of 64, down as published, unquantized"),
        ('[layers."2"]\nbits = 8', "4 bits in groups of 64; layer 2 8 bits in groups of 64"),
        (
            'bits = 3\ndown = 6\n[layers."0-1,3"]\nbits = 8\ngroup_size = 32',
            "gate and up 3 bits, down 6 bits, in groups of 64; layers 0-1,3 8 bits in groups of 32",
        ),
        (
            '[layers."0-1,5"]\nbits = 8\n[layers."3"]\ndown = 2',
            "4 bits in groups of 64; layers 0-1,5 8 bits in groups of 64; "
            "layer 3 gate and up 4 bits, down 2 bits, in groups of 64",
        ),
    ],
)
def test_the_plan_says_what_has_which_bits(tmp_path: Path, text: str, says: str) -> None:
    """What most layers have comes first."""
    source = write_checkpoint(tmp_path / "source", Spec(layers=8, extras=False))
    (tmp_path / "recipe.toml").write_text(text)
    lines: list[str] = []
    convert(source, tmp_path / "out", recipe=tmp_path / "recipe.toml", note=lines.append)
    assert lines[0].startswith(f"8 layers of 4 experts: {says}; ")
    sizes = {layout.blob_size for layout in Manifest.load(tmp_path / "out").layouts}
    padded = "an expert is padded to a multiple of 16,384 bytes: fewer bits do not make one of 16,384 smaller"
    assert (padded in lines) == (min(sizes) == 16384)


def test_options_come_before_the_file(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Spec(layers=4))
    (tmp_path / "recipe.toml").write_text(FILE)
    convert(source, tmp_path / "out", q_bits=2, q_group_size=32, recipe=tmp_path / "recipe.toml")
    # --q-bits means all of the experts, but for the layers that the file names.
    eight = [(8, 32)] * 3
    assert chosen(tmp_path / "out") == [eight, [(3, 32), (3, 32), (2, 32)], eight, eight]


def test_options_of_the_command(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    command = ["convert", "--hf-path", str(source), "--mlx-path", str(out)]
    assert main([*command, "--q-bits-down", "8", "--q-bits-gate-up", "3"]) == 0
    assert chosen(out) == [[(3, 64), (3, 64), (8, 64)]] * 2


def test_one_projection_as_published(tmp_path: Path) -> None:
    tensors, settings = quantized(Spec().published("stacked"), 6, 64, {})
    source = write_checkpoint(
        tmp_path / "source", tensors=tensors, config={**Spec().config(), "quantization": settings}
    )
    convert(source, tmp_path / "out", q_bits_gate_up=3)
    assert chosen(tmp_path / "out") == [[(3, 64), (3, 64), (6, 64)]] * 2
    with pytest.raises(ConversionError, match="6 bits already: 8 bits cannot bring back"):
        convert(source, tmp_path / "out2", q_bits_down=8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bits =", "not valid TOML"),
        ("bits = 5", "bits must be one of 2, 3, 4, 6, 8, 16, not 5"),
        ("bits = true", "bits must be one of"),
        ("bit = 4", "'bit' is unknown; bits, gate_up, down, group_size are known"),
        ("layers = 3", "layers is not a table"),
        ("[layers.1]\nlayers = 3", "'layers' is unknown"),
        ("[layers]\n1 = 3", r"layers\.'1' is not a table"),
        ('[layers."3-1"]\nbits = 4', "not layers; give numbers and ranges"),
        ('[layers."x"]\nbits = 4', "not layers"),
        ('[layers."0-1"]\nbits = 4\n[layers."1"]\nbits = 2', "layer 1 is named twice"),
        (
            '[layers."7"]\nbits = 4',
            "the recipe names layer 7, but the checkpoint has experts in layers 0 to 1",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    source = write_checkpoint(tmp_path / "source")
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConversionError, match=says) as e:
        convert(source, tmp_path / "out", recipe=tmp_path / "recipe.toml")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"recipe\.toml cannot be read: No such file"):
        read_recipe(tmp_path / "recipe.toml")


choices = st.builds(
    Choice,
    st.sampled_from([None, 2, 4, 16]),
    st.sampled_from([None, 32, 128]),
    st.sampled_from([None, 3]),
    st.sampled_from([None, 8]),
)


@given(choices, st.dictionaries(st.integers(0, 99), choices, max_size=4))
def test_written_and_read(model: Choice, layers: dict[int, Choice]) -> None:
    recipe = Recipe(model, layers)
    assert Recipe.from_json(recipe.to_json(), "f") == recipe


KEYS = st.sampled_from(["bits", "layers", "down", "1", "0-2"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)))
def test_anything_else_is_a_named_error(data: object) -> None:
    try:
        Recipe.from_json(data, "f")
    except FlashMoEError as e:
        assert str(e).startswith("f")
