"""Filters, penalties and draws."""

import math

import mlx.core as mx
import numpy as np
import pytest
from fakes import HashModel
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.generate import generate_step
from mlx_flashmoe.sampling import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
    make_sampler,
    picking,
)

seeds = st.integers(0, 2**32 - 1)


def logprobs(seed: int, size: int = 50, ties: bool = False) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).standard_normal(size)
    if ties:
        logits = np.round(logits)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def kept(filtered: mx.array, original: np.ndarray) -> np.ndarray:
    """Indices that survived; checks that what survived is untouched."""
    values = np.array(filtered)[0]
    alive = np.flatnonzero(np.isfinite(values))
    assert np.array_equal(values[alive], original[alive])
    assert np.all(values[np.isinf(values)] < 0)
    return alive


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 49), st.booleans())
def test_top_k_keeps_exactly_the_k_most_likely(seed: int, k: int, ties: bool) -> None:
    lp = logprobs(seed, ties=ties)
    alive = kept(apply_top_k(mx.array(lp)[None], k), lp)
    assert len(alive) == k
    assert lp[alive].min() >= np.delete(lp, alive).max()


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.01, 0.99), st.booleans())
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float, ties: bool) -> None:
    lp = logprobs(seed, ties=ties)
    alive = kept(apply_top_p(mx.array(lp)[None], p), lp)
    probs = np.exp(lp[alive].astype(np.float64))
    assert probs.sum() >= p - 1e-5
    assert probs.sum() - probs.min() < p + 1e-5  # without its least likely token it would not reach p
    if len(alive) < len(lp):
        assert lp[alive].min() >= np.delete(lp, alive).max()


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.001, 1.0))
def test_min_p_is_a_threshold_relative_to_the_most_likely(seed: int, p: float) -> None:
    lp = logprobs(seed)
    alive = kept(apply_min_p(mx.array(lp)[None], p), lp)
    ratio = np.exp(lp.astype(np.float64) - lp.max())
    assert np.all(ratio[alive] >= p * (1 - 1e-5))
    assert np.all(np.delete(ratio, alive) < p * (1 + 1e-5))
    assert lp.argmax() in alive


@pytest.mark.parametrize("options", [{}, {"top_p": 0.1}, {"top_k": 3, "seed": 1}])
def test_temperature_zero_is_argmax(options: dict) -> None:
    sampler = make_sampler(0.0, **options)
    for seed in range(20):
        lp = logprobs(seed)
        assert sampler(mx.array(lp)[None]).tolist() == [lp.argmax()]


def draws(sampler, lp: np.ndarray, n: int = 200) -> list[int]:
    return [sampler(mx.array(lp)[None]).item() for _ in range(n)]


def test_a_seed_reproduces_whatever_else_draws() -> None:
    lp = logprobs(0)
    first = draws(make_sampler(1.0, seed=7), lp)
    mx.random.seed(99)
    mx.random.uniform(shape=(5,))
    assert draws(make_sampler(1.0, seed=7), lp) == first
    assert draws(make_sampler(1.0, seed=8), lp) != first


def test_without_a_seed_draws_follow_the_global_state() -> None:
    lp = logprobs(0)
    mx.random.seed(3)
    first = draws(make_sampler(1.0), lp)
    assert draws(make_sampler(1.0), lp) != first
    mx.random.seed(3)
    assert draws(make_sampler(1.0), lp) == first


@pytest.mark.parametrize("temp", [5e-324, 1e-40, 1e-38, 1e-30])
def test_a_temperature_of_almost_0_takes_the_most_likely(temp: float) -> None:
    lp = logprobs(3)
    assert set(draws(make_sampler(temp, seed=1), lp, 20)) == {int(lp.argmax())}


def test_draws_have_the_tempered_distribution() -> None:
    lp = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    n = 4000
    for temp in (0.5, 1.0, 2.0):
        expected = np.exp(lp / temp) / np.exp(lp / temp).sum()
        sampler = make_sampler(temp, seed=0)
        counts = np.bincount(sampler(mx.array(np.tile(lp, (n, 1)))).tolist(), minlength=4)
        assert np.abs(counts / n - expected).max() < 4 * math.sqrt(0.25 / n)


def test_filters_combine_in_the_documented_order() -> None:
    # top-p 0.75 keeps {0.5, 0.3}; then min-p 0.7 drops 0.3. The other way round 0.5 alone would be there for
    # top-p as well, but with top-k first nothing below would change: what survives is only token 0.
    lp = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert set(draws(make_sampler(5.0, 0.75, seed=0), lp)) == {0, 1}
    assert set(draws(make_sampler(5.0, 0.75, 0.7, seed=0), lp)) == {0}
    # A high temperature comes last: it does not widen what top-p keeps.
    assert set(draws(make_sampler(100.0, 0.45, seed=0), lp)) == {0}
    assert set(draws(make_sampler(100.0, top_k=3, seed=0), lp)) == {0, 1, 2}


