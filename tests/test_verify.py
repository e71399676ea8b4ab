"""verify finds every change to a converted folder, and check_reads every damaged expert that is read."""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from blobs import write_experts
from checkpoints import Spec, quantized, write_checkpoint

from mlx_flashmoe import load
from mlx_flashmoe.cli import main
from mlx_flashmoe.convert import convert, verify
from mlx_flashmoe.doctor.examine import examine
from mlx_flashmoe.errors import FormatError, ReadError, SourceError
from mlx_flashmoe.experts import ExpertStore, SlotArena
from mlx_flashmoe.layout import PROJECTIONS, BlobLayout, LayerEntry, Manifest, Quantization, expert_file


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        (byte,) = f.read(1)
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    source = write_checkpoint(folder / "source", Spec(), shards=3)
    convert(source, folder / "out")
    return source, folder / "out"


def test_all_is_well(made: tuple[Path, Path]) -> None:
    source, out = made
    m = Manifest.load(out)
    assert verify(out) == m.expert_bytes + m.dense_bytes
    seen: list[tuple[int, int]] = []
    assert verify(out, source, progress=lambda done, total, what: seen.append((done, total))) == seen[-1][0]
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit(made: tuple[Path, Path], seed: int) -> None:
    """Anywhere, padding included: the file is named, and in an expert file the layer and the expert."""
    source, out = made
    m = Manifest.load(out)
    rng = random.Random(seed)
    name = rng.choice([d.file for d in m.dense] + [e.file for e in m.layers])
    bit = rng.randrange(8 * (out / name).stat().st_size)
    flip(out / name, bit)
    try:
        for against in (None, source):
            lines: list[str] = []
            with pytest.raises(
                FormatError, match=r"damaged in 1 place; to mend it: python -m mlx_flashmoe convert"
            ):
                verify(out, against, note=lines.append)
            where = ""
            for entry in m.layers:
                if entry.file == name:
                    where = f": layer {entry.layer}, expert {bit // 8 // m.layout_of(entry).blob_size}"
            assert len(lines) == 1 and lines[0].startswith(f"{out / name}{where}")
    finally:
        flip(out / name, bit)


def test_every_damage_is_listed(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "source"), tmp_path / "out")
    size = Manifest.load(tmp_path / "out").layouts[0].blob_size
    for e in (0, 3):
        flip(tmp_path / "out" / expert_file(1), 8 * size * e + 5)
    flip(tmp_path / "out/model.safetensors", 77)
    lines: list[str] = []
    with pytest.raises(FormatError, match="damaged in 3 places"):
        verify(tmp_path / "out", note=lines.append)
    assert [re.sub(r".*/", "", line) for line in lines] == [
        "model.safetensors: differs from what was written",
        "layer_001.bin: layer 1, expert 0: differs from what was written",
        "layer_001.bin: layer 1, expert 3: differs from what was written",
    ]


def test_against_a_quantized_source_and_others(tmp_path: Path) -> None:
    tensors, settings = quantized(Spec().published("stacked"), 4, 64, {})
    config = {**Spec().config(), "quantization": settings}
    source = write_checkpoint(tmp_path / "source", tensors=tensors, config=config, shards=2)
    convert(source, tmp_path / "out")
    verify(tmp_path / "out", source)
    other = write_checkpoint(tmp_path / "other", Spec(seed=1))
    with pytest.raises(FormatError, match="is not a conversion of"):
        verify(tmp_path / "out", other)
    with pytest.raises(SourceError, match="no such folder"):
        verify(tmp_path / "out", tmp_path / "nowhere")
    # Of one with dims that the group size does not divide, too: convert's advice is of no use here.
    convert(other, tmp_path / "plain")
    narrow = write_checkpoint(tmp_path / "narrow", Spec(inner=96))
    with pytest.raises(FormatError, match=f"plain is not a conversion of {narrow}: the bits and group sizes"):
        verify(tmp_path / "plain", narrow)


def test_an_unfinished_conversion(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "a source"), tmp_path / "an out"

    def stop(done: int, total: int, what: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, q_bits=4, q_bits_down=6, progress=stop)
    command = f"convert --hf-path '{source}' --mlx-path '{out}' --q-bits 4 --q-bits-down 6"
    with pytest.raises(FormatError, match=r"done; still to do: experts/layer_00\d\.bin \(0 of 1 part done\)"):
        verify(out)
    with pytest.raises(FormatError, match=rf"not complete: \d of \d parts.*{command}$"):
        verify(out)
    for use in (load, lambda folder: examine(str(folder), mx.float32)):
        with pytest.raises(
            FormatError, match=rf"{out} is not .*the conversion is not complete.; the command that"
        ):
            use(out)
    (tmp_path / "an empty").mkdir()
    with pytest.raises(FormatError, match=r"no flashmoe\.json in it, and no checkpoint"):
        load(tmp_path / "an empty")


def test_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(write_checkpoint(tmp_path / "source"), out)
    (out / expert_file(0)).unlink()
    os.truncate(out / expert_file(1), 100)
    lines: list[str] = []
    with pytest.raises(FormatError, match="damaged in 2 places"):
        verify(out, note=lines.append)
    assert lines[0] == f"{out / expert_file(0)}: is missing"
    assert lines[1].startswith(f"{out / expert_file(1)}: has 100 bytes, but should have ")
    with pytest.raises(FormatError, match="nowhere is not a converted model"):
        verify(tmp_path / "nowhere")


def test_small_files(tmp_path: Path) -> None:
    """Missing or changed: by checksum or against the source; without checksums, what loading needs."""
    source, out = write_checkpoint(tmp_path / "source"), tmp_path / "out"
    convert(source, out)

    def faults(against: Path | None = None) -> list[str]:
        lines: list[str] = []
        with pytest.raises(FormatError, match="damaged in"):
            verify(out, against, note=lines.append)
        return [line.replace(f"{out}/", "") for line in lines]

    (out / "config.json").unlink()
    (out / "tokenizer.json").write_text("[]")
    assert faults() == ["config.json: is missing", "tokenizer.json: differs from what was written"]
    assert faults(source) == ["config.json: is missing", "tokenizer.json: differs from what was written"]
    manifest = json.loads((out / "flashmoe.json").read_text())
    del manifest["source"]["files"]  # as before they were kept
    (out / "flashmoe.json").write_text(json.dumps(manifest))
    assert [line[:33] for line in faults()] == [
        "config.json: is missing",
        "tokenizer.json: not a tokenizer: ",
    ]
    (out / "config.json").write_text("{")
    (out / "tokenizer.json").unlink()
    assert faults() == [
        "config.json: is not a JSON object",
        "tokenizer.json is missing: the folder has no tokenizer; put the model's tokenizer.json (or Kimi's "
        "tiktoken.model) and tokenizer_config.json into it",
    ]
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    (out / "tokenizer_config.json").unlink()  # one without a tokenizer is a model, too
    verify(out)
    manifest["source"]["files"] = {"../config.json": 0}
    (out / "flashmoe.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"malformed manifest .source: files"):
        verify(out)


def test_command(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, out = made
    assert main(["verify", "--model", str(out), "--against", str(source)]) == 0
    assert "as they should be, read at" in capsys.readouterr().out
    flip(out / expert_file(1), 1000)
    try:
        assert main(["verify", "--model", str(out)]) == 2
    finally:
        flip(out / expert_file(1), 1000)
    err = capsys.readouterr().err
    assert "layer_001.bin: layer 1, expert 0: differs" in err and "error: " in err


# Reads that are checked


def checked(folder: Path) -> tuple[ExpertStore, int]:
    """A store that checks, of two layers of 6 experts; and the size of a blob."""
    _, blobs = write_experts(folder, layers=2, experts=6)
    layout = BlobLayout.build(64, 32, {p: Quantization(4, 32) for p in PROJECTIONS}, "float32")
    entries = tuple(LayerEntry(i, 6, 0, tuple(map(zlib.crc32, blobs[i]))) for i in range(2))
    return ExpertStore(folder, Manifest("test", {}, {}, (layout,), entries, ()), check_reads=True), len(
        blobs[0][0]
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_a_damaged_expert_is_an_error_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    store, size = checked(tmp_path)
    bounds = [(size * i // parts, size * (i + 1) // parts) for i in range(parts)]
    monkeypatch.setattr(ExpertStore, "spans", lambda self, layer, requests: bounds)
    arena = SlotArena(store, 6)
    arena.fetch(1, np.arange(6)).wait()
    flip(tmp_path / expert_file(0), 8 * (size * 4 + size - 1))
    arena.fetch(0, np.array([0, 3, 5])).wait()
    with pytest.raises(
        ReadError, match=r"layer_000\.bin: layer 0, expert 4: what was read is not what was written"
    ):
        arena.fetch(0, np.array([2, 4])).wait()
    assert arena.slot_of[0, 4] < 0
    flip(tmp_path / expert_file(0), 8 * (size * 4 + size - 1))
    arena.fetch(0, np.array([4])).wait()
    assert arena.slot_of[0, 4] >= 0
