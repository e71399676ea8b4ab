"""The one thread that has the model: it takes requests from a bounded queue and generates for one at a time.

MLX evaluates an array only on the thread that made it, so the model is loaded on this thread too. Requests come
from the event loop of the HTTP server, and what is generated goes back to it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.generate import GenerationResponse, stream_generate
from mlx_flashmoe.prefix_cache import PrefixCache
from mlx_flashmoe.sampling import LogitsProcessor, Sampler
from mlx_flashmoe.scoring import TokenInfo, prompt_infos, token_infos
from mlx_flashmoe.server.errors import ApiError
from mlx_flashmoe.server.metrics import Metrics
from mlx_flashmoe.server.stops import StopFinder
from mlx_flashmoe.system import keep_awake
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import AnswerParser, Event, Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What one token has settled of an answer, or the end of it."""

    events: list[Event]
    info: TokenInfo | None = None


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        reason: "stop" at an end token or a stop sequence, "length" at the last token there was room for.
        stop_sequence: the one that was met.
        cached_tokens: of the prompt, that were kept from before.
        cut: a call that was begun and is not complete, as the model wrote it. A stream has sent part of it.
        error: if it failed.
    """

    reason: Literal["stop", "length"]
    stop_sequence: str | None = None
    generated_tokens: int = 0
    cached_tokens: int = 0
    cut: str = ""
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """One answer to be generated.

    Attributes:
        prompt: token ids.
        max_tokens: of the answer.
        parser: tells what the answer's text is; if None, it is text.
        stop: sequences that end the answer where they begin, if they occur in its text.
        top_logprobs: how many of the most likely tokens to tell of; None for no log-probabilities at all.
        echo: the prompt's text, sent before the answer, with the likelihood of its tokens if there is any; or None.
        generated, cached: tokens so far: of the answer, and of the prompt those kept from before.
        prompt_seconds, answer_seconds: the model's time to the first token, and after it.
        given_up: the client did not wait for its end.
        hits, misses: routed experts that were in memory, and that were not.
        emit: is given Parts and then one End, on the worker's thread; set by the receiver.
    """

    prompt: list[int]
    max_tokens: int
    sampler: Sampler
    processors: Sequence[LogitsProcessor]
    parser: AnswerParser | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: str | None = None
    emit: Callable[[Part | End], None] = lambda part: None
    generated: int = 0
    cached: int = 0
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0
    given_up: bool = False
    hits: int = 0
    misses: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Cancelled(Exception):
    """Nobody waits for the answer any more."""


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping")


class Worker:
    """Loads a model and answers requests.

    Args:
        load: gives the model and its tokenizer. Called on the worker's own thread.
        queue_size: requests that may wait while one is answered.
        make_prefix_cache: what keeps the states of prompts, if anything does; called with the model and the
            tokenizer, on the worker's thread.

    Attributes:
        model, tokenizer: what was loaded, after ``start``.
        metrics: counts what it does.
    """

    model: Any
    tokenizer: Tokenizer

    def __init__(
        self,
        load: Callable[[], tuple[Any, Tokenizer]],
        queue_size: int,
        metrics: Metrics,
        make_prefix_cache: Callable[[Any, Tokenizer], PrefixCache | None] = lambda model, tokenizer: None,
    ) -> None:
        self._load = load
        self._queue_size = queue_size
        self.metrics = metrics
        self._make_prefix_cache = make_prefix_cache
        self._prefix_cache: PrefixCache | None = None
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None

    def start(self) -> None:
        """Returns when the model is loaded. Raises what loading raises."""
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def stop(self) -> None:
        """Gives up every answer, and takes no more. Returns at once."""
        with self._changed:
            self._closed = True
            given_up, self._waiting = list(self._waiting), deque()
            if self._current is not None:
                self._current.cancelled.set()
            self._changed.notify()
        for job in given_up:
            job.emit(End("stop", error=_stopping()))

    def close(self) -> None:
        """Stops, and returns when the thread has ended."""
        self.stop()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return self._current is not None

    @property
    def full(self) -> bool:
        """There is no place in the queue. One that can begin at once needs none."""
        return self._closed or len(self._waiting) >= self._queue_size + (self._current is None)

    @property
    def retry_after(self) -> int:
        """Whole seconds after which there may be a place, going by how long answers took so far."""
        return max(1, min(60, round(self.metrics.mean_seconds)))

    def submit(self, job: Job, follows: bool = False) -> bool:
        """Puts a request into the queue, if it is not full.

        Args:
            follows: the job is one more answer to a request that has had its turn: it comes first, in any case.
        """
        with self._changed:
            if self._closed or (self.full and not follows):
                return False
            if follows:
                self._waiting.appendleft(job)
            else:
                self._waiting.append(job)
            self._changed.notify()
            return True

    def cancel(self, job: Job) -> None:
        """Ends a request: at once if it waits, else before its next token. Nothing happens if it is done."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.given_up = True

    # On the thread

    def _run(self) -> None:
        try:
            self.model, self.tokenizer = self._load()
            self._prefix_cache = self._make_prefix_cache(self.model, self.tokenizer)
        except BaseException as e:
            self._load_error = e
            return
        finally:
            self._loaded.set()
        while (job := self._next()) is not None:
            self._answer(job)

    def _next(self) -> Job | None:
        with self._changed:
            self._current = None
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _answer(self, job: Job) -> None:
        start, before = time.perf_counter(), self.model.stats()
        try:
            with keep_awake():
                end = self._generate(job)
        except _Cancelled:
            job.given_up = True
            end = End("stop", error=_stopping() if self._closed else None)
        except FlashMoEError as e:
            end = End("stop", error=e)
        except Exception as e:
            log.exception("an answer failed")
            end = End("stop", error=e)
        # An answer that was given up counts as far as it came.
        seconds, after = time.perf_counter() - start, self.model.stats()
        if not job.generated:
            job.prompt_seconds = seconds
        job.answer_seconds = seconds - job.prompt_seconds
        job.hits, job.misses = after.hits - before.hits, after.misses - before.misses
        self.metrics.answered(len(job.prompt), job.cached, job.generated, seconds)
        job.emit(end)

    def _generate(self, job: Job) -> End:
        def check(*_: int) -> None:
            if job.cancelled.is_set():
                raise _Cancelled

        check()
        start = time.perf_counter()
        self.model.reserve(len(job.prompt) + job.max_tokens)
        stops = StopFinder(job.stop)
        known = self._echo(job, check)
        if job.max_tokens == 0:
            return End("length")
        responses = stream_generate(
            self.model,
            self.tokenizer,
            job.prompt,
            max_tokens=job.max_tokens,
            sampler=job.sampler,
            logits_processors=job.processors,
            prompt_progress_callback=check,
            **known,
        )
        with closing(responses):
            for response in responses:
                job.generated, job.cached = response.generation_tokens, response.cached_tokens
                job.prompt_seconds = job.prompt_seconds or time.perf_counter() - start
                check()
                events = self._events(job, response)
                if response.finish_reason and job.parser is not None:
                    events += job.parser.finish()
                events, stop = stops.feed(events, last=response.finish_reason is not None)
                job.emit(Part(events, self._info(job, response)))
                if stop is not None or response.finish_reason is not None:
                    return End(
                        "stop" if stop is not None else response.finish_reason or "stop",
                        stop,
                        response.generation_tokens,
                        response.cached_tokens,
                        "" if job.parser is None or stop is not None else job.parser.cut_text,
                    )
        raise AssertionError("an answer has a last token")

    def _echo(self, job: Job, check: Callable[[int], None]) -> dict[str, Any]:
        """Sends the prompt, if the job wants it. Returns what the token loop then need not read again."""
        known: dict[str, Any] = {"prefix_cache": self._prefix_cache}
        if job.echo is None:
            return known
        if job.top_logprobs is not None:
            # Kept states would leave out tokens whose likelihood is wanted.
            cache = self.model.make_cache()
            for info in prompt_infos(self.model, job.prompt, cache, job.top_logprobs, check):
                job.emit(Part([], info))
            known = {"prompt_cache": cache, "prompt_read": len(job.prompt) - 1}
        job.emit(Part([Text(job.echo)]))
        return known

    def _events(self, job: Job, response: GenerationResponse) -> list[Event]:
        if job.parser is not None:
            return job.parser.feed(response.text, response.token)
        return [Text(response.text)] if response.text else []

    def _info(self, job: Job, response: GenerationResponse) -> TokenInfo | None:
        if job.top_logprobs is None:
            return None
        return token_infos(response.logprobs[None], mx.array([response.token]), job.top_logprobs)[0]
