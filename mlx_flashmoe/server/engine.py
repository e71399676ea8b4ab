"""From a request, whatever API it came by, to the worker, and its answer back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mlx_flashmoe.grammar import Constrainer
from mlx_flashmoe.sampling import make_logits_processors, make_sampler
from mlx_flashmoe.server.errors import ApiError, as_api_error
from mlx_flashmoe.server.worker import End, Job, Part, TokenInfo, Worker
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import Event, answer_parser

# Seconds without a token after which a stream gets a sign of life: a long prompt can take minutes.
KEEP_ALIVE = 10.0


@dataclass
class Ask:
    """What a request asks for, by the names of no API.

    Attributes:
        messages: a conversation, as the chat template takes it; or None.
        prompt: text or tokens to continue; or None.
        template: variables of the chat template.
        tools: what may be called.
        required: the answer is a call, of one of these tools; without it, None.
        several: it may be several calls.
        schema: the answer is JSON of this schema; None for no such wish.
        sampling: arguments of ``make_sampler`` and ``make_logits_processors`` that were given.
        max_tokens: None for as many as there is room for.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    required: list[dict[str, Any]] | None = None
    several: bool = True
    schema: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None


class Engine:
    """Prepares requests and gives them to the worker.

    Args:
        name: of the model, as the APIs show it.
        sampling: what a request that says nothing is sampled with.
    """

    def __init__(self, worker: Worker, name: str, sampling: dict[str, Any]) -> None:
        self.worker = worker
        self.name = name
        self._sampling = sampling
        self._constrainer: Constrainer | None = None
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.worker.tokenizer

    def tokens(self, ask: Ask) -> list[int]:
        """The prompt. Raises RequestError for messages that the template refuses."""
        if ask.messages is not None:
            if (
                taken := {"messages", "tools", "add_generation_prompt", "tokenize", "self"}
                & ask.template.keys()
            ):
                raise ApiError(400, f"chat_template_kwargs: {min(taken)} cannot be set")
            return self.tokenizer.apply_chat_template(ask.messages, ask.tools or None, **ask.template)
        if isinstance(ask.prompt, str):
            return self.tokenizer.encode(ask.prompt)
        return list(ask.prompt or [])

    def prepare(self, ask: Ask) -> Job:
        """Everything that takes time or can be wrong, so that a job in the queue can only succeed.

        May take a second: not for the event loop.

        Raises:
            RequestError, ApiError: the request cannot be served as it is.
        """
        if self.worker.full:
            raise self._refusal()
        prompt = self.tokens(ask)
        vocabulary = self.worker.model.vocab_size
        if not prompt:
            raise ApiError(400, "the prompt is empty")
        if not all(0 <= token < vocabulary for token in prompt):
            raise ApiError(400, f"the prompt has token ids outside 0 to {vocabulary - 1}")
        max_tokens = self._room(len(prompt), ask.max_tokens)
        sampling = {**self._sampling, **ask.sampling}
        processors = make_logits_processors(sampling.pop("repetition_penalty", None))
        thinking = ask.messages is not None and self.tokenizer.opens_thinking(prompt)
        if ask.required is not None or ask.schema is not None:
            # Last: no other change of the logits may bring back what the grammar forbids.
            constraint = self._constraints().constraint(
                max_tokens,
                tools=ask.required if ask.required is not None else ask.tools,
                several=ask.several,
                schema=None if ask.required is not None else ask.schema,
                thinking=thinking,
            )
            processors = [*processors, constraint]
        return Job(
            prompt=prompt,
            max_tokens=max_tokens,
            sampler=make_sampler(**sampling),
            processors=processors,
            parser=None if ask.messages is None else answer_parser(self.tokenizer, ask.tools, prompt),
            stop=ask.stop,
            top_logprobs=ask.top_logprobs,
        )

    def _room(self, prompt: int, wanted: int | None) -> int:
        """The number of tokens an answer may have."""
        most = self.worker.model.max_context
        if prompt + (wanted or 1) > most:
            answer = "" if wanted is None else f" and an answer of up to {wanted}"
            raise ApiError(
                400,
                f"a prompt of {prompt} tokens{answer} does not fit into the context of {most} tokens",
                code="context_length_exceeded",
            )
        return int(wanted or most - prompt)  # 5.0 is an integer to JSON

    def _constraints(self) -> Constrainer:
        with self._lock:
            if self._constrainer is None:
                self._constrainer = Constrainer(self.tokenizer, self.worker.model.vocab_size)
            return self._constrainer

    def submit(self, job: Job) -> Answer:
        """Raises ApiError, status 429, if the queue is full."""
        answer = Answer(self.worker, job)
        if not self.worker.submit(job):
            raise self._refusal()
        return answer

    def _refusal(self) -> ApiError:
        wait = str(self.worker.retry_after)
        message = "all places in the queue are taken; try again later"
        return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": wait})


class Answer:
    """An answer on its way, on the event loop's side."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self.job = job
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Part | End] = asyncio.Queue()
        job.emit = self._emit

    def _emit(self, part: Part | End) -> None:
        try:
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)
        except RuntimeError:  # the loop is closed, and nobody there
            self.job.cancelled.set()

    async def parts(self, request: Request) -> AsyncGenerator[Part | End | None, None]:
        """Parts as they come, the End last; None from time to time when nothing comes.

        When the client goes away, the answer ends.

        Raises:
            ApiError: it failed.
        """
        watch = asyncio.create_task(self._watch(request))
        try:
            while True:
                try:
                    part = await asyncio.wait_for(self._parts.get(), KEEP_ALIVE)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if isinstance(part, End) and part.error is not None:
                    raise as_api_error(part.error)
                yield part
                if isinstance(part, End):
                    return
        finally:
            watch.cancel()
            self._worker.cancel(self.job)

    async def whole(self, request: Request) -> tuple[list[Event], list[TokenInfo], End]:
        """All parts at once. Raises ApiError."""
        events: list[Event] = []
        infos: list[TokenInfo] = []
        end = End("stop")
        async with aclosing(self.parts(request)) as parts:
            async for part in parts:
                if isinstance(part, End):
                    end = part
                elif part is not None:
                    events += part.events
                    infos += [part.info] if part.info is not None else []
        return events, infos, end

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._worker.cancel(self.job)
        self._parts.put_nowait(End("stop"))  # a job that waited says nothing any more


def in_order_of_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the results of tools in the order of the calls: templates show them without their ids."""
    out: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    results: list[dict[str, Any]] = []
    for message in [*messages, {"role": ""}]:
        if message["role"] == "tool":
            results.append(message)
            continue
        out += sorted(results, key=lambda m: places.get(m.get("tool_call_id", ""), len(places)))
        results = []
        places = {call.get("id", ""): i for i, call in enumerate(message.get("tool_calls", []))}
        out.append(message)
    return out[:-1]
