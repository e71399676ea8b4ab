"""FP8 checkpoints as torch writes them: their values are, bit for bit, torch's own float8 times the block's scale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is the reference; pip install .[reference]")
pytest.importorskip("transformers", reason="transformers is the reference; pip install .[reference]")
pytest.importorskip("safetensors", reason="safetensors writes the checkpoints; pip install .[reference]")

import mlx.core as mx
import numpy as np
import torch
from checkpoints_hf import SHAPES, random_model, reference_logits, save
from safetensors.torch import load_file, save_file

from mlx_flashmoe import convert, load
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import Manifest

BLOCK = 128
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
ROWS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
}
# The rest stays as it is, as in releases.
EXPERTS_AND_ATTENTION = ("_proj.weight", "_proj", "in_proj_qkv.weight", "in_proj_z.weight", ".w1.weight")
EXPERTS_AND_ATTENTION += (".w2.weight", ".w3.weight", ".kv_a_proj_with_mqa.weight")
NAN = 0x7F  # and 0xFF
NUMBERS = torch.tensor([code for code in range(256) if code & 0x7F != NAN], dtype=torch.uint8)
INDEX = "model.safetensors.index.json"


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of its block, or of its row, for every number; the last blocks may be cut off."""
    if scales.shape[-1] == 1 and scales.shape[-2] == shape[-2]:
        return scales.float().expand(shape)
    rows = scales.float().repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(BLOCK, -1)[..., : shape[-1]]


