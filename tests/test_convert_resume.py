"""A conversion that was killed, or met a full disk, goes on with the same command, to the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from checkpoints import Spec, quantized, write_checkpoint

from mlx_flashmoe.cli import main
from mlx_flashmoe.console import ConversionProgress
from mlx_flashmoe.convert import convert, destination, repack, transform, units
from mlx_flashmoe.convert.safetensors import SafetensorsFile
from mlx_flashmoe.errors import ConversionError, FormatError, SourceError
from mlx_flashmoe.layout import Manifest

SPEC = Spec(extras=False, layers=3, experts=6)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT", faults.UNIT)
    monkeypatch.setattr(units, "PIECE", faults.PIECE)


def write_source(folder: Path, layout: str = "fused", shards: int = 4) -> Path:
    """A checkpoint whose experts are spread over shards; "mlx4" is quantized at 4 bits."""
    if layout != "mlx4":
        return write_checkpoint(folder, SPEC, layout, shards=shards)
    tensors, settings = quantized(SPEC.published("stacked"), 4, 64, {})
    return write_checkpoint(
        folder, tensors=tensors, config={**SPEC.config(), "quantization": settings}, shards=shards
    )


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(out: Path, expected: Path) -> None:
    """Bit for bit, the manifest included but for the source's path."""
    found, wanted = everything(out), everything(expected)
    made, ideal = Manifest.load(out), Manifest.load(expected)
    assert {**vars(made), "source": 0} == {**vars(ideal), "source": 0}
    assert found.pop("flashmoe.json") and wanted.pop("flashmoe.json")
    assert found == wanted


class Interrupted(Exception):
    pass


def interrupt_after(calls: int) -> Callable[[int, int, str], None]:
    seen = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append(what)
        if len(seen) > calls:
            raise Interrupted

    return progress


@pytest.mark.parametrize("calls", [0, 1, 7, 30])
@pytest.mark.parametrize("layout", ["fused", "per_expert", "mlx4"])
def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, calls: int) -> None:
    source, out = write_source(tmp_path / "source", layout), tmp_path / "out"
    before = everything(source)
    convert(source, tmp_path / "ideal")
    with pytest.raises(Interrupted):
        convert(source, out, progress=interrupt_after(calls))
    with pytest.raises(FormatError, match="is not a converted model"):
        Manifest.load(out)
    lines: list[str] = []
    convert(source, out, note=lines.append)
    same(out, tmp_path / "ideal")
    assert everything(source) == before
    if calls == 30:
        assert any("resuming an interrupted conversion: " in line for line in lines)


def test_what_is_done_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_source(tmp_path / "source", shards=1), tmp_path / "out"
    read = 0
    real = SafetensorsFile.read_into

    def read_into(self: SafetensorsFile, offset: int, buffers: list[memoryview]) -> None:
        nonlocal read
        read += sum(map(len, buffers)) if offset > 8 else 0
        real(self, offset, buffers)

    made: list[units.Unit] = []
    real_cut = repack.cut

    def cut(*args: Any, **named: Any) -> list[units.Unit]:
        made[:] = real_cut(*args, **named)
        return list(made)

    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)
    monkeypatch.setattr(repack, "cut", cut)
    progress: list[int] = []
    convert(source, tmp_path / "ideal", progress=lambda done, total, what: progress.append(done))
    once = read
    # Units that wait to be flushed or for their last job to be counted, and jobs at work, of the largest there are.
    in_flight = (units.FLUSHING + 1) * max(unit.source_bytes for unit in made)
    in_flight += (repack.WORKERS + 2) * max(job.source_bytes for unit in made for job in unit.jobs)
    for calls in range(4, len(progress), 5):
        read = 0
        with pytest.raises(Interrupted):
            convert(source, out, progress=interrupt_after(calls))
        convert(source, out)
        header = once - progress[-1]
        assert read <= once + header + in_flight < 1.5 * once
        same(out, tmp_path / "ideal")
        shutil.rmtree(out)


