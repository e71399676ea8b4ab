"""The token loop: a prompt in, text out. Functions have the shapes of mlx-lm's of the same names."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.prefix_cache import PrefixCache
from mlx_flashmoe.sampling import LogitsProcessor, Sampler, make_sampler
from mlx_flashmoe.sizes import counted
from mlx_flashmoe.tokenizer import Tokenizer

PREFILL_STEP_SIZE = 2048


@dataclass
class GenerationResponse:
    """One step of :func:`stream_generate`.

    Attributes:
        text: the next piece of text; may be "".
        token: the token it came from; the last one may be a token that ends the answer, which has no text.
        logprobs: [V], the log-probabilities the token was picked from, before the sampler's filters.
        prompt_tokens: number of tokens in the prompt.
        cached_tokens: of these, how many a ``prefix_cache`` had.
        prompt_tps: prompt tokens per second, those that the cache had left out.
        generation_tokens: tokens generated so far, this one included.
        generation_tps: generated tokens per second so far.
        peak_memory: of the MLX allocator so far, in GB (1e9 bytes).
        finish_reason: "stop" at an end token, "length" at ``max_tokens`` or where the model's context is full,
            None before the last step.
    """

    text: str
    token: int
    logprobs: mx.array
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: Literal["stop", "length"] | None = None
    cached_tokens: int = 0


def check_counts(max_tokens: int, prefill_step_size: int | None) -> None:
    """Raises RequestError for a count out of range."""
    if max_tokens < -1 or max_tokens == 0:
        raise RequestError(
            f"max_tokens (--max-tokens) should be at least 1, or -1 for no limit, but is {max_tokens}"
        )
    if prefill_step_size is not None and prefill_step_size < 1:
        raise RequestError(
            f"prefill_step_size (--prefill-step-size) should be at least 1, but is {prefill_step_size}"
        )


def answer_room(model: Any, prompt: int, max_tokens: int) -> int:
    """``max_tokens`` of an answer to a prompt of so many tokens, or fewer, where the model's context ends; -1: no end.

    Raises:
        RequestError: the prompt leaves no room for an answer.
    """
    most = getattr(model, "max_context", None)
    if most is None:
        return max_tokens
    if prompt >= most:
        made_for = getattr(model, "context_length", None) or most
        memory = (
            f", or give less --expert-memory: the model was made for {made_for}" if most < made_for else ""
        )
        raise RequestError(
            f"a prompt of {prompt} tokens and an answer do not fit into the context of {most} tokens; "
            f"shorten the prompt{memory}"
        )
    return most - prompt if max_tokens == -1 else min(max_tokens, most - prompt)


def cut_off(response: GenerationResponse, max_tokens: int) -> str | None:
    """What to say of an answer whose last step this is, if it was not the model that ended it."""
    if response.finish_reason != "length":
        return None
    if response.generation_tokens == max_tokens:
        return f"the answer was cut off after {counted(max_tokens, 'token')} (--max-tokens)"
    context = response.prompt_tokens + response.generation_tokens
    return f"the answer was cut off: the context of {context} tokens is full"


def prefill(
    model: Any,
    tokens: mx.array,
    cache: list[Any],
    step_size: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fills ``cache`` with tokens [N], in chunks; their logits, [N, V] floats, are never computed.

    Args:
        progress: called with the tokens done, after each chunk; and, where the model tells of its layers, in
            between: a chunk of which half the layers are done counts as half its tokens.
    """
    read = getattr(model, "read", model)
    for start in range(0, tokens.size, step_size):
        stop = min(start + step_size, tokens.size)
        with layers_told(model, start, stop, progress):
            read(tokens[None, start:stop], cache)
            mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if progress is not None:
            progress(stop)


