"""From logits to the next token: penalties, filters and the draw. Names and order are mlx-lm's.

Filters apply to the model's own distribution: top-p, then min-p, then top-k, and the temperature last, to what
is left. (transformers applies the temperature first; at temperature 1 the two agree but for the order.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import mlx.core as mx

from mlx_flashmoe.errors import RequestError

Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities [..., V] -> tokens [...]."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""(tokens so far [N], logits [1, V]) -> logits [1, V]."""


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    *,
    top_k: int = 0,
    seed: int | None = None,
) -> Sampler:
    """A function that picks the next token.

    Args:
        temp: temperature; 0 always takes the most likely token, and nothing below matters then.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum. 0 and 1: off.
        min_p: drop tokens less likely than this times the most likely one. 0: off.
        top_k: keep this many most likely tokens. 0: off.
        seed: makes the draws of this sampler reproducible. Without it they follow ``mx.random``'s global state.

    Raises:
        RequestError: a value out of range; the message names it and its flag.
    """
    _check("temp", temp, temp >= 0 and math.isfinite(temp), "a number of at least 0")
    _check("top_p", top_p, 0 <= top_p <= 1, "between 0 and 1")
    _check("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1")
    _check("top_k", top_k, isinstance(top_k, int) and top_k >= 0, "a whole number of at least 0")
    _check("seed", seed, seed is None or 0 <= seed < 2**64, "between 0 and 2**64 - 1")
    if temp == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    # One fresh key a draw, made on the host: no device state to carry from token to token.
    keys = None if seed is None else random.Random(seed)

    def sample(logprobs: mx.array) -> mx.array:
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, top_k)
        key = None if keys is None else mx.random.key(keys.getrandbits(64))
        # The most likely at 0, so that no temperature, however low, makes all of them -inf.
        logprobs = logprobs - mx.max(logprobs, axis=-1, keepdims=True)
        return mx.random.categorical(logprobs * min(1 / temp, 1e38), key=key)

    return sample


def make_logits_processors(
    repetition_penalty: float | None = None, repetition_context_size: int = 20
) -> list[LogitsProcessor]:
    """The changes to the logits before a token is picked.

    Args:
        repetition_penalty: divides positive logits of recent tokens and multiplies negative ones (Keskar et al.
            2019, https://arxiv.org/abs/1909.05858). None, 0 and 1: off.
        repetition_context_size: how many of the last tokens, of the prompt and the answer, count as recent.

    Raises:
        RequestError: a value out of range; the message names it and its flag.
    """
    penalty = repetition_penalty or 1.0
    _check("repetition_penalty", penalty, penalty > 0 and math.isfinite(penalty), "a number of at least 0")
    _check(
        "repetition_context_size",
        repetition_context_size,
        repetition_context_size > 0,
        "a whole number of at least 1",
    )
    if penalty == 1:
        return []

    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = mx.array(tokens)[-repetition_context_size:][None]
        seen = mx.take_along_axis(logits, recent, axis=-1)
        return mx.put_along_axis(logits, recent, mx.where(seen < 0, seen * penalty, seen / penalty), axis=-1)

    return [penalize]


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keeps the smallest set of most likely tokens that reaches ``top_p``; the others become -inf."""
    order = mx.argsort(-logprobs, axis=-1)
    probs = mx.exp(mx.take_along_axis(logprobs, order, axis=-1).astype(mx.float32))
    before = mx.cumsum(probs, axis=-1, inclusive=False)
    total = before[..., -1:] + probs[..., -1:]
    return _keep(logprobs, order, before < top_p * total)


def apply_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Keeps the tokens at least ``min_p`` times as likely as the most likely one; the others become -inf."""
    threshold = mx.max(logprobs, axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keeps exactly ``top_k`` most likely tokens; the others become -inf."""
    dropped = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, dropped, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def _keep(logprobs: mx.array, order: mx.array, kept: mx.array) -> mx.array:
    """-inf wherever ``kept``, which is in the order of ``order``, is false."""
    mask = mx.put_along_axis(mx.zeros(logprobs.shape, mx.bool_), order, kept, axis=-1)
    return mx.where(mask, logprobs, -mx.inf)


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        flag = "--" + name.replace("_", "-")
        raise RequestError(f"{name} ({flag}) should be {expected}, but is {value}")
