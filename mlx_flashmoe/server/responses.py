"""OpenAI's Responses API: /v1/responses."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.server import settings
from mlx_flashmoe.server.engine import Answer, Ask, Engine
from mlx_flashmoe.server.errors import ApiError, openai_body
from mlx_flashmoe.server.http import JSON, event, event_stream, read_body
from mlx_flashmoe.server.openai import required_tools
from mlx_flashmoe.server.responses_events import Output
from mlx_flashmoe.server.responses_input import Conversation, as_items
from mlx_flashmoe.server.responses_store import ResponseStore
from mlx_flashmoe.server.responses_tools import ClientTools
from mlx_flashmoe.server.schemas import (
    CONTENT,
    OPENAI_CHOICE,
    TEXT,
    TOOLS,
    Operation,
    Schema,
    items,
    record,
    validator,
)
from mlx_flashmoe.server.worker import End, Part
from mlx_flashmoe.tools import Thinking

OBJECT: Schema = {"type": "object"}
REQUEST = record(
    {},
    {
        "input": {"anyOf": [TEXT, items({"anyOf": [OBJECT, TEXT, {"type": "null"}]})]},
        "instructions": CONTENT,
        "previous_response_id": TEXT,
        "store": {"type": "boolean"},
        "stream": {"type": "boolean"},
        "tools": TOOLS,
        "tool_choice": OPENAI_CHOICE,
        "parallel_tool_calls": {"type": "boolean"},
        "text": OBJECT,
        "reasoning": OBJECT,
        "include": items(TEXT),
        "max_output_tokens": {"type": "integer"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "minimum": -1, "maximum": 1},
        "metadata": OBJECT,
    },
)
ANSWER = record({"id": TEXT, "object": {"const": "response"}, "status": TEXT, "output": items(OBJECT)})
DELETED = record({"id": TEXT, "object": TEXT, "deleted": {"type": "boolean"}})
OPERATIONS = {
    "/v1/responses": {"post": Operation("An answer in a conversation", ANSWER, REQUEST, missing=True)},
    "/v1/responses/{id}": {
        "get": Operation("A response that was stored", ANSWER, name="id", missing=True),
        "delete": Operation("Forgets a response", DELETED, name="id", missing=True),
    },
}
_VALIDATOR = validator(REQUEST)

# The fields of a request that its response repeats, with their defaults.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
}


async def create(request: Request) -> Response:
    body = await read_body(request, _VALIDATOR)
    _refuse_unsupported(body)
    engine: Engine = request.app.state.engine
    store: ResponseStore = request.app.state.responses
    history = _history(body, store)
    tools = ClientTools(body.get("tools"))
    ask = _ask(body, history, tools)
    answer = engine.submit(await run_in_threadpool(engine.prepare, ask))
    writer = _Writer(body, engine.name, tools)

    def keep() -> None:
        if body.get("store", True):
            store.put(writer.response, history)

    events = _events(request, answer, writer, keep)
    if body.get("stream"):
        return event_stream(_lines(events, writer), writer.failed, writer.sign_of_life)
    async for _ in events:
        pass
    return JSON(writer.response)


async def retrieve(request: Request) -> Response:
    return JSON(request.app.state.responses.get(request.path_params["id"]).response)


async def delete(request: Request) -> Response:
    response_id = request.path_params["id"]
    request.app.state.responses.delete(response_id)
    return JSON({"id": response_id, "object": "response", "deleted": True})


# Requests


def _refuse_unsupported(body: dict[str, Any]) -> None:
    settings.check_supported(body)
    for field in ("conversation", "prompt"):
        if body.get(field):
            raise ApiError(400, f"{field} is not supported: this server keeps none; send input")
    if body.get("top_logprobs"):
        raise ApiError(400, "top_logprobs is not supported here, only in /v1/chat/completions")


def _history(body: dict[str, Any], store: ResponseStore) -> list[dict[str, Any]]:
    """The items of the whole conversation. Raises ApiError, status 404, for what is not stored."""
    given = store.resolved(as_items(body.get("input")))
    if (previous := body.get("previous_response_id")) is None:
        return given
    stored = store.get(previous)
    return [*stored.items, *stored.response["output"], *given]


def _ask(body: dict[str, Any], history: list[dict[str, Any]], tools: ClientTools) -> Ask:
    conversation = Conversation(history, body.get("instructions"), tools)
    choice = tools.choice(body.get("tool_choice", "auto"))
    required = required_tools(tools.offered, choice)
    return Ask(
        messages=conversation.messages,
        template=settings.thinking(body),
        tools=[] if choice == "none" else tools.offered.tools,
        loaded=[] if choice == "none" else conversation.loaded,
        left_out=tools.offered.left_out,
        required=required,
        several=body.get("parallel_tool_calls", True) and not isinstance(choice, dict),
        schema=settings.answer_schema(body),
        sampling=settings.sampling(body),
        max_tokens=settings.max_tokens(body),
        stop=settings.stop(body),
    )


# Responses


def _repeated(body: dict[str, Any], field: str) -> Any:
    default = _REPEATED[field]
    return {**default, **body.get(field, {})} if isinstance(default, dict) else body.get(field, default)


class _Writer:
    """A response, as it is written.

    Attributes:
        response: as it is so far; a new object for each state.
    """

    def __init__(self, body: dict[str, Any], model: str, tools: ClientTools) -> None:
        reasoning = body.get("reasoning") or {}
        summary = reasoning.get("summary") or reasoning.get("generate_summary")
        sealed = "reasoning.encrypted_content" in body.get("include", [])
        self._output = Output(tools, summary=bool(summary) and summary != "none", sealed=sealed)
        self._numbers = itertools.count()
        self._tokens = self._thought = 0
        self.response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **{field: _repeated(body, field) for field in _REPEATED},
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        """The events that a stream begins with."""
        yield {"type": "response.created", "response": self.response}
        yield {"type": "response.in_progress", "response": self.response}

    def feed(self, part: Part | End, answer: Answer) -> Iterator[dict[str, Any]]:
        """The events of a part of the answer."""
        if isinstance(part, End):
            yield from self._finish(part, answer)
            return
        self._tokens += 1
        for piece in part.events:
            if isinstance(piece, Thinking):
                self._thought = self._tokens
            yield from self._output.feed(piece)

    def _finish(self, end: End, answer: Answer) -> Iterator[dict[str, Any]]:
        whole = end.reason != "length" and not end.cut
        yield from self._output.finish(whole, end.cut)
        prompt = len(answer.job.prompt)
        self.response = {
            **self.response,
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": self._output.items,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": end.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": self._thought},
                "total_tokens": prompt + end.generated_tokens,
            },
        }
        yield {"type": f"response.{self.response['status']}", "response": self.response}

    def line(self, data: dict[str, Any]) -> str:
        """An event with its number, as it is sent."""
        return event({**data, "sequence_number": next(self._numbers)}, data["type"])

    def sign_of_life(self) -> str:
        brief = {**self.response, "instructions": None, "tools": []}  # these can be long
        return self.line({"type": "response.in_progress", "response": brief})

    def failed(self, error: ApiError) -> str:
        said = openai_body(error)["error"]
        code = error.code or ("server_error" if error.status >= 500 else "invalid_prompt")
        self.response = {
            **self.response,
            "status": "failed",
            "error": {"code": code, "message": said["message"]},
            "output": self._output.items,
        }
        return self.line({"type": "response.failed", "response": self.response})


async def _events(
    request: Request, answer: Answer, writer: _Writer, keep: Callable[[], None]
) -> AsyncGenerator[dict[str, Any], None]:
    for data in writer.opening():
        yield data
    async with aclosing(answer.parts(request)) as parts:
        async for part in parts:
            events = list(writer.feed(part, answer))
            if isinstance(part, End) and not answer.job.cancelled.is_set():
                keep()  # before a client can ask for it
            for data in events:
                yield data


async def _lines(events: AsyncGenerator[dict[str, Any], None], writer: _Writer) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for data in events:
            yield writer.line(data)
