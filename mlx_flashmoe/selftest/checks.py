"""All checks, in the order of the report. Each lists its trials without making them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mlx_flashmoe.selftest.conversion import conversion_checks
from mlx_flashmoe.selftest.expert_kernels import expert_checks
from mlx_flashmoe.selftest.reads import read_checks
from mlx_flashmoe.selftest.row_kernels import row_checks
from mlx_flashmoe.selftest.small_models import logits_checks, residency_checks
from mlx_flashmoe.selftest.trial import Trial
from mlx_flashmoe.selftest.workplace import Workplace

CHECKS: dict[str, Callable[[Workplace], Iterator[Trial]]] = {
    "expert kernels": expert_checks,
    "kernels on rows": row_checks,
    "small models": logits_checks,
    "residency": residency_checks,
    "conversion": conversion_checks,
    "reads": read_checks,
}


def trials(folder: Path) -> list[tuple[str, Trial]]:
    """Every trial, with the check it belongs to. A check that cannot list its trials is one that fails."""
    place = Workplace(folder)
    found: list[tuple[str, Trial]] = []
    for name, check in CHECKS.items():
        try:
            for trial in check(place):
                found.append((name, trial))
        except Exception as e:
            found.append((name, Trial("its trials", partial(_fail, e))))
    return found


def _fail(error: Exception) -> str:
    raise error