def test_zero_and_one_switch_filters_off() -> None:
    lp = np.log(np.full(4, 0.25, np.float32))
    for top_p in (0.0, 1.0):
        assert set(draws(make_sampler(1.0, top_p, 0.0, top_k=0, seed=0), lp)) == {0, 1, 2, 3}
    assert set(draws(make_sampler(1.0, top_k=9, seed=0), lp)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"temp": -0.1}, "--temp"),
        ({"temp": math.nan}, "--temp"),
        ({"temp": math.inf}, "--temp"),
        ({"top_p": 1.5}, "--top-p"),
        ({"top_p": -0.5}, "--top-p"),
        ({"top_p": math.nan}, "--top-p"),
        ({"min_p": 2.0}, "--min-p"),
        ({"top_k": -1}, "--top-k"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_out_of_range_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(RequestError, match=flag):
        make_sampler(**options)


def test_repetition_penalty_moves_recent_tokens_down() -> None:
    logits = np.array([[2.0, -2.0, 1.0, 4.0, 0.5]], np.float32)
    (penalize,) = make_logits_processors(2.0, 3)
    given = mx.array(logits)
    changed = penalize(
        mx.array([4, 0, 1, 0]), given
    )  # the last three: 0 twice counts once, 4 is too long ago
    assert changed.tolist() == [[1.0, -4.0, 1.0, 4.0, 0.5]]
    assert given.tolist() == logits.tolist()


@pytest.mark.parametrize("penalty", [None, 0.0, 1.0])
def test_no_penalty_is_no_processor(penalty: float | None) -> None:
    assert make_logits_processors(penalty) == []


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"repetition_penalty": -1.0}, "--repetition-penalty"),
        ({"repetition_penalty": math.nan}, "--repetition-penalty"),
        ({"repetition_penalty": 1.1, "repetition_context_size": 0}, "--repetition-context-size"),
        ({"repetition_context_size": -2}, "--repetition-context-size"),
        ({"presence_penalty": math.nan}, "--presence-penalty"),
        ({"frequency_penalty": math.inf}, "--frequency-penalty"),
    ],
)
def test_penalties_out_of_range_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(RequestError, match=flag):
        make_logits_processors(**options)


tokens = st.lists(st.integers(0, 49), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(seeds, tokens, st.integers(1, 45))
def test_a_window_counts_the_last_tokens_and_minus_one_counts_all(
    seed: int, seen: list[int], size: int
) -> None:
    lp = mx.array(logprobs(seed))[None]

    def penalized(window: int) -> set[int]:
        (penalize,) = make_logits_processors(1.5, window)
        return set(np.flatnonzero(np.array(penalize(mx.array(seen), lp) != lp)[0]).tolist())

    assert penalized(size) == set(seen[-size:])
    assert penalized(-1) == set(seen)


@settings(max_examples=40, deadline=None)
@given(seeds, tokens, st.lists(st.integers(0, 49), max_size=40), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_count_the_answer_alone(
    seed: int, prompt: list[int], answer: list[int], presence: float, frequency: float
) -> None:
    lp = logprobs(seed)
    changed = mx.array(lp)[None]
    for processor in make_logits_processors(presence_penalty=presence, frequency_penalty=frequency):
        processor.begin(len(prompt))  # type: ignore[attr-defined]
        changed = processor(mx.array(prompt + answer), changed)
    counts = np.bincount(answer, minlength=50) if answer else np.zeros(50)
    np.testing.assert_allclose(changed[0], lp - frequency * counts - presence * (counts > 0), atol=1e-4)


def test_each_answer_of_a_conversation_is_counted_anew() -> None:
    _, processors = picking(presence_penalty=1000.0)
    answers = [
        [
            token
            for token, _ in generate_step(prompt, HashModel(), max_tokens=30, logits_processors=processors)
        ]
        for prompt in (mx.array([1, 2, 3]), mx.array([5] * 20), mx.array([1, 2, 3]))
    ]
    assert all(len(set(answer)) == 30 for answer in answers)  # no token twice
    assert answers[0] == answers[2]  # as if there had been no other


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 49), st.integers(0, 49))
def test_a_bias_of_100_always_comes_and_of_minus_100_never(seed: int, wanted: int, banned: int) -> None:
    (bias,) = make_logits_processors(logit_bias={wanted: 100})
    assert set(
        draws(
            make_sampler(2.0, seed=seed), np.array(bias(mx.array([0]), mx.array(logprobs(seed))[None]))[0], 20
        )
    ) == {wanted}
    (ban,) = make_logits_processors(logit_bias={banned: -100})
    assert banned not in draws(
        make_sampler(2.0, seed=seed), np.array(ban(mx.array([0]), mx.array(logprobs(seed))[None]))[0], 50
    )


def test_biases_come_first_and_penalties_after_them() -> None:
    _, processors = picking(
        logit_bias={0: 6.0}, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5
    )
    logits = mx.array([[2.0, 1.0, -1.0]])
    for processor in processors:
        if begin := getattr(processor, "begin", None):
            begin(1)
        logits = processor(mx.array([2, 0, 0]), logits)
    # (2 + 6) / 2 - 1 - 2 * 0.5, untouched, and the prompt's own: only repetition counts it.
    assert logits.tolist() == [[2.0, 1.0, -2.0]]
