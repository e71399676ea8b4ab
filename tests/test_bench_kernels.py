"""``bench kernels``: what it measures is what it says, and a wrong kernel is no figure but an error."""

import json

import mlx.core as mx
import pytest

from mlx_flashmoe.bench import kernels as bench
from mlx_flashmoe.cli import main

cpu = pytest.importorskip("mlx_flashmoe.kernels.cpu", reason="numba is absent", exc_type=ImportError)
SMALL = ["bench", "kernels", "--hidden", "256", "--intermediate", "128", "--slots", "24", "--seconds", "0"]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def test_table_and_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    written = json.loads(file.read_text())
    assert written["environment"]["versions"]["mlx"] == mx.__version__
    assert written["shape"]["hidden"] == 256
    cases = {(f["tokens"], f["top_k"]) for f in written["figures"]}
    assert cases == {(t, k) for t in (1, 4, 16) for k in (4, 10)}
    paths = [f["path"] for f in written["figures"] if (f["tokens"], f["top_k"]) == (1, 10)]
    assert paths == ["memory", "MLX gather_qmm", "numba"]
    expert = 3 * 256 * 128 * (4 / 8 + 2 * 2 / 64)
    for f in written["figures"]:
        assert 0 < f["seconds_p10"] <= f["seconds"] <= f["seconds_p90"]
        distinct = min(24, f["tokens"] * f["top_k"])
        assert f["gb_per_s"] * f["seconds"] * 1e9 == pytest.approx(distinct * expert)


def test_a_kernel_that_is_wrong_is_an_error(capsys, monkeypatch):
    right = cpu.expert_ffn
    monkeypatch.setattr(cpu, "expert_ffn", lambda *a: right(*a) * 1.001)
    assert main(SMALL) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bench kernels: numba at T=1, K=4 is wrong") and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--slots", "9"], "--slots must be at least 10"),
        (["--hidden", "100"], "does not divide the 100 inputs"),
        (["--json", "/nowhere/figures.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys, flags, message):
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_turns_go_round_all_slots_before_one_comes_again():
    turns = bench._turns(12, 1, 4)
    seen = [s for _ in range(3) for s in next(turns).tolist()[0]]
    assert sorted(seen) == list(range(12))
