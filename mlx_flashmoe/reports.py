"""Figures in a JSON file, as eval, bench and doctor write them with --json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlx_flashmoe.errors import RequestError


def check_report(file: str | None) -> None:
    """Finds out whether ``file``, if one is given, can be written, before the work that it is for. Leaves no trace.

    Raises:
        RequestError: it cannot.
    """
    if file is None:
        return
    path = Path(file).resolve()
    try:
        if path.exists() and not path.is_dir():
            if not os.access(path, os.W_OK):
                raise PermissionError(0, "Permission denied")
            return
        with path.open("xb"):  # raises for a folder, too
            pass
        path.unlink()
    except OSError as e:
        raise _unwritable(file, e) from None


def write_report(file: str, figures: Any) -> None:
    """Raises RequestError: it cannot be written."""
    try:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise _unwritable(file, e) from None


def _unwritable(file: str, error: OSError) -> RequestError:
    return RequestError(f"{file} cannot be written: {error.strerror}; give --json another file")
