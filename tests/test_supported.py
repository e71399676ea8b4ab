"""The command ``models``, and how architectures of libraries are found: in a package made for the test."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_flashmoe.cli import main
from mlx_flashmoe.external.library import LIBRARIES
from mlx_flashmoe.models import ARCHITECTURES
from mlx_flashmoe.supported import supported, with_experts

# Modules of a library's models: those that are architectures with experts, directly or through others, and not.
MODULES = {
    "switch_layers.py": "class SwitchGLU: ...\nclass Model: ...\n",
    "direct.py": "from .switch_layers import SwitchGLU\n\nclass Model(nn.Module):\n    ...\n",
    "built_on_it.py": "from . import base, direct\n\nclass Model(nn.Module):\n    ...\n",
    "same_model.py": "from .direct import Model  # noqa\n\nclass ModelArgs: ...\n",
    "folder/__init__.py": "from .folder import Model\n",
    "folder/folder.py": "from .language import LanguageModel\n\nclass Model(nn.Module):\n    ...\n",
    "folder/language.py": "from ..switch_layers import SwitchLinear\n",
    "on_a_folder/__init__.py": "from .on_a_folder import Model\n",
    "on_a_folder/on_a_folder.py": "from ..folder.language import LanguageModel\n\nclass Model(nn.Module):\n    ...\n",
    "dense.py": "from .base import attention\n\nclass Model(nn.Module):\n    ...\n",
    "only_pieces.py": "from .switch_layers import SwitchGLU\n\nclass Block(nn.Module):\n    ...\n",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of mlx-lm, which is a package of MODULES as long as the fixture lasts."""
    package = tmp_path / "mlx_lm"
    for name, text in MODULES.items():
        path = package / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (package / "__init__.py").write_text("")
    (package / "models" / "__init__.py").write_text("")
    (package / "utils.py").write_text("MODEL_REMAPPING = {'nickname': 'direct', 'dense_nickname': 'dense'}\n")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mlx_lm"}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mlx-lm"
    for name in [name for name in sys.modules if name.split(".")[0] == "mlx_lm"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_a_library_s_architectures_with_experts_are_found_in_its_source(library: str) -> None:
    assert with_experts(LIBRARIES[library]) == [
        "built_on_it",
        "direct",
        "folder",
        "nickname",
        "on_a_folder",
        "same_model",
    ]


def test_an_architecture_of_ours_is_never_a_library_s(library: str) -> None:
    through = {row.model_type: row.through for row in supported()}
    assert {model_type for model_type, name in through.items() if name == "native"} == set(ARCHITECTURES)
    assert through["direct"] == library


def test_the_list(library: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    for name in (*ARCHITECTURES, "built_on_it", "on_a_folder"):
        assert name in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"model_type": "direct", "through": library} in rows


def test_a_library_that_is_not_installed_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_flashmoe.external.library.importlib.util.find_spec", lambda name: None)
    assert main(["models"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in LIBRARIES:
        assert f"not installed: pip install 'mlx-flashmoe[{name}]'" in said
