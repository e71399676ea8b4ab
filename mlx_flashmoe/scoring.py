"""The likelihood of given tokens: what a model expects after each of them, a few rows of its vocabulary at a time.

The log-probabilities of a long text, [tokens, vocabulary] in float32, can be larger than the model. So one call reads
many tokens, because experts are read once per call, and its output becomes log-probabilities in small pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_flashmoe.generate import layers_told

PIECE_BYTES = 32 * 2**20  # of log-probabilities at a time


@dataclass(frozen=True)
class TokenInfo:
    """A token and its likelihood.

    Attributes:
        logprob: natural logarithm of its probability; None for the first token of a text.
        top: the most likely tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


def row_logprobs(model: Any, tokens: mx.array, cache: list[Any]) -> Iterator[mx.array]:
    """Log-probabilities of what follows each token, by one call of the model.

    Args:
        tokens: [N] token ids.
        cache: of ``model.make_cache()``; updated.

    Yields:
        [R, V] float32, N rows in all, in order; at most ``PIECE_BYTES`` at a time.
    """
    # A model that has no parts of its own gives logits at once.
    read, head = getattr(model, "read", model), getattr(model, "head", lambda logits: logits)
    hidden = read(tokens[None], cache)
    mx.eval(hidden, [layer.state for layer in cache])
    rows = max(1, PIECE_BYTES // (4 * getattr(model, "vocab_size", hidden.shape[-1])))
    for start in range(0, tokens.size, rows):
        logits = head(hidden[:, start : start + rows])[0].astype(mx.float32)
        yield logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def token_infos(logprobs: mx.array, tokens: mx.array, top: int) -> list[TokenInfo]:
    """The likelihood of one token per row.

    Args:
        logprobs: [R, V].
        tokens: [R] token ids.
        top: number of a row's most likely tokens to return.
    """
    own: Any = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0].tolist()
    best: list[Any] = [[] for _ in own]
    if top := min(top, logprobs.shape[-1]):
        places = mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top]
        ids: Any = places.tolist()
        values: Any = mx.take_along_axis(logprobs, places, axis=-1).tolist()
        best = [sorted(zip(i, v), key=lambda pair: (-pair[1], pair[0])) for i, v in zip(ids, values)]
    ids = tokens.tolist()
    return [TokenInfo(*row) for row in zip(ids, own, best)]


def prompt_infos(
    model: Any,
    prompt: list[int],
    cache: list[Any],
    top: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[TokenInfo]:
    """The likelihood of every token of a prompt. All but the last token are then in the cache.

    Args:
        prompt: token ids, at least one.
        cache: of ``model.make_cache()``, empty; updated.
        top: number of most likely tokens to return, per token.
        progress: see :func:`mlx_flashmoe.generate.prefill`.
    """
    yield TokenInfo(prompt[0], None, [])
    tokens, step = mx.array(prompt, mx.int32), getattr(model, "prefill_chunk", 2048)
    for start in range(0, len(prompt) - 1, step):
        stop = min(start + step, len(prompt) - 1)
        following = tokens[start + 1 : stop + 1]
        with layers_told(model, start, stop, progress):
            for logprobs in row_logprobs(model, tokens[start:stop], cache):
                yield from token_infos(logprobs, following[: len(logprobs)], top)
                following = following[len(logprobs) :]
        mx.clear_cache()
        if progress is not None:
            progress(stop)