def test_progress_begins_where_it_was(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, progress=interrupt_after(60))
    seen: list[tuple[int, int]] = []
    convert(source, out, progress=lambda done, total, what: seen.append((done, total)))
    assert seen[0][0] > 0.2 * seen[0][1] and seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_ctrl_c_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    command = ["convert", "--hf-path", str(source), "--mlx-path", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(
            ConversionProgress,
            "progress",
            lambda self, done, total, what: os.kill(os.getpid(), signal.SIGINT),
        )
        assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; the same command resumes"
    assert main(command) == 0
    convert(source, tmp_path / "ideal")
    same(out, tmp_path / "ideal")


# Kills


def cases(seed: int) -> tuple[str, int, dict[str, Any], random.Random]:
    rng = random.Random(seed)
    layout = rng.choice(["fused", "per_expert", "mlx4"])
    return layout, rng.choice([1, 3, 7]), {"delete_source": rng.random() < 0.5}, rng


def killed_again_and_again(tmp_path: Path, seed: int, times: int, kill: Callable[..., bool]) -> None:
    """Kills a conversion ``times`` times, each time a little further, then lets it finish."""
    layout, shards, options, rng = cases(seed)
    source, out = write_source(tmp_path / "source", layout, shards), tmp_path / "out"
    (tmp_path / "source/notes.txt").write_text("mine")
    convert(source, tmp_path / "ideal")
    before = everything(source)
    for _ in range(times):
        if kill(rng, source, out, options):
            break
    convert(source, out, **options)
    same(out, tmp_path / "ideal")
    left = {n: b for n, b in before.items() if not (options["delete_source"] and n.endswith(".safetensors"))}
    assert everything(source) == left


def at_a_call(rng: random.Random, source: Path, out: Path, options: dict[str, Any]) -> bool:
    cut = faults.Cut(rng.randint(1, 300), power=rng.random() < 0.5, seed=rng.randint(0, 1 << 30))
    return faults.finished(faults.start(source, out, options, cut))


def at_an_instant(rng: random.Random, source: Path, out: Path, options: dict[str, Any]) -> bool:
    return faults.killed_after(rng.uniform(0, 0.12), source, out, options)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_some_change_to_the_disk(tmp_path: Path, seed: int) -> None:
    """Half of them as if by a power cut: what was not flushed is lost in part."""
    killed_again_and_again(tmp_path, seed, 2, at_a_call)


@pytest.mark.parametrize("seed", range(100, 104))
def test_killed_at_some_instant(tmp_path: Path, seed: int) -> None:
    killed_again_and_again(tmp_path, seed, 2, at_an_instant)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_killed_at_200_instants(tmp_path: Path, seed: int) -> None:
    killed_again_and_again(tmp_path, seed, 2, at_an_instant)


@pytest.mark.exhaustive
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("layout", ["fused", "mlx4"])
def test_killed_at_every_change_to_the_disk(tmp_path: Path, layout: str, power: bool) -> None:
    made = write_source(tmp_path / "made", layout, 3)
    convert(made, tmp_path / "ideal")
    kept = {n: b for n, b in everything(made).items() if not n.endswith(".safetensors")}
    at = 1
    while True:
        source, out = tmp_path / "source", tmp_path / "out"
        shutil.copytree(made, source)
        over = faults.finished(
            faults.start(source, out, {"delete_source": True}, faults.Cut(at, power, seed=at))
        )
        convert(source, out, delete_source=True)
        same(out, tmp_path / "ideal")
        assert everything(source) == kept
        shutil.rmtree(source)
        shutil.rmtree(out)
        if over:
            break
        at += 1
    assert at > 80


# Full disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", [1, 6, 20, 60])
def test_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int) -> None:
    """Wherever it happens: in the journal, among the small files, the dense part, the blobs."""
    calls = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(fd)
        if len(calls) >= call:
            raise OSError(code, os.strerror(code))
        return real(fd, data[:6_000], offset)

    source, out = write_source(tmp_path / "source"), tmp_path / "a/out"
    convert(source, tmp_path / "ideal")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        says = "cannot be written: Input/output error" if code == errno.EIO else "no space left on the disk"
        with pytest.raises(ConversionError, match=says) as e:
            convert(source, out)
    assert "\n" not in str(e.value) and len(calls) >= call
    assert out.exists() == (call > 1)
    convert(source, out)
    same(out, tmp_path / "ideal")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("mounting a file system needs Linux and root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("not allowed to mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("after", [1, 25, 60, 85])
def test_a_small_file_system_fills_up(tmp_path: Path, small_disk: Path, after: int) -> None:
    source, out = write_source(tmp_path / "source"), small_disk / "out"
    convert(source, tmp_path / "ideal")
    ballast, calls = small_disk / "ballast", []

    def fill(done: int, total: int, what: str) -> None:
        calls.append(done)
        if len(calls) == after:  # somebody else takes all the space there is
            with open(ballast, "wb", buffering=0) as f, pytest.raises(OSError):
                while True:
                    f.write(bytes(4096))

    with pytest.raises(ConversionError, match="no space left on the disk; free some, and start the same"):
        convert(source, out, progress=fill)
    with pytest.raises(ConversionError, match="of disk space are needed, but only 0 bytes are free"):
        convert(source, out)
    assert ballast.exists()
    ballast.unlink()
    convert(source, out)
    same(out, tmp_path / "ideal")


# What belongs to whom


def test_two_at_once(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    inside, leave = threading.Event(), threading.Event()

    def wait(done: int, total: int, what: str) -> None:
        inside.set()
        leave.wait(60)

    first = threading.Thread(target=lambda: convert(source, out, progress=wait))
    first.start()
    assert inside.wait(60)
    with pytest.raises(
        ConversionError, match=rf"another conversion is writing there \(process {os.getpid()}\)"
    ):
        convert(source, out)
    leave.set()
    first.join()
    convert(source, tmp_path / "ideal")
    same(out, tmp_path / "ideal")


def test_a_lock_file_alone_locks_nobody_out(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    (out / ".conversion").mkdir(parents=True)
    (out / ".conversion/lock").write_text("99\n")
    convert(source, out)
    assert not (out / ".conversion").exists()


@pytest.mark.parametrize(
    "options", [{"q_bits": 3}, {"q_group_size": 32}, {"q_bits_down": 8}, {"q_bits_gate_up": 2}]
)
def test_other_options(tmp_path: Path, options: dict[str, int]) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, q_bits=4, progress=interrupt_after(20))
    before = everything(out)
    with pytest.raises(
        ConversionError,
        match=rf"unfinished conversion of {source} with other options \(bits 4\).* start over",
    ):
        convert(source, out, **options)
    assert everything(out) == before
    convert(source, out, q_bits=4)


def test_another_source(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    shutil.copytree(source, tmp_path / "other")
    with pytest.raises(Interrupted):
        convert(source, out, progress=interrupt_after(20))
    with pytest.raises(ConversionError, match=rf"unfinished conversion of {source} "):
        convert(tmp_path / "other", out)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (
            lambda s: touch(s / "model-00004-of-00004.safetensors"),
            ConversionError,
            "00004-of-00004.* changed since",
        ),
        (
            lambda s: touch(s / "model-00001-of-00004.safetensors"),
            ConversionError,
            "00001-of-00004.* changed since",
        ),
        (
            lambda s: (s / "config.json").write_text((s / "config.json").read_text() + " "),
            ConversionError,
            "source has changed since",
        ),
        (
            lambda s: (s / "model-00004-of-00004.safetensors").unlink(),
            SourceError,
            "00004-of-00004.* is missing",
        ),
    ],
)
def test_a_changed_source(
    tmp_path: Path, change: Callable[[Path], Any], kind: type[Exception], says: str
) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, progress=interrupt_after(50))
    change(source)
    with pytest.raises(kind, match=says):
        convert(source, out)