@contextmanager
def layers_told(model: Any, start: int, stop: int, progress: Callable[[int], None] | None) -> Iterator[None]:
    """Calls ``progress`` with tokens done, from ``start`` to ``stop``, as the layers of one call are done."""
    tell = getattr(model, "on_prefill_layer", None)
    if tell is None or progress is None:
        yield
        return
    tell(lambda done, layers: progress(start + (stop - start) * done // layers))
    try:
        yield
    finally:
        tell(None)


def generate_step(
    prompt: mx.array,
    model: Any,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: list[Any] | None = None,
    prompt_read: int = 0,
    prefix_cache: PrefixCache | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """Generates token ids.

    Args:
        prompt: [N] token ids.
        model: ``model(tokens [1, T], cache) -> logits [1, T, V]``, with ``make_cache()``.
        max_tokens: stop after this many; -1 stops where the model's context is full, if it has one
            (``model.max_context``). No answer goes on beyond it.
        sampler: log-probabilities [1, V] -> token [1]; the most likely token by default.
        logits_processors: (tokens so far [N], logits [1, V]) -> logits [1, V], in this order.
        prompt_cache: from ``model.make_cache()``, with what came before the prompt; updated in place.
        prompt_read: tokens of the prompt that ``prompt_cache`` has too; not all.
        prefix_cache: of this model. Goes on from the longest prefix of the prompt that was kept, and keeps the
            prompt's messages and the answer. Not together with ``prompt_cache``.
        prefill_step_size: prompt tokens in one call of the model; more are faster and take more memory. If None,
            what the model's memory plan allows for (``model.prefill_chunk``).
        prompt_progress_callback: called with (prompt tokens done, prompt tokens).

    Yields:
        (token, log-probabilities [V]).

    Raises:
        RequestError: an empty prompt, one that does not fit into the context, or a count out of range.
    """
    if prompt.size == 0:
        raise RequestError("the prompt is empty; give at least one token")
    check_counts(max_tokens, prefill_step_size)
    vocabulary = getattr(model, "vocab_size", None)
    # On some devices a token beyond the embedding table reads whatever lies there.
    if vocabulary is not None and bool(mx.any((prompt < 0) | (prompt >= vocabulary)).item()):
        raise RequestError(f"the prompt has token ids outside 0 to {vocabulary - 1}, the model's vocabulary")
    if prefill_step_size is None:
        prefill_step_size = getattr(model, "prefill_chunk", PREFILL_STEP_SIZE)
    if prompt_cache is not None and prefix_cache is not None:
        raise ValueError("prompt_cache and prefix_cache cannot be used together")
    max_tokens = answer_room(model, prompt.size - prompt_read + _seen(prompt_cache), max_tokens)
    cache = model.make_cache() if prompt_cache is None else prompt_cache
    sampler = sampler or make_sampler()
    progress = prompt_progress_callback or (lambda done, total: None)
    total = prompt.size

    done = prompt_read

    def read_to(stop: int) -> None:
        nonlocal done
        start, done = done, stop
        prefill(
            model, prompt[start:stop], cache, prefill_step_size, lambda count: progress(start + count, total)
        )

    ids: list[int] = []
    if prefix_cache is not None:
        ids = prompt.tolist()  # type: ignore[assignment]
        done = prefix_cache.restore(ids, cache)
    progress(done, total)
    if prefix_cache is not None:
        for cut in prefix_cache.cuts(ids, done):
            read_to(cut)
            prefix_cache.keep(ids[:cut], cache)
    read_to(total - 1)  # the last token's logits are wanted: it goes through the model by itself

    tokens = prompt  # so far; only what logits processors look at
    for processor in logits_processors or ():
        if (begin := getattr(processor, "begin", None)) is not None:
            begin(total)

    def step(inputs: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal tokens
        logits = model(inputs[None], cache)[:, -1, :].astype(mx.float32)
        for processor in logits_processors or ():
            logits = processor(tokens, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = sampler(logprobs)
        if logits_processors:
            tokens = mx.concatenate([tokens, token.astype(tokens.dtype)])
        mx.async_eval(token, logprobs)
        return token, logprobs

    # With all experts in memory a step is one lazy graph: the next one is built while the GPU works on this one.
    # Not for a cache that outlives the call: it would be left one token ahead of what was generated.
    ahead = bool(getattr(model, "resident", False)) and prompt_cache is None
    current = step(prompt[-1:])
    answer: list[int] = []
    while True:
        last = len(answer) + 1 == max_tokens
        # Not before the first token is out: the second would be done when its clock starts.
        following = step(current[0]) if ahead and answer and not last else None
        token = current[0].item()
        assert isinstance(token, int)
        answer.append(token)
        if len(answer) == 1:
            progress(total, total)
        if len(answer) % 256 == 0:
            mx.clear_cache()
        try:
            yield token, current[1][0]
        except GeneratorExit:
            last = True
        if last:
            if prefix_cache is not None:
                # The last token has not been through the model, unless the step after it is under way.
                through = answer if following is not None else answer[:-1]
                # Not on disk: after a restart a conversation goes on from its last prompt.
                prefix_cache.keep([*ids, *through], cache, on_disk=False)
            return
        current = following or step(current[0])


def _seen(prompt_cache: list[Any] | None) -> int:
    """Tokens before the prompt."""
    return max((layer.offset for layer in prompt_cache or ()), default=0)


def stream_generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generates text, a token at a time. Closing the generator at any point is fine.

    Args:
        prompt: text, taken as it is (see ``tokenizer.apply_chat_template``), or token ids.
        max_tokens: stop after this many tokens; -1: only at an end token, or where the context is full.
        kwargs: see :func:`generate_step`.

    Yields:
        GenerationResponse: one a token; the texts joined are the answer. The last has a ``finish_reason``.

    Raises:
        RequestError: an empty prompt, one that does not fit into the context, or a count out of range.
    """
    if isinstance(prompt, str):
        # A prompt that was rendered from a template may begin with the first token already.
        whole = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=not whole)
    ids = prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), mx.int32)
    detokenizer = tokenizer.detokenizer
    start = time.perf_counter()
    prompt_seconds, cached = 0.0, 0
    prefix_cache: PrefixCache | None = kwargs.get("prefix_cache")
    check_counts(max_tokens, kwargs.get("prefill_step_size"))
    seen = _seen(kwargs.get("prompt_cache")) - kwargs.get("prompt_read", 0)
    max_tokens = answer_room(model, ids.size + seen, max_tokens)
    steps = generate_step(ids, model, max_tokens=max_tokens, **kwargs)
    with closing(steps):
        for count, (token, logprobs) in enumerate(steps, 1):
            now = time.perf_counter()
            if count == 1:
                # The prompt's time includes the first token, which comes out of it; later tokens are timed from there.
                prompt_seconds, start = now - start, now
                cached = prefix_cache.restored if prefix_cache is not None else 0
            text = ""
            finish: Literal["stop", "length"] | None = None
            if token in tokenizer.eos_token_ids:
                finish = "stop"
            else:
                text = detokenizer.add_token(token)
                finish = "length" if count == max_tokens else None
            if finish:
                text += detokenizer.finalize()
            yield GenerationResponse(
                text=text,
                token=token,
                logprobs=logprobs,
                prompt_tokens=ids.size,
                prompt_tps=(ids.size - cached) / prompt_seconds,
                generation_tokens=count,
                generation_tps=(count - 1) / (now - start) if count > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish,
                cached_tokens=cached,
            )
            if finish:
                return


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """The whole answer to a prompt.

    Args:
        verbose: print the text as it comes, and the figures after it.
        kwargs: see :func:`stream_generate` and :func:`generate_step`.

    Raises:
        RequestError: an empty prompt, one that does not fit into the context, or a value out of range.
    """
    pieces = []
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
            if response.finish_reason:
                print(
                    f"\nPrompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s"
                    f"\nGeneration: {response.generation_tokens} tokens, {response.generation_tps:.2f} tokens/s"
                    f"\nPeak memory: {response.peak_memory:.2f} GB"
                )
    return "".join(pieces)
