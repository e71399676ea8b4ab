"""OpenAI's API: /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.scoring import TokenInfo
from mlx_flashmoe.server import settings
from mlx_flashmoe.server.engine import Answer, Ask, Engine
from mlx_flashmoe.server.errors import openai_body
from mlx_flashmoe.server.http import JSON, event, event_stream, read_body
from mlx_flashmoe.server.offered import Offered
from mlx_flashmoe.server.openai_messages import conversation
from mlx_flashmoe.server.schemas import VALIDATORS
from mlx_flashmoe.server.worker import End, Job, Part
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import CallDelta, CallStart, Event, Piece, Text, Thinking, ToolCall

UNLIKELY = -9999.0  # what stands for a log-probability of minus infinity


def _logprob(value: float | None) -> float | None:
    return None if value is None else max(value, UNLIKELY)


async def chat_completions(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["chat_completion"])
    return await _respond(request, body, [_chat_ask(body)], Chat)


async def completions(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["completion"])
    return await _respond(request, body, _completion_asks(body), Completion)


# Requests


def _chat_ask(body: dict[str, Any]) -> Ask:
    settings.check_supported(body)
    tools, choice = settings.tools(body)
    offered = Offered(tools)
    top_logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    return Ask(
        messages=conversation(body["messages"]),
        template=settings.thinking(body),
        tools=[] if choice == "none" else offered.tools,
        left_out=offered.left_out,
        required=required_tools(offered, choice),
        several=body.get("parallel_tool_calls", True) and not isinstance(choice, dict),
        schema=settings.answer_schema(body),
        sampling=settings.sampling(body),
        max_tokens=settings.max_tokens(body),
        stop=settings.stop(body),
        top_logprobs=None if top_logprobs is None else int(top_logprobs),
    )


def required_tools(offered: Offered, choice: Any) -> list[dict[str, Any]] | None:
    """The tools of which one has to be called, by ``tool_choice``."""
    if choice in ("required", "any"):
        return offered.required(None)
    if not isinstance(choice, dict):
        return None
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") or choice
        names = [tool["function"]["name"] for tool in Offered(allowed.get("tools")).tools]
        return offered.required(names) if allowed.get("mode") == "required" else None
    return offered.required([str((choice.get("function") or choice).get("name"))])


def _completion_asks(body: dict[str, Any]) -> list[Ask]:
    """One per prompt."""
    settings.check_supported(body)
    prompt, echo = body["prompt"], body.get("echo", False)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int | float)
    prompts = prompt if several else [prompt]
    settings.choices(body, len(prompts))  # before there are too many
    limited = any(body.get(field) is not None for field in settings.LENGTHS)
    ask = Ask(
        schema=settings.answer_schema(body),
        sampling=settings.sampling(body),
        # 16 is the API's own default.
        max_tokens=settings.max_tokens(body, 0 if echo else 1) if limited else 16,
        stop=settings.stop(body),
        top_logprobs=int(body["logprobs"]) if "logprobs" in body else None,
        echo=echo,
    )
    return [replace(ask, prompt=p if isinstance(p, str) else [int(token) for token in p]) for p in prompts]


def _repeated(asks: list[Ask], body: dict[str, Any]) -> list[Ask]:
    """As many of each as the request wants answers. A seed is another one for each of them."""
    count = settings.choices(body, len(asks))
    return [_numbered(ask, i) for ask in asks for i in range(count)]


def _numbered(ask: Ask, number: int) -> Ask:
    if number == 0:
        return ask
    sampling = ask.sampling
    if (seed := sampling.get("seed")) is not None:
        sampling = {**sampling, "seed": (seed + number) % 2**64}
    return replace(ask, sampling=sampling, left_out=Counter())  # tools that were left out count once


# Answers


class Shape:
    """How one of the two endpoints writes answers.

    Attributes:
        object, prefix: the names of an answer and of its id.
    """

    object: str
    prefix: str

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.finish_reason = "stop"

    def whole(self, events: list[Piece], infos: list[TokenInfo]) -> dict[str, Any]:
        """The one choice of an answer."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """Choices that a stream begins with."""
        return []

    def piece(self, event: Event) -> dict[str, Any] | None:
        """A choice of a stream for one event, if there is something to send."""
        raise NotImplementedError

    def closing(self) -> dict[str, Any]:
        """A choice of a stream with nothing more to say."""
        raise NotImplementedError

    def logprobs(self, infos: list[TokenInfo]) -> dict[str, Any]:
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


class Chat(Shape):
    object = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._calls = 0

    def whole(self, events: list[Piece], infos: list[TokenInfo]) -> dict[str, Any]:
        thinking = "".join(e.text for e in events if isinstance(e, Thinking))
        text = "".join(e.text for e in events if isinstance(e, Text))
        calls = [self._call(e) for e in events if isinstance(e, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message, "logprobs": self.logprobs(infos) if infos else None}

    def opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def piece(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, CallStart):
            self._calls += 1
            return self._of_call({"id": _call_id(), "type": "function"}, name=event.name, arguments="")
        if isinstance(event, CallDelta):
            return self._of_call({}, arguments=event.text)
        if isinstance(event, ToolCall):
            self.finish_reason = "tool_calls"
            return None
        return {"delta": {"reasoning_content" if isinstance(event, Thinking) else "content": event.text}}

    def _of_call(self, more: dict[str, Any], **function: str) -> dict[str, Any]:
        return {"delta": {"tool_calls": [{"index": self._calls - 1, **more, "function": function}]}}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self.finish_reason = "tool_calls"
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        return {"id": _call_id(), "type": "function", "function": function}

    def logprobs(self, infos: list[TokenInfo]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            return {
                "token": self._text(token),
                "logprob": _logprob(logprob),
                "bytes": list(self._tokenizer.token_bytes(token)),
            }

        content = [
            {**entry(info.token, info.logprob), "top_logprobs": [entry(t, v) for t, v in info.top]}
            for info in infos
        ]
        return {"content": content, "refusal": None}


class Completion(Shape):
    object = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._offset = 0

    def whole(self, events: list[Piece], infos: list[TokenInfo]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        return {"text": text, "logprobs": self.logprobs(infos) if infos else None}

    def piece(self, event: Event) -> dict[str, Any] | None:
        return {"text": event.text} if isinstance(event, Text) else None

    def closing(self) -> dict[str, Any]:
        return {"text": ""}

    def logprobs(self, infos: list[TokenInfo]) -> dict[str, Any]:
        texts = [self._text(info.token) for info in infos]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_logprob(info.logprob) for info in infos],
            "top_logprobs": [self._top(info) for info in infos],
            "text_offset": offsets,
        }

    def _top(self, info: TokenInfo) -> dict[str, float | None] | None:
        if info.logprob is None:
            return None
        top: dict[str, float | None] = {}
        for token, value in info.top:
            # Different tokens may have the same text: the likeliest of them counts.
            top.setdefault(self._text(token), _logprob(value))
        return top


async def _respond(
    request: Request, body: dict[str, Any], asks: list[Ask], shape_of: type[Shape]
) -> Response:
    engine: Engine = request.app.state.engine
    prompts, asks = len(asks), _repeated(asks, body)
    jobs = await run_in_threadpool(lambda: [engine.prepare(ask) for ask in asks])
    answers = _in_turn(request, engine, engine.submit(jobs[0]), jobs[1:])
    shapes = [shape_of(engine.tokenizer) for _ in jobs]
    head = {
        "id": f"{shape_of.prefix}-{secrets.token_hex(12)}",
        "object": shape_of.object,
        "created": int(time.time()),
        "model": engine.name,
    }
    each = len(asks) // prompts
    if body.get("stream"):
        if shape_of is Chat:
            head["object"] = "chat.completion.chunk"
        usage = (body.get("stream_options") or {}).get("include_usage")
        chunks = _chunks(request, answers, shapes, head, each if usage else None)
        idle = {"index": 0, **shapes[0].closing(), "logprobs": None, "finish_reason": None}
        return event_stream(
            chunks, lambda error: event(openai_body(error)), event({**head, "choices": [idle]})
        )

    choices: list[dict[str, Any]] = []
    ended: list[tuple[Job, End]] = []
    async with aclosing(answers):
        async for answer in answers:
            shape = shapes[len(choices)]
            events, infos, end = await answer.whole(request)
            choice = {"index": len(choices), **shape.whole(events, infos)}
            choices.append({**choice, "finish_reason": _finish_reason(shape, end)})
            ended.append((answer.job, end))
    return JSON({**head, "choices": choices, "usage": _usage(ended, each)})


async def _in_turn(
    request: Request, engine: Engine, first: Answer, others: list[Job]
) -> AsyncGenerator[Answer, None]:
    """The answers to one request, one after the other in its one place of the queue."""
    yield first
    for job in others:
        if await request.is_disconnected():
            return
        yield engine.submit(job, follows=True)


async def _chunks(
    request: Request,
    answers: AsyncGenerator[Answer, None],
    shapes: list[Shape],
    head: dict[str, Any],
    each: int | None,
) -> AsyncGenerator[str, None]:
    """The events of a stream.

    Args:
        each: answers per prompt, for the count of tokens at the end; None for no count.
    """

    def chunk(choice: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": len(ended), **choice, "logprobs": None, "finish_reason": finish_reason}
        if infos:
            choice["logprobs"] = shape.logprobs(infos)
            infos.clear()
        return event({**head, "choices": [choice], **({"usage": None} if each else {})})

    infos: list[TokenInfo] = []
    ended: list[tuple[Job, End]] = []
    async with aclosing(answers):
        async for answer in answers:
            shape = shapes[len(ended)]
            for choice in shape.opening():
                yield chunk(choice)
            async with aclosing(answer.parts(request)) as parts:
                async for part in parts:
                    if isinstance(part, Part):
                        infos += [part.info] if part.info is not None else []
                        for choice in filter(None, map(shape.piece, part.events)):
                            yield chunk(choice)
                    else:
                        # Part of a call was sent that has no end: the answer is as if it had been too long.
                        reason = "length" if part.cut else _finish_reason(shape, part)
                        yield chunk(shape.closing(), reason)
                        ended.append((answer.job, part))
    if each:
        yield event({**head, "choices": [], "usage": _usage(ended, each)})
    yield event("[DONE]")


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _finish_reason(shape: Shape, end: End) -> str:
    return "length" if end.reason == "length" else shape.finish_reason


def _usage(ended: list[tuple[Job, End]], each: int) -> dict[str, Any]:
    """Tokens of all answers, and of their prompts, of which each has as many answers as ``each`` says."""
    prompt = sum(len(job.prompt) for job, _ in ended[::each])
    generated = sum(end.generated_tokens for _, end in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for _, end in ended[::each])},
    }
