"""``bench``: figures of work that was done, and none where reading failed."""

import json
import os
from pathlib import Path

import pytest
from checkpoints import Spec, write_checkpoint

from mlx_flashmoe import convert
from mlx_flashmoe.cli import main
from mlx_flashmoe.experts import store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bench")
    write_checkpoint(base / "source", Spec(experts=8), "fused")
    (base / "source" / "tokenizer.json").unlink(missing_ok=True)
    convert(base / "source", base / "model", q_bits=4, q_group_size=32)
    return base / "model"


def bench(folder: Path, *more: str) -> int:
    flags = "--expert-memory 50kB --no-read-ahead --prompts 9 --tokens 5"
    return main(["bench", "--model", str(folder), *flags.split(), *more])


def test_table_and_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "figures.json"
    assert bench(folder, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[1:])) <= 80 and "answer to 9" in printed
    report = json.loads(file.read_text())
    cold, warm, answer = report["phases"]
    blob = 16384  # three 4-bit matrices of 128 x 64 in groups of 32, in whole pages
    assert (cold["prompt"], warm["prompt"], answer["tokens"]) == (9, 9, 4)
    for phase in (cold, warm, answer):
        assert phase["bytes_read"] == phase["misses"] * blob > 0
        assert phase["read_gb_per_s"] > 0
        assert phase["routing"] + phase["reading"] + phase["other"] == pytest.approx(phase["seconds"])
    assert cold["bytes_read"] == warm["bytes_read"] <= 2 * 8 * blob
    assert set(report["plain_reads_gb_per_s"]) == {"disk", "page cache"}


def test_no_figure_when_reads_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store.os, "preadv", lambda *_: 0)
    assert bench(folder) == 2
    captured = capsys.readouterr()
    assert "tok/s" not in captured.out
    assert captured.err.startswith("error: ") and os.path.join("experts", "layer_000.bin") in captured.err


def test_what_does_not_fit_into_the_context_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, "--prompts", "8", "1000000") == 2
    assert "a prompt of 1000000 tokens and an answer of 5 do not fit" in capsys.readouterr().err


def test_a_model_or_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "bench needs --model DIR" in capsys.readouterr().err