def to_fp8(w: torch.Tensor, dtype: torch.dtype, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and scales in ``dtype`` that make the largest number of a block or a row the largest of e4m3."""
    if by_row:
        scales = (w.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).to(dtype)
        return (w / spread(scales, w.shape)).to(torch.float8_e4m3fn), scales
    right, below = -w.shape[-1] % BLOCK, -w.shape[-2] % BLOCK
    blocks = torch.nn.functional.pad(w, (0, right, 0, below)).unflatten(-1, (-1, BLOCK))
    largest = blocks.unflatten(-3, (-1, BLOCK)).abs().amax((-3, -1))
    scales = (largest / torch.finfo(torch.float8_e4m3fn).max).to(dtype)
    return (w / spread(scales, w.shape)).to(torch.float8_e4m3fn), scales


def every_code(shape: torch.Size) -> torch.Tensor:
    count = shape.numel()
    codes = NUMBERS.repeat(-(-count // len(NUMBERS)))[:count]
    return codes.reshape(shape).view(torch.float8_e4m3fn)


def checkpoints(
    folder: Path,
    layout: str,
    scales: torch.dtype,
    values: torch.dtype,
    codes: str,
    shape: str = "no multiples of 128",
    quantization: dict[str, Any] = BLOCKS,
) -> None:
    """folder/fp8, and folder/plain with the same values as torch computes them, in dtype ``values``.

    codes: "of a model", or "all" in turn.
    """
    plain, fp8 = folder / "plain", folder / "fp8"
    save(random_model(shape), plain, layout)
    by_row = quantization is ROWS
    shutil.copytree(plain, fp8)
    for path in plain.glob("*.safetensors"):
        coded, decoded = {}, {}
        for name, w in load_file(path).items():
            if not name.endswith(EXPERTS_AND_ATTENTION):
                coded[name] = decoded[name] = w.to(values)
                continue
            code, scale = to_fp8(w, scales, by_row)
            if codes == "all":
                code = every_code(code.shape)
            coded[name], coded[f"{name}_scale" if by_row else f"{name}_scale_inv"] = code, scale
            decoded[name] = (code.float() * spread(scale, code.shape)).to(values)
        save_file(coded, fp8 / path.name)
        save_file(decoded, path)
    if (fp8 / INDEX).exists():
        weight_map = {name: path.name for path in fp8.glob("*.safetensors") for name in load_file(path)}
        (fp8 / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def blobs(folder: Path) -> list[dict[tuple[str, str], mx.array]]:
    """Layer by layer: component -> what it holds of all experts."""
    manifest = Manifest.load(folder)
    found = []
    for entry in manifest.layers:
        layout = manifest.layout_of(entry)
        raw = np.fromfile(folder / entry.file, np.uint8).reshape(entry.num_experts, layout.blob_size)
        found.append(
            {
                (name, part): mx.array(raw[:, c.offset : c.offset + c.nbytes]).view(getattr(mx, c.dtype))
                for name, part, c in layout.components()
            }
        )
    return found


each = pytest.mark.parametrize(
    ("layout", "scales", "codes"),
    [
        ("wrapped", torch.bfloat16, "all"),
        ("wrapped", torch.float32, "of a model"),
        ("per expert", torch.float32, "all"),
        ("per expert", torch.bfloat16, "of a model"),
    ],
)


@each
def test_16_bits_are_torchs_values_in_bfloat16(
    tmp_path: Path, layout: str, scales: torch.dtype, codes: str
) -> None:
    checkpoints(tmp_path, layout, scales, torch.bfloat16, codes)
    convert(tmp_path / "fp8", tmp_path / "made", q_bits=16)
    convert(tmp_path / "plain", tmp_path / "wanted", q_bits=16)
    compared = [p for p in (tmp_path / "wanted").rglob("*") if p.suffix in (".bin", ".safetensors")]
    assert len(compared) > 4
    for path in compared:
        assert path.read_bytes() == (tmp_path / "made" / path.relative_to(tmp_path / "wanted")).read_bytes()


@each
def test_quantized_from_torchs_values_in_float32(
    tmp_path: Path, layout: str, scales: torch.dtype, codes: str
) -> None:
    checkpoints(tmp_path, layout, scales, torch.float32, codes)
    convert(tmp_path / "fp8", tmp_path / "made", q_bits=4, q_group_size=32)
    convert(tmp_path / "plain", tmp_path / "wanted", q_bits=4, q_group_size=32)
    for made, wanted in zip(blobs(tmp_path / "made"), blobs(tmp_path / "wanted"), strict=True):
        for name, a in made.items():
            assert mx.array_equal(a, wanted[name].astype(a.dtype)), name


@pytest.mark.parametrize(
    ("shape", "layout", "scales", "quantization"),
    [
        ("no multiples of 128", "per expert", torch.bfloat16, BLOCKS),
        ("GLM-4.5", "released", torch.bfloat16, ROWS),
        ("DeepSeek-V3", "released", torch.float32, BLOCKS),
        (
            "MiniMax-M2, many experts, YaRN, no multiples of 128",
            "released",
            torch.float32,
            {**BLOCKS, "fmt": "float8_e4m3fn"},
        ),
    ],
)
def test_logits_of_a_whole_model(
    tmp_path: Path, shape: str, layout: str, scales: torch.dtype, quantization: dict[str, Any]
) -> None:
    checkpoints(tmp_path, layout, scales, torch.bfloat16, "of a model", shape, quantization)
    family, _ = SHAPES[shape]
    reference = family.model.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    convert(tmp_path / "fp8", tmp_path / "made", q_bits=16)
    model, _ = load(tmp_path / "made")
    tokens = np.random.default_rng(1).integers(0, reference.config.vocab_size, (2, 80))
    want = reference_logits(reference.eval(), tokens)
    got = np.asarray(model(mx.array(tokens)))
    assert want.std() > 0.5
    assert np.abs(got - want).max() <= 2e-4


@pytest.mark.parametrize("code", [NAN, NAN | 0x80])
def test_a_code_that_is_no_number_is_refused(tmp_path: Path, code: int) -> None:
    checkpoints(tmp_path, "wrapped", torch.bfloat16, torch.bfloat16, "all")
    path = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(path)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors[name].view(torch.uint8)[3, 150, 70] = code
    save_file(tensors, path)
    with pytest.raises(SourceError, match=f"{name}.* not a number"):
        convert(tmp_path / "fp8", tmp_path / "made", q_group_size=32)
