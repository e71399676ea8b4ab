"""From logits to the next token: penalties, filters and the draw. Names and order are mlx-lm's.

Filters apply to the model's own distribution: top-p, then min-p, then top-k, and the temperature last, to what
is left. (transformers applies the temperature first; at temperature 1 the two agree but for the order.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_flashmoe.errors import RequestError

Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities [..., V] -> tokens [...]."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""(tokens so far [N], logits [1, V]) -> logits [1, V]. A ``begin`` method, if there is one, is told of each answer."""


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
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    *,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
) -> list[LogitsProcessor]:
    """The changes to the logits before a token is picked, in the order in which they apply.

    Args:
        repetition_penalty: divides positive logits of recent tokens and multiplies negative ones (Keskar et al.
            2019, https://arxiv.org/abs/1909.05858). None, 0 and 1: off.
        repetition_context_size: how many of the last tokens, of the prompt and the answer, count as recent; -1
            for all of them.
        presence_penalty: subtracted from the logit of a token that the answer has, the prompt not included. 0: off.
        frequency_penalty: subtracted once per occurrence of the token in the answer. 0: off.
        logit_bias: token id -> number added to its logit. -100 bans a token, 100 allows no other.

    Raises:
        RequestError: a value out of range; the message names it and its flag.
    """
    penalty = repetition_penalty or 1.0
    _check("repetition_penalty", penalty, penalty > 0 and math.isfinite(penalty), "a number of at least 0")
    _check(
        "repetition_context_size",
        repetition_context_size,
        repetition_context_size > 0 or repetition_context_size == -1,
        "a whole number of at least 1, or -1 for the whole context",
    )
    for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
        _check(name, value, math.isfinite(value), "a number")
    processors: list[LogitsProcessor] = []
    if logit_bias:
        processors.append(_biases(logit_bias))
    if penalty != 1:
        processors.append(_repetition(penalty, repetition_context_size))
    if presence_penalty or frequency_penalty:
        processors.append(AnswerPenalty(presence_penalty, frequency_penalty))
    return processors


def picking(
    *,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    **sampler: Any,
) -> tuple[Sampler, list[LogitsProcessor]]:
    """The sampler and the logits processors of one set of arguments.

    Args:
        sampler: arguments of :func:`make_sampler`; the others are those of :func:`make_logits_processors`.

    Raises:
        RequestError: a value out of range; the message names it and its flag.
    """
    processors = make_logits_processors(
        repetition_penalty,
        repetition_context_size,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
    )
    return make_sampler(**sampler), processors


def _biases(biases: Mapping[int, float]) -> LogitsProcessor:
    tokens = mx.array(list(biases), mx.int32)
    values = mx.array(list(biases.values()), mx.float32)

    def bias(_: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, tokens].add(values.astype(logits.dtype))

    return bias


def _repetition(penalty: float, window: int) -> LogitsProcessor:
    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = mx.array(tokens)[None]
        recent = recent if window == -1 else recent[:, -window:]
        seen = mx.take_along_axis(logits, recent, axis=-1)
        return mx.put_along_axis(logits, recent, mx.where(seen < 0, seen * penalty, seen / penalty), axis=-1)

    return penalize


class AnswerPenalty:
    """OpenAI's presence and frequency penalties: they count the tokens of the answer, never those of the prompt."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt = 0

    def begin(self, prompt_tokens: int) -> None:
        """An answer begins, after a prompt of ``prompt_tokens``. The token loop calls this before the first step."""
        self._prompt = prompt_tokens

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        answer = tokens[self._prompt :]
        if answer.size == 0:
            return logits
        counts = mx.zeros((logits.shape[-1],), logits.dtype).at[answer].add(1)
        return logits - self._frequency * counts - self._presence * (counts > 0)


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
