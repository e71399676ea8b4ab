"""For all tests: hypothesis sets no deadline, because a busy machine is not a wrong answer."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from mlx_flashmoe import system, watch

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """Gives each of xdist's processes its own folder for temporary files.

    MLX keeps the functions that it compiles on the CPU there, and two processes that compile the same one at the
    same time can find each other's half written.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        folder = Path(tempfile.gettempdir(), f"mlx-flashmoe-tests-{os.getuid()}", worker)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


@pytest.fixture(scope="session", autouse=True)
def _enough_memory() -> Iterator[None]:
    """No test depends on how much memory is free just then, or on the system's judgement of it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(system, "available_memory", system.physical_memory)
        monkeypatch.setattr(watch, "PressureGauge", lambda: lambda: "normal")
        yield
