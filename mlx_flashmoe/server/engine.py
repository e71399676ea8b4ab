"""From a request, whatever API it came by, to the worker, and its answer back."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mlx_flashmoe.chat_template import fit
from mlx_flashmoe.facts import UNKNOWN, Facts
from mlx_flashmoe.grammar import Constrainer
from mlx_flashmoe.sampling import LogitsProcessor, Sampler, picking
from mlx_flashmoe.scoring import TokenInfo
from mlx_flashmoe.server.errors import ApiError, as_api_error
from mlx_flashmoe.server.worker import End, Job, Part, Worker
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import Piece, Text, answer_parser, pieces

# Seconds after which a silent stream gets an event that clients count: a long prompt can take minutes, and clients
# give up, or warn their users, after 20 seconds and more.
KEEP_ALIVE = 5.0


@dataclass
class Ask:
    """What a request asks for, by the names of no API.

    Attributes:
        messages: a conversation, as chat templates take it (``chat_template.fit`` makes it fit this one); or None.
        continues: the last message is the model's own, and the answer continues it.
        prompt: text or tokens to continue; or None.
        template: variables of the chat template.
        template_default: the same, where neither the request nor the server's user says.
        tools: what may be called.
        loaded: more that may be called, of which the messages tell and not the template's list.
        left_out: tools that were offered and that this server cannot offer, by kind.
        required: the answer is a call, of one of these tools; without it, None.
        several: it may be several calls.
        schema: the answer is JSON of this schema; None for no such wish.
        sampling: arguments of ``picking`` that were given.
        max_tokens: None for as many as there is room for.
        echo: the answer begins with the prompt.
    """

    messages: list[dict[str, Any]] | None = None
    continues: bool = False
    prompt: str | list[int] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    template_default: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    required: list[dict[str, Any]] | None = None
    several: bool = True
    schema: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: bool = False


_RESERVED = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "on_text",
    "self",
}


class Engine:
    """Prepares requests and gives them to the worker.

    Args:
        name: of the model, as the APIs show it.
        sampling: what a request that says nothing is sampled with.
        template: variables of the chat template for requests that do not say.
    """

    def __init__(
        self, worker: Worker, name: str, sampling: dict[str, Any], template: dict[str, Any] | None = None
    ) -> None:
        self.worker = worker
        self.name = name
        self._sampling = sampling
        self._template = template or {}
        self._constrainer: Constrainer | None = None
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.worker.tokenizer

    @property
    def facts(self) -> Facts:
        return getattr(self.worker.model, "facts", UNKNOWN)

    def tokens(self, ask: Ask) -> list[int]:
        """The prompt. Raises RequestError for messages that the template refuses."""
        if ask.messages is not None:
            if taken := _RESERVED & ask.template.keys():
                raise ApiError(400, f"chat_template_kwargs: {min(taken)} cannot be set")
            tools = ask.tools or None
            return self.tokenizer.apply_chat_template(
                fit(ask.messages, self.tokenizer.chat_template(tools)),
                tools,
                continue_final_message=ask.continues,
                **{**ask.template_default, **self._template, **ask.template},
            )
        if isinstance(ask.prompt, str):
            return self.tokenizer.encode(ask.prompt)
        return list(ask.prompt or [])

    def prepare(self, ask: Ask) -> Job:
        """Everything that takes time or can be wrong, so that a job in the queue can only succeed.

        May take a second: not for the event loop.

        Raises:
            RequestError, ApiError: the request cannot be served as it is.
        """
        self.worker.metrics.left_out(ask.left_out)
        if self.worker.full:
            raise self._refusal()
        prompt = self.tokens(ask)
        vocabulary = self.worker.model.vocab_size
        if not prompt:
            raise ApiError(400, "the prompt is empty")
        if not all(0 <= token < vocabulary for token in prompt):
            raise ApiError(400, f"the prompt has token ids outside 0 to {vocabulary - 1}")
        max_tokens = self._room(len(prompt), ask.max_tokens)
        sampler, processors = self._picking(ask.sampling)
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
            sampler=sampler,
            processors=processors,
            parser=None
            if ask.messages is None
            else answer_parser(self.tokenizer, [*ask.tools, *ask.loaded], prompt),
            stop=ask.stop,
            top_logprobs=ask.top_logprobs,
            echo=(ask.prompt if isinstance(ask.prompt, str) else self.tokenizer.decode(prompt))
            if ask.echo
            else None,
        )

    def _picking(self, asked: dict[str, Any]) -> tuple[Sampler, list[LogitsProcessor]]:
        vocabulary = self.worker.model.vocab_size
        for token in asked.get("logit_bias", ()):
            if token >= vocabulary:
                raise ApiError(400, f"logit_bias: {token} is not a token id: they are 0 to {vocabulary - 1}")
        return picking(**{**self._sampling, **asked})

    def _room(self, prompt: int, wanted: int | None) -> int:
        """The number of tokens an answer may have: as many as are wanted, or as the context has left."""
        most = self.worker.model.max_context
        if prompt + (1 if wanted is None else min(wanted, 1)) > most:
            raise ApiError(
                400,
                f"a prompt of {prompt} tokens and an answer do not fit into the context of {most} tokens",
                code="context_length_exceeded",
            )
        return most - prompt if wanted is None else min(wanted, most - prompt)

    def _constraints(self) -> Constrainer:
        with self._lock:
            if self._constrainer is None:
                self._constrainer = Constrainer(self.tokenizer, self.worker.model.vocab_size)
            return self._constrainer

    def submit(self, job: Job, follows: bool = False) -> Answer:
        """Raises ApiError, status 429, if the queue is full.

        Args:
            follows: the job is one more answer to a request that had a place in the queue, and needs none.
        """
        answer = Answer(self.worker, job)
        if not self.worker.submit(job, follows):
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

    async def parts(self, request: Request) -> AsyncGenerator[Part | End, None]:
        """Parts as they come, the End last.

        When the client goes away, the answer ends.

        Raises:
            ApiError: it failed.
        """
        request.scope.setdefault("flashmoe.jobs", []).append(self.job)  # for the log
        watch = asyncio.create_task(self._watch(request))
        try:
            while True:
                part = await self._parts.get()
                if isinstance(part, End) and part.error is not None:
                    raise as_api_error(part.error)
                yield part
                if isinstance(part, End):
                    return
        finally:
            watch.cancel()
            self._worker.cancel(self.job)

    async def whole(self, request: Request) -> tuple[list[Piece], list[TokenInfo], End]:
        """All parts at once; a call that is not complete is text. Raises ApiError."""
        events: list[Piece] = []
        infos: list[TokenInfo] = []
        end = End("stop")
        async with aclosing(self.parts(request)) as parts:
            async for part in parts:
                if isinstance(part, End):
                    end = part
                    events += [Text(end.cut)] if end.cut else []
                else:
                    events += pieces(part.events)
                    infos += [part.info] if part.info is not None else []
        return events, infos, end

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._worker.cancel(self.job)
        self._parts.put_nowait(End("stop"))  # a job that waited says nothing any more
