"""selftest: the command as it is typed, faults that are planted, and the parts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from mlx_flashmoe import system
from mlx_flashmoe.cli import main
from mlx_flashmoe.experts import ExpertStore
from mlx_flashmoe.kernels import gpu, reference
from mlx_flashmoe.loader import load
from mlx_flashmoe.models import ARCHITECTURES, architecture
from mlx_flashmoe.selftest import conversion, expert_kernels, reads, report, small_models, worker
from mlx_flashmoe.selftest.checkpoints import config_of
from mlx_flashmoe.selftest.expert_kernels import FORMATS, Format
from mlx_flashmoe.selftest.trial import (
    FAILED,
    PASSED,
    SKIPPED,
    Row,
    Skip,
    Trial,
    Wrong,
    compared,
    perform,
    reason,
    shown,
)
from mlx_flashmoe.selftest.workplace import Workplace, model_types

on_a_cpu = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="plants faults in what a CPU computes with"
)


def selftest(
    folder: Path, *options: str, planted: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, on ``folder`` and writing JSON there; every Python that it starts runs ``planted`` first."""
    (folder / "planted").mkdir()
    (folder / "planted" / "sitecustomize.py").write_text(planted)
    return subprocess.run(
        [sys.executable, "-m", "mlx_flashmoe", "selftest", "--json", str(folder / "report.json"), *options],
        env={**os.environ, "PYTHONPATH": str(folder / "planted"), "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def left(folder: Path) -> list[str]:
    """What is in the folder for temporary files, but for what MLX keeps there: functions that it compiled."""
    return sorted(path.name for path in folder.iterdir() if path.name != "mlx")


def test_the_command(tmp_path: Path) -> None:
    ended = selftest(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert left(tmp_path) == ["planted", "report.json"]
    *table, line = ended.stdout.splitlines()
    assert max(map(len, table)) <= 80
    written = json.loads((tmp_path / "report.json").read_text())
    assert line == written["line"] and line.startswith("mlx-flashmoe ")
    outcomes = [row["outcome"] for row in written["rows"]]
    for outcome in (PASSED, FAILED, SKIPPED):
        assert written[outcome] == outcomes.count(outcome)
        assert f"{written[outcome]} {outcome}" in line
    assert f"mlx {written['facts']['versions']['mlx']}" in line
    for row in written["rows"]:
        assert set(row) == {"check", "name", "outcome", "detail", "seconds"}
        assert row["detail"] and row["outcome"] != FAILED
    names = {(row["check"], row["name"]): row["outcome"] for row in written["rows"]}
    assert {check for check, _ in names} == {
        "expert kernels",
        "kernels on rows",
        "small models",
        "residency",
        "conversion",
        "reads",
    }
    for model_type in model_types():
        assert names["small models", f"{model_type}, in pieces"] == PASSED
        assert names["residency", model_type] == PASSED
        if mx.default_device() == mx.cpu:
            assert names["small models", f"{model_type}, as the CPU"] == SKIPPED
    assert names["conversion", "killed and resumed"] == PASSED


PLANTED = """
import os
from mlx_flashmoe.kernels import add_norm, gated_norm, router
from mlx_flashmoe.selftest import checks, row_kernels
from mlx_flashmoe.selftest.trial import Trial

spoiled = []

def uncompiled(*arguments):
    raise RuntimeError("[metal::Device] Unable to build metal library from source\\nprogram_source:3:1: note: "
        "here\\nprogram_source:7:9: error: unknown type name 'flaot'\\nprogram_source:9:9: error: another")

def broken(place):
    yield Trial("spoils its process", lambda: spoiled.append(1) or 1 / 0)
    yield Trial("comes after it", lambda: "another process" if not spoiled else 1 / 0)
    raise OSError("no such part")

add_norm.rms_norm = lambda x, weight, eps: 1.01 * add_norm._plain_norm(x, weight, eps)
router.route = uncompiled
gated_norm.gated_norm = lambda *arguments: os.abort()
checks.CHECKS = {"broken": broken, "rows": row_kernels.row_checks}
"""


@on_a_cpu
def test_planted_faults_are_rows_and_the_others_go_on(tmp_path: Path) -> None:
    ended = selftest(tmp_path, planted=PLANTED)
    assert ended.returncode == 1
    assert left(tmp_path) == ["planted", "report.json"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    details = {name: row["detail"] for name, row in rows.items() if row["outcome"] == FAILED}
    assert set(details) == {"spoils its process", "its trials", "norm", "router", "gated norm"}
    assert details["its trials"] == "OSError: no such part"
    assert "f32: differs by 1e-2, allowed is 2e-6" in details["norm"]
    assert (
        details["router"]
        == "f32, bf16, f16: RuntimeError: program_source:7:9: error: unknown type name 'flaot'"
    )
    assert details["gated norm"].startswith("the process ended with SIGABRT")
    passed = {name for name, row in rows.items() if row["outcome"] == PASSED}
    assert {"comes after it", "add and norm", "inputs of the delta rule", "delta rule, in segments"} <= passed
    last = ended.stdout.splitlines()[-1]
    assert "broken: its trials; rows: norm; rows: gated norm; rows: router" in last
    assert "Traceback" not in ended.stdout + ended.stderr


WAITING = """
import os, time
from pathlib import Path
from mlx_flashmoe.selftest import checks
from mlx_flashmoe.selftest.trial import Trial

def wait():
    Path(os.environ["TMPDIR"], "begun").write_text(str(os.getpid()))
    time.sleep(600)

checks.CHECKS = {"waits": lambda place: [Trial("for long", wait)]}
"""


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(WAITING)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_flashmoe", "selftest"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "planted"), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun = tmp_path / "begun"
    while not (begun.exists() and begun.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert left(tmp_path) == ["begun", "planted"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


def test_a_process_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LONGEST_TRIAL", 0.0)
    (row,) = worker.perform_all(tmp_path, lambda done, total: None)
    assert (row.outcome, row.detail) == (FAILED, "did not end within 0 s")


@pytest.mark.parametrize("option", ["--folder", "--json"])
def test_what_cannot_be_written_is_said_at_once(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", option, str(tmp_path / "none" / "at all")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"give {option} another" in said


# --- Trials


def test_outcomes() -> None:
    def raises(error: Exception) -> Any:
        def run() -> str:
            raise error

        return run

    table: list[tuple[Any, str, str]] = [
        (lambda: "fine", PASSED, "fine"),
        (raises(Skip("no GPU")), SKIPPED, "no GPU"),
        (raises(Wrong("differs")), FAILED, "differs"),
        (raises(ValueError("\n  two\nlines")), FAILED, "ValueError: two"),
        (raises(ValueError()), FAILED, "ValueError"),
    ]
    for run, outcome, detail in table:
        row = perform("check", Trial("name", run))
        assert (row.check, row.name, row.outcome, row.detail) == ("check", "name", outcome, detail)


@pytest.mark.parametrize(
    "said",
    [
        "program_source:2:1: error: expected ';'",
        'kernel.cu(12): error: identifier "x" is undefined',
        "kernel.cu(12): error #20: identifier",
        "kernel.cu(3): catastrophic error: cannot open",
    ],
)
def test_the_first_error_of_a_compiler(said: str) -> None:
    text = f"Failed to compile kernel\nwarning: unused\n  {said}\nlast.cu(99): error: the second"
    assert reason(RuntimeError(text)) == f"RuntimeError: {said}"


def test_every_part_is_compared() -> None:
    def raises() -> float:
        raise ValueError("broken")

    parts = {"a": lambda: 1.0, "b": lambda: 1e-7, "c": raises, "d": lambda: float("inf"), "e": raises}
    with pytest.raises(
        Wrong, match=r"a: differs by 1, allowed is 1e-6; c, e: ValueError: broken; d: differs by inf"
    ):
        compared(parts, dict.fromkeys(parts, 1e-6))
    assert compared({"b": parts["b"]}, {"b": 1e-6}) == "b 1e-7"
    with pytest.raises(Wrong):
        compared({"a": lambda: float("nan")}, {"a": 1.0})


def test_errors_as_people_write_them() -> None:
    assert [shown(e) for e in (0.0, 2.4e-6, 0.013, 1e-10, 123.0, float("inf"))] == [
        "0",
        "2e-6",
        "1e-2",
        "1e-10",
        "123",
        "inf",
    ]


# --- Kernels


def test_the_cover() -> None:
    """Every width, every group size with every width's family, every dtype of scales and of activations."""
    projections = [p for form in FORMATS for p in form.layout.projections.values()]
    assert {p.bits for p in projections} == {2, 3, 4, 6, 8, 16}
    assert {p.group_size for p in projections} == {0, 32, 64, 128}
    assert {p.scales.dtype for p in projections if p.scales} == {"float32", "bfloat16", "float16"}
    assert {p.weight.dtype for p in projections if not p.scales} == {"float32", "bfloat16", "float16"}
    assert {form.dtype for form in FORMATS} == {"float32", "bfloat16", "float16"}
    assert all(gpu.supports(form.layout) for form in FORMATS), "a GPU would compute it with MLX's operations"


@pytest.mark.parametrize("matrix", [False, True])
def test_a_gpu_is_tried_in_every_formulation(
    matrix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that computes as the reference does."""
    called = set()

    def pretend(function: Any) -> Any:
        def call(*arguments: Any, formulation: str, init_value: float) -> mx.array:
            called.add((function.__name__, formulation))
            assert np.isnan(init_value)
            y = function(*arguments)
            return y.astype(arguments[0].dtype)

        return call

    module = SimpleNamespace(
        LANGUAGE=SimpleNamespace(prefer_matrix=matrix),
        expert_ffn=pretend(reference.expert_ffn),
        expert_rows=pretend(reference.expert_rows),
    )
    monkeypatch.setattr(gpu, "backend", lambda: module)
    monkeypatch.setattr(expert_kernels, "LARGE", FORMATS[0])
    trials = list(expert_kernels.expert_checks(Workplace(tmp_path)))
    rows = [perform("", trial) for trial in trials[:-3]]
    assert {row.outcome for row in rows} == {PASSED}
    formulations = [*gpu.FORMULATIONS, gpu.MATRIX] if matrix else list(gpu.FORMULATIONS)
    assert {f for name, f in called if name == "expert_ffn"} == set(formulations)
    assert {f for name, f in called if name == "expert_rows"} == {"grouped", *formulations[3:]}
    assert len([row for row in rows if row.name.startswith("grouped: ")]) == len(FORMATS) + 1
    assert all(len(trial.name) <= 35 for trial in trials), "the table would break the name"


def wrong_by(function: Any, change: Any) -> Any:
    return lambda *arguments, **options: change(function(*arguments, **options))


SMALL = Format("small", expert_kernels.layout_of(64, 32, 4, 32), "float32")


def last_row_nan(y: mx.array) -> mx.array:
    return mx.concatenate([y[:-1], mx.full(y[-1:].shape, float("nan"), y.dtype)])


@pytest.mark.parametrize("change", [lambda y: y * 1.001, lambda y: y[::-1], last_row_nan])
@pytest.mark.parametrize("name", ["ffn", "outputs", "rows"])
def test_wrong_kernels_are_noticed(name: str, change: Any) -> None:
    measure = getattr(expert_kernels, f"{name}_error")
    right = getattr(reference, f"expert_{name}")
    assert measure(right, SMALL) < 1e-5
    with pytest.raises(Wrong):
        error = measure(wrong_by(right, change), SMALL)
        compared({"": lambda: error}, {"": 1e-4})


def test_a_kernel_that_gives_other_bits_each_time_is_noticed() -> None:
    calls = iter(range(100))
    noisy = wrong_by(reference.expert_ffn, lambda y: y + 1e-7 * next(calls))
    with pytest.raises(Wrong, match="the same call gives other bits"):
        expert_kernels.ffn_error(noisy, SMALL)


# --- Models


def test_every_architecture_has_a_small_model() -> None:
    assert {architecture(m) for m in model_types()} == set(ARCHITECTURES.values())
    for model_type in ARCHITECTURES:
        architecture(model_type).Config.from_dict(config_of(model_type))


def test_logits_that_differ_are_noticed() -> None:
    want = np.random.default_rng(0).standard_normal((3, 50))
    assert small_models._close(want + 1e-5, want) == "logits differ by 1e-5 of their spread"
    wrong = want.copy()
    wrong[1, 7] += 0.1
    for got, says in ((wrong, "logits differ by 1e-1"), (want * np.nan, "not finite")):
        with pytest.raises(Wrong, match=says):
            small_models._close(got, want)


def test_bits_that_residency_changes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_off(folder: Path, expert_memory: Any, **options: Any) -> Any:
        model, tokenizer = load(folder, expert_memory, **options)
        head = model.model.head
        model.model.head = lambda x: head(x) + (0.0 if model.resident else 1e-6)
        return model, tokenizer

    monkeypatch.setattr(small_models, "load", slightly_off)
    trial = next(small_models.residency_checks(Workplace(tmp_path)))
    row = perform("", trial)
    assert row.outcome == FAILED and row.detail.startswith("4 experts in memory change the logits")


# --- Conversion and reads


def test_a_conversion_that_resumes_to_other_bytes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace(tmp_path)
    (model_type, *_) = model_types()
    file = next(place.model(model_type).glob("experts/*"))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    row = perform("", next(conversion.conversion_checks(place)))
    assert row.outcome == FAILED
    assert row.detail == f"not as a conversion that was left alone: experts/{file.name}"
    verified = [perform("", trial) for trial in conversion.conversion_checks(place)][1]
    assert verified.outcome == FAILED and file.name in verified.detail


def test_a_process_that_is_not_killed_in_the_middle_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "UNITS", 10**6)
    row = perform("", next(conversion.conversion_checks(Workplace(tmp_path))))
    assert row.outcome == FAILED and row.detail.startswith("was to be killed, but ended with status 0")


def test_wrong_reads_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ExpertStore.read

    def read(self: ExpertStore, request: Any, start: int, stop: int, slab: Any, turn: int = 0) -> Any:
        crc = real(self, request, start, stop, slab, turn)
        if request.expert == 13 and start == 0:
            slab.begin(request.slot, 0, 1)[0] ^= 1
            slab.finish(request.slot, 0, 1)
        return crc

    monkeypatch.setattr(ExpertStore, "read", read)
    rows = [perform("", trial) for trial in reads.read_checks(Workplace(tmp_path))]
    assert [row.outcome for row in rows if row.outcome != SKIPPED] == [FAILED] * len(rows)
    assert {row.detail for row in rows} == {"what was read is not what was written"}


def test_direct_reads_that_are_not_possible_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, direct: bool) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(system, "open_for_reading", refuse)
    monkeypatch.setattr(reads, "EXPERTS", reads.AT_A_TIME)
    direct = perform("", next(reads.read_checks(Workplace(tmp_path))))
    assert (direct.outcome, direct.detail) == (SKIPPED, "not possible on this file system: Invalid argument")


def test_a_disk_that_is_full_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "SPARE", 10**18)
    row = perform("", next(reads.read_checks(Workplace(tmp_path))))
    assert row.outcome == SKIPPED and re.fullmatch(r"only .* are free there", row.detail)


# --- The report


def test_the_report_of_a_mac(tmp_path: Path) -> None:
    """Facts of another machine, names and details that are too long for a line."""
    facts = {
        "device": "gpu",
        "device_name": "Apple M3 Max",
        "cpus": 16,
        "machine": "arm64",
        "system": "Darwin",
        "python": "3.12.1",
        "versions": {"mlx-flashmoe": "0.1.0", "mlx": "0.32.4", "mlx-metal": "0.32.4", "numpy": "2.4.0"},
        "platform": "macOS 15.1",
        "memory": {
            "physical": 48 * 2**30,
            "available": None,
            "gpu_working_set": 36 * 2**30,
            "largest_buffer": 27 * 2**30,
        },
        "disk_free": 10**11,
    }
    rows = [
        Row("expert kernels", "grouped: 4 bits / 64, bf16, x bf16", FAILED, "RuntimeError: " + "x" * 200),
        Row("reads", "around the page cache", SKIPPED, "\x1b[31mnot [bold]possible[/bold]"),
        Row("reads", "from the page cache", PASSED, "5 GB/s"),
    ]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.print_report(console, facts, Path("/tmp"), rows)
    *table, line = console.export_text().rstrip("\n").split("\n")
    assert max(map(len, table)) <= 80 and "\x1b" not in "".join(table)
    assert "not [bold]possible[/bold]" in " ".join("".join(table).split())
    assert line == (
        "mlx-flashmoe 0.1.0 selftest: 1 passed, 1 failed, 1 skipped | failed: expert kernels: grouped: 4 bits / 64, "
        "bf16, x bf16 | Apple M3 Max (GPU), 16 cores, arm64 | macOS 15.1 | 51.5 GB, GPU working set 38.7 GB, largest "
        "buffer 29 GB | mlx 0.32.4, mlx-metal 0.32.4, numpy 2.4.0, Python 3.12.1"
    )
