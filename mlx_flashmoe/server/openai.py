"""OpenAI's API: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.schema import read_json
from mlx_flashmoe.server.engine import Answer, Ask, Engine, in_order_of_calls
from mlx_flashmoe.server.errors import ApiError, openai_body
from mlx_flashmoe.server.http import JSON, KEEP_ALIVE, event, event_stream, read_body
from mlx_flashmoe.server.schemas import VALIDATORS
from mlx_flashmoe.server.worker import End, Part, TokenInfo
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import Piece as Event
from mlx_flashmoe.tools import Text, Thinking, ToolCall, pieces

UNLIKELY = -9999.0  # what stands for a log-probability of minus infinity


async def models(request: Request) -> Response:
    return JSON({"object": "list", "data": [_model(request.app.state)]})


async def model(request: Request) -> Response:
    state = request.app.state
    if request.path_params["model"] != state.engine.name:
        raise ApiError(404, f"there is no such model here, only {state.engine.name}", code="model_not_found")
    return JSON(_model(state))


def _model(state: Any) -> dict[str, Any]:
    return {
        "id": state.engine.name,
        "object": "model",
        "created": state.started,
        "owned_by": "mlx-flashmoe",
    }


async def chat_completions(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["chat_completion"])
    return await _respond(request, body, _chat_ask(body), Chat)


async def completions(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["completion"])
    return await _respond(request, body, _completion_ask(body), Completion)


# Requests


def _chat_ask(body: dict[str, Any]) -> Ask:
    template = dict(body.get("chat_template_kwargs", {}))
    if body.get("reasoning_effort") == "none":
        template["enable_thinking"] = False
    tools = body.get("tools", [])
    choice = body.get("tool_choice", "auto")
    required = None
    if choice == "none":
        tools = []
    elif choice == "required":
        required = tools
    elif choice != "auto":
        required = [t for t in tools if t["function"]["name"] == choice["function"]["name"]]
    if required == []:
        raise ApiError(400, "tool_choice asks for a tool that is not among tools")
    form = body.get("response_format", {"type": "text"})
    schema = {"json_object": {"type": "object"}, "text": None}.get(form["type"])
    if form["type"] == "json_schema":
        schema = form["json_schema"]["schema"]
    top_logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    return Ask(
        messages=in_order_of_calls([_message(m) for m in body["messages"]]),
        template=template,
        tools=[{**t, "function": {k: v for k, v in t["function"].items() if v is not None}} for t in tools],
        required=required,
        several=body.get("parallel_tool_calls", True) and not isinstance(choice, dict),
        schema=schema,
        sampling=_sampling(body),
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
        stop=_stop(body),
        top_logprobs=None if top_logprobs is None else int(top_logprobs),
    )


def _completion_ask(body: dict[str, Any]) -> Ask:
    prompt = body["prompt"]
    if isinstance(prompt, list) and not isinstance(prompt[0], int | float):
        prompt = prompt[0]
    return Ask(
        prompt=prompt if isinstance(prompt, str) else [int(token) for token in prompt],
        sampling=_sampling(body),
        max_tokens=body.get("max_tokens", 16),  # the API's own default
        stop=_stop(body),
        top_logprobs=int(body["logprobs"]) if "logprobs" in body else None,
    )


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    names = {"temperature": "temp", "seed": "seed", "top_k": "top_k"}
    names |= {name: name for name in ("top_p", "min_p", "repetition_penalty")}
    sampling = {ours: body[name] for name, ours in names.items() if name in body}
    if "top_k" in sampling:
        sampling["top_k"] = int(sampling["top_k"])  # 40.0 is an integer to JSON
    if "seed" in sampling:
        sampling["seed"] = int(sampling["seed"]) % 2**64
    return sampling


def _stop(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop", [])
    return [stop] if isinstance(stop, str) else stop


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: text in one piece, arguments as objects."""
    out = {key: value for key, value in message.items() if value is not None}
    out["role"] = {"developer": "system"}.get(out["role"], out["role"])
    content = out.get("content", "")
    out["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if "tool_calls" in out:
        out["tool_calls"] = [{**call, "function": _called(call["function"])} for call in out["tool_calls"]]
    return out


def _called(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = read_json(function["arguments"] or "{}")
    except ValueError as e:
        raise ApiError(400, f"the arguments of a call of {function['name']} are not JSON: {e}") from None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"the arguments of a call of {function['name']} are not a JSON object")
    return {"name": function["name"], "arguments": arguments}


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

    def whole(self, events: list[Event], infos: list[TokenInfo]) -> dict[str, Any]:
        """The one choice of an answer."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """Choices that a stream begins with."""
        return []

    def piece(self, event: Event) -> dict[str, Any]:
        """A choice of a stream for one event."""
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

    def whole(self, events: list[Event], infos: list[TokenInfo]) -> dict[str, Any]:
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

    def piece(self, event: Event) -> dict[str, Any]:
        if isinstance(event, ToolCall):
            return {"delta": {"tool_calls": [{"index": self._calls, **self._call(event)}]}}
        return {"delta": {"reasoning_content" if isinstance(event, Thinking) else "content": event.text}}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._calls += 1
        self.finish_reason = "tool_calls"
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

    def logprobs(self, infos: list[TokenInfo]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._text(token),
                "logprob": max(logprob, UNLIKELY),
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

    def whole(self, events: list[Event], infos: list[TokenInfo]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        return {"text": text, "logprobs": self.logprobs(infos) if infos else None}

    def piece(self, event: Event) -> dict[str, Any]:
        return {"text": event.text}

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
            "token_logprobs": [max(info.logprob, UNLIKELY) for info in infos],
            "top_logprobs": [{self._text(t): max(v, UNLIKELY) for t, v in info.top} for info in infos],
            "text_offset": offsets,
        }


async def _respond(request: Request, body: dict[str, Any], ask: Ask, shape_of: type[Shape]) -> Response:
    engine: Engine = request.app.state.engine
    answer = engine.submit(await run_in_threadpool(engine.prepare, ask))
    shape = shape_of(engine.tokenizer)
    head = {
        "id": f"{shape.prefix}-{secrets.token_hex(12)}",
        "object": shape.object,
        "created": int(time.time()),
        "model": engine.name,
    }
    if body.get("stream"):
        usage = (body.get("stream_options") or {}).get("include_usage")
        chunks = _chunks(request, answer, shape, head, bool(usage))
        return event_stream(chunks, lambda error: event(openai_body(error)))

    events, infos, end = await answer.whole(request)
    choice = {"index": 0, **shape.whole(pieces(events), infos), "finish_reason": _finish_reason(shape, end)}
    return JSON({**head, "choices": [choice], "usage": _usage(answer, end)})


async def _chunks(
    request: Request, answer: Answer, shape: Shape, head: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    if shape.object == Chat.object:
        head = {**head, "object": "chat.completion.chunk"}

    def chunk(choice: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}
        if infos:
            choice["logprobs"] = shape.logprobs(infos)
            infos.clear()
        return event({**head, "choices": [choice], **({"usage": None} if usage else {})})

    infos: list[TokenInfo] = []
    for choice in shape.opening():
        yield chunk(choice)
    async with aclosing(answer.parts(request)) as parts:
        async for part in parts:
            if part is None:
                yield KEEP_ALIVE
            elif isinstance(part, Part):
                infos += [part.info] if part.info is not None else []
                for piece in pieces(part.events):
                    yield chunk(shape.piece(piece))
            else:
                yield chunk(shape.closing(), _finish_reason(shape, part))
                if usage:
                    yield event({**head, "choices": [], "usage": _usage(answer, part)})
    yield event("[DONE]")


def _finish_reason(shape: Shape, end: End) -> str:
    return "length" if end.reason == "length" else shape.finish_reason


def _usage(answer: Answer, end: End) -> dict[str, Any]:
    prompt = len(answer.job.prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": end.generated_tokens,
        "total_tokens": prompt + end.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }
