"""Damage in a converted folder is mended from the source, and nothing else is written, whatever kills it on the way."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from checkpoints import Spec, quantized, write_checkpoint
from hub_server import Hub, serve

from mlx_flashmoe.cli import main
from mlx_flashmoe.convert import convert, hub, units, verify
from mlx_flashmoe.convert.damage import RECORD
from mlx_flashmoe.convert.safetensors import SafetensorsFile
from mlx_flashmoe.errors import ConversionError, FormatError, SourceError
from mlx_flashmoe.layout import Manifest, expert_file

SPEC = Spec(extras=False, layers=3, experts=6)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT", faults.UNIT)
    monkeypatch.setattr(units, "PIECE", faults.PIECE)


def write_source(folder: Path, layout: str = "fused", shards: int = 4, spec: Spec = SPEC) -> Path:
    if layout != "mlx4":
        return write_checkpoint(folder, spec, layout, shards=shards)
    tensors, settings = quantized(spec.published("stacked"), 4, 64, {})
    config = {**spec.config(), "quantization": settings}
    return write_checkpoint(folder, tensors=tensors, config=config, shards=shards)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module", params=["fused", "per_expert", "mlx4"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its conversion, of each layout."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_source(folder / "a source", request.param)
    convert(source, folder / "ideal")
    return source, folder / "ideal"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def damage(out: Path, rng: random.Random) -> list[str]:
    """Does one to four kinds of harm; what was done, for people."""
    m = Manifest.load(out)
    small = list(m.source["files"])
    layers = [entry.file for entry in m.layers]
    dense = [d.file for d in m.dense]
    done = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["blob", "blob", "blobs", "cut", "longer", "gone", "dense", "small", "folder"])
        name = rng.choice(dense if kind == "dense" else small if kind == "small" else layers)
        path = out / name
        if kind == "folder":
            shutil.rmtree(out / "experts", ignore_errors=True)
        elif not path.exists() or not path.stat().st_size:
            continue
        elif kind in ("blob", "blobs"):
            for _ in range(1 if kind == "blob" else rng.randint(2, 5)):
                flip(path, rng.randrange(path.stat().st_size))
        elif kind == "cut":
            os.truncate(path, rng.randrange(path.stat().st_size))
        elif kind == "longer":
            with open(path, "ab") as f:
                f.write(rng.randbytes(rng.randint(1, 40_000)))
        elif kind == "gone" or rng.random() < 0.5:
            path.unlink()
        else:
            flip(path, rng.randrange(path.stat().st_size))
        done.append(f"{kind} {name}")
    return done


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_damaged(made: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    """verify finds it, its advice is the command that mends it, and then all is what it was."""
    source, ideal = made
    out = tmp_path / "an out"
    shutil.copytree(ideal, out)
    done = damage(out, random.Random(seed))
    with pytest.raises(FormatError, match="damaged in") as e:
        verify(out)
    arguments = shlex.split(str(e.value).partition("to mend it: ")[2])
    assert arguments[:3] == ["python", "-m", "mlx_flashmoe"], done
    assert main(arguments[3:]) == 0, done
    assert everything(out) == everything(ideal), done
    verify(out)
    verify(out, source)


@pytest.mark.parametrize("seed", range(100, 106))
def test_verify_repairs_in_one_go(made: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    """From the source that the manifest names, or from another copy."""
    source, ideal = made
    out = tmp_path / "out"
    shutil.copytree(ideal, out)
    damage(out, random.Random(seed))
    against = None
    if seed % 2:
        against = tmp_path / "copy"
        shutil.copytree(source, against)
    verify(out, against, repair=True)
    assert everything(out) == everything(ideal)


def test_convert_alone_mends_what_is_evident(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Missing files, wrong sizes and small files, without verify; damage inside of blobs takes verify."""
    source, ideal = made
    out = tmp_path / "out"
    shutil.copytree(ideal, out)
    (out / expert_file(0)).unlink()
    os.truncate(out / expert_file(1), 20_000)
    flip(out / "config.json", 3)
    flip(out / expert_file(2), 70_000)
    lines: list[str] = []
    convert(source, out, note=lines.append)
    assert lines[0] == f"mending config.json, experts/layer_000.bin, experts/layer_001.bin from {source}"
    flip(out / expert_file(2), 70_000)
    assert everything(out) == everything(ideal)
    lines.clear()
    convert(source, out, note=lines.append)
    assert lines == [f"{out} is complete already; nothing to do"]


# What is read


def source_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    real = SafetensorsFile.read_into

    def read_into(self: SafetensorsFile, offset: int, buffers: list[memoryview]) -> None:
        read.append(sum(map(len, buffers)) if offset > 8 else 0)
        real(self, offset, buffers)

    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)
    return read


def test_only_the_damaged_experts_are_read(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ideal = made
    out = tmp_path / "out"
    shutil.copytree(ideal, out)
    blob = Manifest.load(out).layouts[0].blob_size
    before = (out / expert_file(1)).stat().st_ino, os.stat(out / expert_file(2)).st_mtime_ns
    for e in (1, 4):
        flip(out / expert_file(1), blob * e + 17)
    with pytest.raises(FormatError):
        verify(out)
    read = source_reads(monkeypatch)
    convert(source, out)
    expert = 3 * SPEC.hidden * SPEC.inner * 2  # BF16
    if "mlx4" in str(source):
        expert = expert * (4 + 32 / 64) // 16
    assert sum(read) == 2 * expert
    assert everything(out) == everything(ideal)
    assert before == ((out / expert_file(1)).stat().st_ino, os.stat(out / expert_file(2)).st_mtime_ns)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    write_source(tmp_path / "served", "per_expert", shards=6)
    with serve(tmp_path / "served") as hub_:
        template = hub_.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub_.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "PAUSE", 0.01)
        monkeypatch.setattr(hub, "FIRST_READ", 4000)
        yield hub_


@pytest.mark.parametrize("how", ["convert", "repair"])
def test_from_the_hub_only_the_ranges_needed_come(tmp_path: Path, server: Hub, how: str) -> None:
    out, ideal = tmp_path / "out", tmp_path / "ideal"
    convert("org/model", ideal)
    shutil.copytree(ideal, out)
    flip(out / expert_file(1), Manifest.load(out).layouts[0].blob_size * 3)
    flip(out / "config.json", 5)
    with pytest.raises(FormatError, match="--hf-path org/model"):
        verify(out)
    server.requests.clear()
    server.sent = 0
    server.commit, old = server.commit, server.commit
    if how == "convert":
        convert("org/model", out)
    else:
        verify(out, "org/model", repair=True)
    assert everything(out) == everything(ideal)
    spans = [span for _, path, span in server.requests if path.endswith(".safetensors")]
    assert all(spans) and old == server.commit
    headers = 6 * 2 * 4000
    assert server.sent < 3 * SPEC.hidden * SPEC.inner * 2 + headers + 60_000
    total = sum(path.stat().st_size for path in server.folder.iterdir())
    assert server.sent < total / 4


def test_a_connection_that_breaks_while_ranges_come(tmp_path: Path, server: Hub) -> None:
    out, ideal = tmp_path / "out", tmp_path / "ideal"
    convert("org/model", ideal)
    shutil.copytree(ideal, out)
    (out / "model.safetensors").unlink()
    server.cut = {r"\.safetensors": 5_000}
    convert("org/model", out)
    assert everything(out) == everything(ideal)
    # Bytes that are not the hub's are found by the manifest's checksums.
    flip(out / expert_file(0), 9)
    server.cut = {}
    for path in server.folder.glob("*.safetensors"):
        flip(path, path.stat().st_size - 1)
        flip(path, path.stat().st_size // 2)
    (out / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="gives other bytes than the checksum"):
        verify(out, "org/model", repair=True)
    assert not (out / "model.safetensors").exists()


# Sources that are not the source


@pytest.mark.parametrize("name", [expert_file(2), expert_file(0), "model.safetensors", "config.json"])
def test_another_source(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """A source of the same shapes, of other shapes, or gone: each is an error, and nothing is written."""
    source, ideal = made
    out = tmp_path / "out"
    shutil.copytree(ideal, out)
    if name == expert_file(0):
        os.truncate(out / name, 30_000)
    else:
        flip(out / name, 9_000 if name != "config.json" else 9)
    with pytest.raises(FormatError):
        verify(out)
    before = everything(out)
    layout = "per_expert" if "per_expert" in str(source) else "mlx4" if "mlx4" in str(source) else "fused"
    for seed, layers, says in (
        (5, 3, f"{name}.*gives other bytes than the checksum"),
        (0, 2, "is not a conver"),
    ):
        spec = Spec(extras=False, layers=layers, experts=6, seed=seed)
        other = write_source(tmp_path / f"other{layers}", layout, spec=spec)
        (other / "config.json").write_text(
            json.dumps({**json.loads((other / "config.json").read_text()), "x": 1})
        )
        with pytest.raises(FormatError, match=says):
            verify(out, other, repair=True)
        assert everything(out) == before
    with pytest.raises(SourceError, match="no such folder"):
        verify(out, tmp_path / "nowhere", repair=True)
    with pytest.raises(ConversionError, match="of another source or with other options"):
        convert(source, out, q_bits=2)
    assert everything(out) == before
    convert(source, out)
    assert everything(out) == everything(ideal)


def test_the_advice_when_convert_cannot_be_given_again(tmp_path: Path) -> None:
    """Layers of a recipe, and a source that is gone: verify itself mends, from what is named."""
    source, out = write_source(tmp_path / "a source"), tmp_path / "out"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\n[layers."0"]\nbits = 8\n')
    convert(source, out, recipe=recipe)
    before = everything(out)
    flip(out / expert_file(0), 70)
    verify_command = f"to mend it: python -m mlx_flashmoe verify --model {out} --repair --against "
    with pytest.raises(FormatError) as e:
        verify(out)
    assert str(e.value).endswith(f"{verify_command}'{source}'")
    source.rename(tmp_path / "moved")
    with pytest.raises(FormatError) as e:
        verify(out, tmp_path / "moved")
    assert str(e.value).endswith(f"{verify_command}{tmp_path / 'moved'}")
    with pytest.raises(FormatError) as e:
        verify(out)
    assert str(e.value).endswith(f"{verify_command}SRC")
    assert main(["verify", "--model", str(out), "--repair", "--against", str(tmp_path / "moved")]) == 0
    assert everything(out) == before


@pytest.mark.parametrize(
    "options", [{"q_bits": 3}, {"q_bits_down": 8, "q_bits_gate_up": 4}, {"q_group_size": 32, "q_bits": 16}]
)
def test_the_advice_has_the_options(tmp_path: Path, options: dict[str, int]) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out, **options)
    before = everything(out)
    flip(out / expert_file(1), 100)
    with pytest.raises(FormatError, match="to mend it: ") as e:
        verify(out)
    assert main(shlex.split(str(e.value).partition("mlx_flashmoe ")[2])) == 0
    assert everything(out) == before


def test_a_source_that_differs_is_not_damage(tmp_path: Path) -> None:
    """A folder that is as it was written has nothing to mend, whatever it is compared with."""
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    other = write_checkpoint(tmp_path / "other", Spec(extras=False, layers=3, experts=6, seed=9))
    with pytest.raises(
        FormatError, match=r"is as it was written, but .*other gives other bytes in \d+ places"
    ):
        verify(out, other)
    assert not (out / RECORD).exists()


def test_the_record(tmp_path: Path) -> None:
    """It goes when verify finds nothing; one that is stale does no harm; one that is malformed is an error."""
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    before = everything(out)
    flip(out / expert_file(1), 100)
    with pytest.raises(FormatError):
        verify(out)
    assert json.loads((out / RECORD).read_text()) == {"experts/layer_001.bin": [0]}
    flip(out / expert_file(1), 100)
    lines: list[str] = []
    convert(source, out, note=lines.append)
    assert lines == [f"{out} is complete already; nothing to do"] and everything(out) == before
    for text in ("{", "[]", '{"experts/layer_001.bin": [6]}', '{"../x": []}', '{"config.json": [0]}'):
        (out / RECORD).write_text(text)
        with pytest.raises(FormatError, match=r"\.damaged\.json: malformed; .*verify writes it anew"):
            convert(source, out)
        verify(out)
        assert everything(out) == before


def test_a_folder_of_before_small_files_had_checksums(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    data = json.loads((out / "flashmoe.json").read_text())
    del data["source"]["files"]
    (out / "flashmoe.json").write_text(json.dumps(data))
    before = everything(out)
    (out / "config.json").write_text("{")
    (out / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="damaged in 2 places"):
        verify(out)
    convert(source, out)
    assert everything(out) == before


# Kills


@pytest.mark.parametrize("seed", range(12))
def test_killed_while_mending(tmp_path: Path, seed: int) -> None:
    """At a change to the disk, half of the times as if by a power cut. A blob is the old one, the right one or still
    recorded as damaged; a folder that loads has nothing else wrong."""
    rng = random.Random(seed)
    source, out = (
        write_source(tmp_path / "source", rng.choice(["fused", "per_expert", "mlx4"])),
        tmp_path / "out",
    )
    convert(source, out)
    ideal = everything(out)
    damage(out, rng)
    with pytest.raises(FormatError):
        verify(out)
    old = everything(out)
    for _ in range(3):
        cut = faults.Cut(rng.randint(1, 40), power=rng.random() < 0.5, seed=rng.randint(0, 1 << 30))
        if faults.finished(faults.start(source, out, {}, cut)):
            break
        now = everything(out)
        recorded = json.loads(now.get(RECORD, b"{}"))
        for name, right in ideal.items():
            got = now.get(name)
            if got != right:
                assert name in recorded, name
                assert got is None or got == old.get(name) or len(got) == len(right), name
                for before, byte, wanted in zip(old.get(name) or b"", got or b"", right):
                    assert byte in (before, wanted), name
    convert(source, out)
    assert everything(out) == ideal


def test_interrupted_while_mending(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    ideal = everything(out)
    os.truncate(out / expert_file(1), 20_000)
    flip(out / expert_file(2), 100)
    with pytest.raises(FormatError):
        verify(out)

    def stop(done: int, total: int, what: str) -> None:
        if what == expert_file(1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=stop)
    with pytest.raises(FormatError, match=r"layer_001.*is missing"):
        Manifest.load(out)
    convert(source, out)
    assert everything(out) == ideal


def test_no_space_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    (out / expert_file(0)).unlink()
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="of disk space are needed, but only 1 kB are free"):
        convert(source, out)
    assert not (out / ".conversion").exists()
