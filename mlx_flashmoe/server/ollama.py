"""Ollama's API: /api/chat and /api/generate. Its lists of models are in ``ollama_models.py``.

Answers are streamed unless the request says otherwise, a JSON object per line.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.server import settings
from mlx_flashmoe.server.content import is_unfinished, last_of_user
from mlx_flashmoe.server.engine import Answer, Ask, Engine
from mlx_flashmoe.server.errors import ApiError, ollama_body
from mlx_flashmoe.server.http import JSON, event_stream, read_body
from mlx_flashmoe.server.offered import Offered
from mlx_flashmoe.server.openai_messages import conversation
from mlx_flashmoe.server.schemas import (
    OPENAI_MESSAGE,
    TEXT,
    TOOLS,
    Operation,
    Schema,
    items,
    record,
    validator,
)
from mlx_flashmoe.server.worker import End, Part
from mlx_flashmoe.tools import Event, Piece, Text, Thinking, ToolCall

NDJSON = "application/x-ndjson"
ERROR: Schema = record({"error": TEXT})

_COMMON: dict[str, Schema] = {
    "model": TEXT,
    "stream": {"type": "boolean"},
    "options": {"type": "object"},
    "format": {"anyOf": [TEXT, {"type": "object"}]},
    "think": {"anyOf": [{"type": "boolean"}, TEXT]},
}
CHAT = record({}, {**_COMMON, "messages": items(OPENAI_MESSAGE), "tools": TOOLS})
GENERATE = record(
    {},
    {
        **_COMMON,
        "prompt": TEXT,
        "system": TEXT,
        "raw": {"type": "boolean"},
        "suffix": TEXT,
        "template": TEXT,
        "images": {"type": "array"},
    },
)
_DONE = {"done": {"type": "boolean"}, "eval_count": {"type": "integer"}}
_CHATTED = record({"model": TEXT, "message": {"type": "object"}}, _DONE)
_GENERATED = record({"model": TEXT, "response": TEXT}, _DONE)
OPERATIONS = {
    "/api/chat": {
        "post": Operation("An answer in a conversation", _CHATTED, CHAT, ERROR, stream=NDJSON),
    },
    "/api/generate": {
        "post": Operation("An answer to a prompt", _GENERATED, GENERATE, ERROR, stream=NDJSON),
    },
}
_CHAT_VALIDATOR, _GENERATE_VALIDATOR = validator(CHAT), validator(GENERATE)


async def chat(request: Request) -> Response:
    body = await read_body(request, _CHAT_VALIDATOR)
    shape = _Shape(request, body, chat=True)
    if not body.get("messages"):
        return shape.loaded()
    offered = Offered(body.get("tools"))
    messages = conversation(_messages(body["messages"]))
    ask = Ask(
        messages=messages,
        continues=is_unfinished(messages),
        tools=offered.tools,
        left_out=offered.left_out,
        **_settings(body),
    )
    return await _respond(request, body, ask, shape)


async def generate(request: Request) -> Response:
    body = await read_body(request, _GENERATE_VALIDATOR)
    shape = _Shape(request, body, chat=False)
    settings.check_supported(body)
    for field in ("template", "images"):
        if body.get(field):
            reason = "this model reads text only" if field == "images" else "the checkpoint has its own"
            raise ApiError(400, f"{field}: not supported, {reason}")
    prompt = body.get("prompt", "")
    if not prompt:
        return shape.loaded()
    if body.get("raw"):
        ask = Ask(prompt=prompt, **_settings(body))
    else:
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        ask = Ask(messages=[*system, {"role": "user", "content": prompt}], **_settings(body))
    return await _respond(request, body, ask, shape)


# Requests


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of an Ask that both endpoints take from the body and its ``options``."""
    if body.get("logprobs"):
        raise ApiError(400, "logprobs is not supported here, only in /v1/chat/completions")
    options = body.get("options", {})
    return {
        "template": settings.thinking({"think": body.get("think")}),
        "schema": settings.answer_schema({"format": body.get("format")}),
        "sampling": settings.sampling(options),
        "max_tokens": settings.max_tokens(options),
        "stop": settings.stop(options),
    }


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form of OpenAI's API. Images are parts there, and a tool's result names its call."""
    newest = last_of_user([m["role"] for m in messages])
    out = []
    for i, message in enumerate(messages):
        if images := message.get("images"):
            if i == newest:
                raise ApiError(400, f"messages.{i}.images: not supported, this model reads text only")
            parts = [{"type": "text", "text": message.get("content") or ""}]
            message = {**message, "content": parts + [{"type": "image"}] * len(images)}
        if "tool_name" in message:
            message = {"tool_call_id": message["tool_name"], **message}
        out.append(message)
    return out


# Answers


class _Shape:
    """The objects of an answer: a message of a chat, or a text.

    Args:
        body: of the request; the answer repeats the name of the model in it.
    """

    def __init__(self, request: Request, body: dict[str, Any], chat: bool) -> None:
        self._start = time.perf_counter()
        self._chat = chat
        self._calls = 0
        self._model = body.get("model") or request.app.state.engine.name
        self._unload = body.get("keep_alive") in (0, "0")

    def loaded(self) -> Response:
        """The answer to a request without a prompt, by which clients load a model. This one always is."""
        return JSON(self._object("", done=True, done_reason="unload" if self._unload else "load"))

    def piece(self, event: Event) -> dict[str, Any] | None:
        """An object for one event; None where there is nothing to say yet."""
        if isinstance(event, Thinking):
            return self._object("", thinking=event.text)
        if isinstance(event, Text):
            return self._object(event.text)
        if isinstance(event, ToolCall):
            return self._object("", tool_calls=[self._call(event)])
        return None

    def whole(self, events: list[Piece], answer: Answer, end: End) -> dict[str, Any]:
        """An answer that is not streamed."""
        more: dict[str, Any] = {}
        if thinking := "".join(e.text for e in events if isinstance(e, Thinking)):
            more["thinking"] = thinking
        if calls := [self._call(e) for e in events if isinstance(e, ToolCall)]:
            more["tool_calls"] = calls
        text = "".join(e.text for e in events if isinstance(e, Text))
        return {**self._object(text, **more), **self._figures(answer, end)}

    def closing(self, answer: Answer, end: End) -> dict[str, Any]:
        """The last object of a stream."""
        return {**self._object(""), **self._figures(answer, end)}

    def sign_of_life(self) -> str:
        return _line(self._object(""))

    def _object(
        self, text: str, done: bool = False, done_reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        out: dict[str, Any] = {"model": self._model, "created_at": now()}
        if self._chat:
            out["message"] = {"role": "assistant", "content": text, **more}
        else:
            out |= {"response": text, **more}
        out["done"] = done
        return out if done_reason is None else {**out, "done_reason": done_reason}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._calls += 1
        return {"function": {"index": self._calls - 1, "name": call.name, "arguments": call.arguments}}

    def _figures(self, answer: Answer, end: End) -> dict[str, Any]:
        job = answer.job
        return {
            "done": True,
            "done_reason": end.reason,
            "total_duration": _nanoseconds(time.perf_counter() - self._start),
            "load_duration": 0,
            "prompt_eval_count": len(job.prompt),
            "prompt_eval_duration": _nanoseconds(job.prompt_seconds),
            "eval_count": end.generated_tokens,
            "eval_duration": _nanoseconds(job.answer_seconds),
        }


def now() -> str:
    """The time as the API writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _line(data: dict[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n"


async def _respond(request: Request, body: dict[str, Any], ask: Ask, shape: _Shape) -> Response:
    engine: Engine = request.app.state.engine
    answer = engine.submit(await run_in_threadpool(engine.prepare, ask))
    if body.get("stream", True):
        return event_stream(
            _lines(request, answer, shape),
            lambda error: _line(ollama_body(error)),
            shape.sign_of_life,
            NDJSON,
        )
    events, _, end = await answer.whole(request)
    return JSON(shape.whole(events, answer, end))


async def _lines(request: Request, answer: Answer, shape: _Shape) -> AsyncGenerator[str, None]:
    async with aclosing(answer.parts(request)) as parts:
        async for part in parts:
            for data in _objects(part, answer, shape):
                yield _line(data)


def _objects(part: Part | End, answer: Answer, shape: _Shape) -> Iterator[dict[str, Any]]:
    if isinstance(part, End):
        if part.cut and (data := shape.piece(Text(part.cut))) is not None:
            yield data
        yield shape.closing(answer, part)
        return
    for event in part.events:
        if (data := shape.piece(event)) is not None:
            yield data
