"""Whether figures can be written is found before hours are spent on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_flashmoe import evaluate
from mlx_flashmoe.bench import kernels, model
from mlx_flashmoe.cli import main
from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.reports import check_report, write_report


@pytest.mark.parametrize("command", ["eval", "bench", "kernels"])
@pytest.mark.parametrize("place", ["none/figures.json", "."])
def test_nothing_is_done_for_a_file_that_cannot_be_written(
    command: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    for module, name in ((evaluate, "load"), (model, "load"), (kernels, "random_slab")):
        monkeypatch.setattr(module, name, work)
    (tmp_path / "text").write_text("One two three.")
    arguments = {
        "eval": ["eval", "--model", "x", "--text", str(tmp_path / "text")],
        "bench": ["bench", "--model", "x"],
        "kernels": ["bench", "kernels"],
    }[command]
    assert main([*arguments, "--json", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / place} cannot be written: " in error and error.count("\n") == 1


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    check_report(None)
    check_report("/dev/null")
    check_report(str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("as it was")
    check_report(str(tmp_path / "old"))
    assert (tmp_path / "old").read_text() == "as it was"
    if Path("/dev/full").exists():
        with pytest.raises(RequestError, match="No space left"):
            write_report("/dev/full", {})
