"""Anthropic's API: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.server import settings
from mlx_flashmoe.server.anthropic_messages import conversation
from mlx_flashmoe.server.content import is_unfinished
from mlx_flashmoe.server.engine import Answer, Ask, Engine
from mlx_flashmoe.server.errors import anthropic_body
from mlx_flashmoe.server.http import JSON, event, event_stream, read_body
from mlx_flashmoe.server.offered import Offered
from mlx_flashmoe.server.schemas import VALIDATORS
from mlx_flashmoe.server.worker import End, Part
from mlx_flashmoe.tools import CallDelta, CallStart, Event, Piece, Text, Thinking, ToolCall


async def messages(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["message"])
    engine: Engine = request.app.state.engine
    ask = _ask(body)
    settings.check_supported(body)
    ask.max_tokens = settings.max_tokens(body)
    ask.stop = settings.stop(body)
    ask.sampling = settings.sampling(body)
    ask.schema = settings.answer_schema(body)
    answer = engine.submit(await run_in_threadpool(engine.prepare, ask))
    head = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": engine.name,
    }
    if body.get("stream"):
        return event_stream(
            _stream(request, answer, head),
            lambda error: event(anthropic_body(error), "error"),
            event({"type": "ping"}, "ping"),
        )

    events, _, end = await answer.whole(request)
    content = _blocks(events)
    return JSON({**head, "content": content, **_stopped(end, content), "usage": _usage(answer, end)})


async def count_tokens(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["count_tokens"])
    engine: Engine = request.app.state.engine
    return JSON({"input_tokens": len(await run_in_threadpool(engine.tokens, _ask(body)))})


# Requests


def _ask(body: dict[str, Any]) -> Ask:
    offered = Offered(body.get("tools"), custom=True)
    choice = body.get("tool_choice", {"type": "auto"})
    required = None
    if choice["type"] in ("any", "tool"):
        required = offered.required([choice["name"]] if choice["type"] == "tool" else None)
    messages, loaded = conversation(body, offered.deferred)
    return Ask(
        messages=messages,
        continues=is_unfinished(messages),
        # A client that does not ask for thinking does not expect any.
        template_default={"enable_thinking": False},
        template=settings.thinking(body),
        tools=[] if choice["type"] == "none" else offered.tools,
        loaded=[] if choice["type"] == "none" else loaded,
        left_out=offered.left_out,
        required=required,
        several=not choice.get("disable_parallel_tool_use") and choice["type"] != "tool",
    )


# Answers


def _begin(event: Event) -> dict[str, Any]:
    """An empty content block for an event."""
    if isinstance(event, Thinking):
        return {"type": "thinking", "thinking": "", "signature": ""}
    if isinstance(event, CallStart | ToolCall):
        return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": event.name, "input": {}}
    return {"type": "text", "text": ""}


def _delta(event: Event) -> dict[str, Any] | None:
    """The delta that an event adds to its block; None if it only begins or ends it."""
    if isinstance(event, Thinking):
        return {"type": "thinking_delta", "thinking": event.text}
    if isinstance(event, Text):
        return {"type": "text_delta", "text": event.text}
    return {"type": "input_json_delta", "partial_json": event.text} if isinstance(event, CallDelta) else None


_KINDS = {Thinking: "thinking", Text: "text", CallDelta: "tool_use"}


def _continues(block: dict[str, Any] | None, event: Event) -> bool:
    """Returns whether an event belongs to the block before it."""
    return block is not None and block["type"] == _KINDS.get(type(event))


def _blocks(events: list[Piece]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for piece in events:
        if not _continues(blocks[-1] if blocks else None, piece):
            blocks.append(_begin(piece))
        if isinstance(piece, ToolCall):
            blocks[-1]["input"] = piece.arguments
        else:
            blocks[-1]["thinking" if isinstance(piece, Thinking) else "text"] += piece.text
    return blocks


def _stopped(end: End, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    if end.stop_sequence is not None:
        reason = "stop_sequence"
    elif end.reason == "length" or (end.cut and blocks and blocks[-1]["type"] == "tool_use"):
        reason = "max_tokens"  # also where a stream has sent part of a call that has no end
    else:
        reason = "tool_use" if any(block["type"] == "tool_use" for block in blocks) else "end_turn"
    return {"stop_reason": reason, "stop_sequence": end.stop_sequence}


def _usage(answer: Answer, end: End) -> dict[str, int]:
    return {
        "input_tokens": len(answer.job.prompt) - end.cached_tokens,
        "output_tokens": end.generated_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": end.cached_tokens,
    }


async def _stream(request: Request, answer: Answer, head: dict[str, Any]) -> AsyncGenerator[str, None]:
    def send(kind: str, **data: Any) -> str:
        return event({"type": kind, **data}, kind)

    blocks: list[dict[str, Any]] = []

    def stop_block() -> list[str]:
        return [send("content_block_stop", index=len(blocks) - 1)] if blocks else []

    start: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
    usage = _usage(answer, End("stop"))
    yield send("message_start", message={**head, **start, "usage": usage})
    async with aclosing(answer.parts(request)) as parts:
        async for part in parts:
            if isinstance(part, Part):
                for piece in part.events:
                    if isinstance(piece, ToolCall):  # sent already, as it was written
                        continue
                    if not _continues(blocks[-1] if blocks else None, piece):
                        for line in stop_block():
                            yield line
                        blocks.append(_begin(piece))
                        yield send("content_block_start", index=len(blocks) - 1, content_block=blocks[-1])
                    if (delta := _delta(piece)) is not None:
                        yield send("content_block_delta", index=len(blocks) - 1, delta=delta)
            else:
                for line in stop_block():
                    yield line
                yield send("message_delta", delta=_stopped(part, blocks), usage=_usage(answer, part))
    yield send("message_stop")
