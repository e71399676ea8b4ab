"""The folder that a self-test works in, and the small models that several checks use."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_flashmoe.convert import convert
from mlx_flashmoe.layout import MANIFEST
from mlx_flashmoe.models import ARCHITECTURES
from mlx_flashmoe.selftest.checkpoints import write_checkpoint

BITS = 4


def model_types() -> list[str]:
    """A model_type of every architecture there is."""
    first = {module: model_type for model_type, module in reversed(ARCHITECTURES.items())}
    return sorted(first.values())


class Workplace:
    """``folder`` may hold what an earlier process has made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, model_type: str) -> Path:
        """A random checkpoint of an architecture, written at first use."""
        folder = self.folder / f"{model_type}-checkpoint"
        if not folder.exists():
            write_checkpoint(self.folder / "unfinished", model_type)
            os.rename(self.folder / "unfinished", folder)
        return folder

    def model(self, model_type: str) -> Path:
        """The same, converted."""
        folder = self.folder / model_type
        if not (folder / MANIFEST).exists():  # resumes, where a process was lost in the middle
            convert(self.checkpoint(model_type), folder, q_bits=BITS)
        return folder
