"""Routers against their definition, written out token by token in float64."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashmoe.models.router import Gate, Router

EXPERTS, TOKENS = 24, 40


def defined(router: Router, logits: np.ndarray, correction: np.ndarray | None) -> dict[int, float]:
    """One token's experts and their weights."""
    scores = 1 / (1 + np.exp(-logits))
    if router.scoring == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum()
    corrected = scores if correction is None else scores + correction
    size = router.count // router.groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.groups)]
    groups.sort(key=lambda group: -sum(sorted(corrected[e] for e in group)[-2:]))
    selectable = [e for group in groups[: router.chosen_groups] for e in group]
    chosen = sorted(selectable, key=lambda e: -corrected[e])[: router.active]
    total = sum(scores[e] for e in chosen) if router.normalize else 1
    return {e: scores[e] / total * router.scaling for e in chosen}


ROUTERS = [
    Router(EXPERTS, active, normalize, scoring, corrected, groups, chosen, scaling)
    for active, normalize, scoring, corrected, (groups, chosen), scaling in itertools.product(
        (1, 5),
        (False, True),
        ("softmax", "sigmoid"),
        (False, True),
        ((1, 1), (4, 1), (4, 3), (12, 12)),
        (1.0, 2.5),
    )
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_a_router_is_its_definition(router: Router) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, TOKENS, EXPERTS)).astype(np.float32)
    # As large as the scores differ, so that choices by corrected and by plain scores are not the same.
    correction = rng.standard_normal(EXPERTS).astype(np.float32) * 0.3 if router.corrected else None
    ids, weights = router(mx.array(logits), None if correction is None else mx.array(correction))
    assert weights.dtype == mx.float32 and ids.shape == weights.shape == (2, TOKENS, router.active)
    if mx.default_device() == mx.cpu:
        assert (np.diff(np.array(ids), axis=-1) > 0).all()
    for where in np.ndindex(2, TOKENS):
        want = defined(router, logits[where].astype(np.float64), correction)
        got = dict(zip(np.array(ids)[where].tolist(), np.array(weights)[where].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("router", [r for r in ROUTERS if r.active == 5 and r.normalize], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -200.0])
def test_ids_are_valid_whatever_the_logits(router: Router, value: float) -> None:
    logits = np.random.default_rng(0).standard_normal((3, EXPERTS)).astype(np.float32)
    logits[1] = value
    logits[2, 7] = value
    ids, weights = router(mx.array(logits), mx.zeros(EXPERTS) if router.corrected else None)
    picked = np.array(ids)
    assert ((picked >= 0) & (picked < EXPERTS)).all()
    assert all(len(set(row)) == len(row) for row in picked.tolist())
    if value == -200:  # every sigmoid is 0
        assert np.isfinite(np.array(weights)).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_gate_computes_in_float32(dtype: mx.Dtype) -> None:
    """Logits that the activations' dtype could not tell apart."""
    gate = Gate(64, 2, corrected=True)
    weight = np.full((2, 64), 1 / 64, np.float32)
    weight[1] += 1e-6
    gate.load_weights([("weight", mx.array(weight)), ("e_score_correction_bias", mx.zeros(2))])
    logits = gate(mx.ones((1, 64), dtype))
    assert logits.dtype == mx.float32 and logits[0, 1] > logits[0, 0]
