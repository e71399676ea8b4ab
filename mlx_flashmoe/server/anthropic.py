"""Anthropic's API: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.server.engine import Answer, Ask, Engine, in_order_of_calls
from mlx_flashmoe.server.errors import ApiError, anthropic_body
from mlx_flashmoe.server.http import JSON, KEEP_ALIVE, event, event_stream, read_body
from mlx_flashmoe.server.schemas import VALIDATORS
from mlx_flashmoe.server.worker import End, Part
from mlx_flashmoe.tools import Piece as Event
from mlx_flashmoe.tools import Text, Thinking, ToolCall, pieces


async def messages(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["message"])
    engine: Engine = request.app.state.engine
    ask = _ask(body)
    ask.max_tokens = int(body["max_tokens"])
    ask.stop = body.get("stop_sequences", [])
    names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k"}
    ask.sampling = {ours: body[name] for name, ours in names.items() if name in body}
    if "top_k" in ask.sampling:
        ask.sampling["top_k"] = int(ask.sampling["top_k"])  # 40.0 is an integer to JSON
    answer = engine.submit(await run_in_threadpool(engine.prepare, ask))
    head = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": engine.name,
    }
    if body.get("stream"):
        return event_stream(
            _stream(request, answer, head), lambda error: event(anthropic_body(error), "error")
        )

    events, _, end = await answer.whole(request)
    content = _blocks(pieces(events))
    return JSON({**head, "content": content, **_stopped(end, content), "usage": _usage(answer, end)})


async def count_tokens(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["count_tokens"])
    engine: Engine = request.app.state.engine
    return JSON({"input_tokens": len(await run_in_threadpool(engine.tokens, _ask(body)))})


# Requests


def _ask(body: dict[str, Any]) -> Ask:
    tools = [_tool(tool) for tool in body.get("tools", [])]
    choice = body.get("tool_choice", {"type": "auto"})
    required = None
    if choice["type"] == "none":
        tools = []
    elif choice["type"] == "any":
        required = tools
    elif choice["type"] == "tool":
        required = [t for t in tools if t["function"]["name"] == choice["name"]]
    if required == []:
        raise ApiError(400, "tool_choice asks for a tool that is not among tools")
    conversation = [m for message in body["messages"] for m in _messages(message)]
    if conversation and conversation[-1]["role"] == "assistant":
        raise ApiError(
            400, "messages: the last one is the assistant's; beginnings of answers are not continued"
        )
    if "system" in body:
        conversation.insert(0, {"role": "system", "content": _text(body["system"])})
    return Ask(
        messages=in_order_of_calls(conversation),
        # Who does not ask for thinking does not expect any.
        template={"enable_thinking": body.get("thinking", {}).get("type", "disabled") != "disabled"},
        tools=tools,
        required=required,
        several=not choice.get("disable_parallel_tool_use") and choice["type"] != "tool",
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _text(content: Any) -> str:
    """The text of blocks."""
    return content if isinstance(content, str) else "".join(b["text"] for b in content or [])


def _messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as chat templates take it; results of tools are messages of their own, before what the user says."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    by_type: dict[str, list[dict[str, Any]]] = {}
    for block in content:
        by_type.setdefault(block["type"], []).append(block)
    text = _text(by_type.get("text"))
    if role == "user":
        results = [
            {"role": "tool", "tool_call_id": b["tool_use_id"], "content": _text(b.get("content"))}
            for b in by_type.get("tool_result", [])
        ]
        return results + ([{"role": role, "content": text}] if text or not results else [])
    said: dict[str, Any] = {"role": role, "content": text}
    if "thinking" in by_type:
        said["reasoning_content"] = "".join(b["thinking"] for b in by_type["thinking"])
    if "tool_use" in by_type:
        said["tool_calls"] = [
            {"id": b["id"], "type": "function", "function": {"name": b["name"], "arguments": b["input"]}}
            for b in by_type["tool_use"]
        ]
    return [said]


# Answers


def _begin(event: Event) -> dict[str, Any]:
    """An empty content block for an event."""
    if isinstance(event, Thinking):
        return {"type": "thinking", "thinking": "", "signature": ""}
    if isinstance(event, Text):
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": event.name, "input": {}}


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, Thinking):
        return {"type": "thinking_delta", "thinking": event.text}
    if isinstance(event, Text):
        return {"type": "text_delta", "text": event.text}
    return {"type": "input_json_delta", "partial_json": json.dumps(event.arguments)}


def _goes_on(block: dict[str, Any] | None, event: Event) -> bool:
    """Whether an event belongs to the block before it. Every call is a block of its own."""
    kind = {Thinking: "thinking", Text: "text", ToolCall: None}[type(event)]
    return block is not None and block["type"] == kind


def _blocks(events: list[Event]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for piece in events:
        if not _goes_on(blocks[-1] if blocks else None, piece):
            blocks.append(_begin(piece))
        if isinstance(piece, ToolCall):
            blocks[-1]["input"] = piece.arguments
        else:
            blocks[-1]["thinking" if isinstance(piece, Thinking) else "text"] += piece.text
    return blocks


def _stopped(end: End, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    if end.stop_sequence is not None:
        reason = "stop_sequence"
    elif end.reason == "length":
        reason = "max_tokens"
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


async def _stream(request: Request, answer: Answer, head: dict[str, Any]) -> AsyncIterator[str]:
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
            if part is None:
                yield KEEP_ALIVE
            elif isinstance(part, Part):
                for piece in pieces(part.events):
                    if not _goes_on(blocks[-1] if blocks else None, piece):
                        for line in stop_block():
                            yield line
                        blocks.append(_begin(piece))
                        yield send("content_block_start", index=len(blocks) - 1, content_block=blocks[-1])
                    yield send("content_block_delta", index=len(blocks) - 1, delta=_delta(piece))
            else:
                for line in stop_block():
                    yield line
                yield send("message_delta", delta=_stopped(part, blocks), usage=_usage(answer, part))
    yield send("message_stop")
