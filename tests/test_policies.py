"""Replacement policies on routing that was recorded, of a trained model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_flashmoe.experts.policy import LRFU, LRU

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from compare_policies import hit_rate  # noqa: E402

LAYERS, EXPERTS = 8, 64


@pytest.fixture(scope="module")
def trace() -> np.ndarray:
    """int [tokens, layers, active]: the first dialogues of the small model's held-out set."""
    experts = np.load(ROOT / "examples/small_moe/routing.npz")["experts"]
    assert experts.shape[0] >= 10_000 and experts.shape[1] == LAYERS
    return experts[:600].astype(np.int64)


def test_hit_rates_of_a_trace_that_can_be_counted() -> None:
    trace = np.array([[[0, 1]], [[1, 2]], [[0, 1]], [[1, 2]]])
    assert hit_rate(trace, 4, 2, LRU(1, 4)) == 3 / 8  # expert 1 stays, the other slot changes hands
    assert hit_rate(trace, 4, 3, LRU(1, 4)) == 5 / 8


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_frequency_beside_recency_finds_more(trace: np.ndarray, share: float) -> None:
    slots = int(share * LAYERS * EXPERTS)
    recency = hit_rate(trace, EXPERTS, slots, LRU(LAYERS, EXPERTS))
    both = hit_rate(trace, EXPERTS, slots, LRFU(LAYERS, EXPERTS))
    assert share < recency < both