def test_complete_already(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    made = convert(source, out)
    before = everything(out)
    lines: list[str] = []
    assert convert(source, out, note=lines.append) == made
    assert lines == [f"{out} is complete already; nothing to do"]
    with pytest.raises(
        ConversionError, match="converted model already, of another source or with other options"
    ):
        convert(source, out, q_bits=2)
    assert everything(out) == before


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """Whatever appears in the folder meanwhile, even under the name of a file of the model."""
    source, out = write_source(tmp_path / "source"), tmp_path / "out"

    def progress(done: int, total: int, what: str) -> None:
        (out / "notes.txt").write_text("mine")
        (out / "model.safetensors").write_text("mine too")

    for _ in range(2):
        with pytest.raises(ConversionError, match=r"model\.safetensors is none of this conversion's"):
            convert(source, out, progress=progress)
        assert (out / "model.safetensors").read_text() == "mine too"
    (out / "model.safetensors").unlink()
    convert(source, out)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    convert(source, tmp_path / "ideal")
    same(out, tmp_path / "ideal")


def test_a_file_that_has_gone_meanwhile_is_made_again(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, progress=interrupt_after(80))
    (out / ".conversion/model/experts/layer_000.bin").unlink()
    os.truncate(out / ".conversion/model/model.safetensors", 1000)
    convert(source, out)
    convert(source, tmp_path / "ideal")
    same(out, tmp_path / "ideal")


def test_a_damaged_journal(tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed anywhere: what follows is done again, and the result is the same."""
    source, out = write_source(tmp_path / "source", shards=1), tmp_path / "out"
    convert(source, tmp_path / "ideal")
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "half", progress=interrupt_after(40))
    journal = (tmp_path / "half/.conversion/journal").read_bytes()
    rng = random.Random(0)
    ends = [i + 1 for i in range(len(journal)) if journal[i : i + 1] == b"\n"]
    for at in [0, 1, ends[0] - 1, ends[0], ends[1] + 1, ends[-1] - 1, *rng.sample(range(len(journal)), 6)]:
        for damaged in (journal[:at], journal[:at] + bytes([journal[at] ^ 1]) + journal[at + 1 :]):
            shutil.copytree(tmp_path / "half", out)
            (out / ".conversion/journal").write_bytes(damaged)
            try:
                convert(source, out)
            except ConversionError as e:
                # Without its beginning, nothing says whose the files are.
                raise AssertionError(at) from e
            same(out, tmp_path / "ideal")
            shutil.rmtree(out)


def test_a_shard_cut_short_meanwhile(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "source", SPEC), tmp_path / "out"
    with pytest.raises(SourceError, match=r"model\.safetensors: ends at byte .* truncated"):
        convert(source, out, progress=lambda *_: os.truncate(source / "model.safetensors", 150_000))
    assert not (out / "flashmoe.json").exists()


def test_a_bug_in_a_thread_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source")

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(transform, "quantize", broken)
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "out")


# delete_source


def test_delete_source(tmp_path: Path) -> None:
    """Shards go one by one; nothing else does."""
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    convert(source, tmp_path / "ideal")
    kept = {n: b for n, b in everything(source).items() if not n.endswith(".safetensors")}
    counts = []
    convert(
        source,
        out,
        delete_source=True,
        progress=lambda *_: counts.append(len(list(source.glob("*.safetensors")))),
    )
    assert set(counts) == {4, 3, 2, 1} or set(counts) == {4, 3, 2, 1, 0}
    assert everything(source) == kept
    same(out, tmp_path / "ideal")
    assert convert(source, out, delete_source=True) == Manifest.load(out)


def test_shards_with_tensors_that_are_left_out_are_not_deleted(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Spec(layers=2), shards=9)
    lines: list[str] = []
    convert(source, tmp_path / "out", delete_source=True, note=lines.append)
    left = {p.name: SafetensorsFile(p).tensors for p in source.glob("*.safetensors")}
    assert left and all(any("visual" in n or "mtp" in n for n in tensors) for tensors in left.values())
    note = next(line for line in lines if line.startswith("not deleted"))
    assert all(name in note for name in left)


def test_nothing_is_deleted_that_the_disk_does_not_give_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    before = everything(source)
    real = destination.crc32_on_disk
    monkeypatch.setattr(destination, "crc32_on_disk", lambda *a: real(*a) ^ 1)
    with pytest.raises(
        ConversionError, match=r"the disk does not give back what was written at byte .* is kept"
    ):
        convert(source, out, delete_source=True)
    assert everything(source) == before


def test_deleting_is_refused(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(ConversionError, match="--delete-source is for folders"):
        convert("org/name", out, delete_source=True)
    name = "model-00002-of-00004.safetensors"
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match=f"{name} is a link: removing it would free nothing"):
        convert(source, out, delete_source=True)
    assert (tmp_path / "elsewhere").exists() and not out.exists()
    convert(source, out)


def test_delete_source_needs_less_space(tmp_path: Path) -> None:
    """At the worst moment: what is written, less what has gone."""
    source = write_source(tmp_path / "source", "mlx4", shards=12)
    needed = []
    for delete in (False, True):
        lines: list[str] = []
        convert(source, tmp_path / f"out{delete}", delete_source=delete, note=lines.append)
        line = next(line for line in lines if line.startswith("to read"))
        needed.append(int(line.split("needed ")[1].split(" kB")[0]))
    assert needed[1] < 0.8 * needed[0]
