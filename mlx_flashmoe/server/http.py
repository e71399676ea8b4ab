"""Bodies in and out: JSON of a limited size that keeps to a schema, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from mlx_flashmoe.chat_template import map_text
from mlx_flashmoe.server import engine
from mlx_flashmoe.server.content import valid
from mlx_flashmoe.server.errors import ApiError, as_api_error

MAX_BODY = 32 * 2**20  # bytes; a prompt of 262,144 tokens takes about one MiB
MAX_OBJECTS = 2**15  # in a body, whatever they are; checking so many takes a second or three
MAX_COMMAS = 2**21  # more than a prompt has that fits into any context; what they part is read in one go


_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # or a whole one, written as two


class JSON(Response):
    """A JSON response, in ASCII: text of a model or a client may hold what UTF-8 has no bytes for."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


async def read_body(request: Request, validator: Draft202012Validator) -> dict[str, Any]:
    """The request's JSON object, without fields that are null: for both APIs these are as good as absent.

    Raises:
        ApiError: it is too large, has too many parts, or is not what the schema says.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the request is larger than {MAX_BODY} bytes")
    except ClientDisconnect:
        raise ApiError(400, "the request ended early") from None
    # Not on the event loop: a large body takes its time.
    return await run_in_threadpool(_parse, body, validator)


def _parse(body: bytes | bytearray, validator: Draft202012Validator) -> dict[str, Any]:
    if body.count(b",") > MAX_COMMAS:
        raise ApiError(
            400, f"the body has more than {MAX_COMMAS} commas: no such prompt fits into the context"
        )
    objects = 0

    def count(made: dict[str, Any]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_OBJECTS:
            raise ApiError(400, f"the body has more than {MAX_OBJECTS} JSON objects")
        return made

    try:
        data = json.loads(body, parse_constant=_refuse, object_hook=count)
        if _HALF_CHARACTER.search(body):
            data = map_text(data, valid)
        error = best_match(validator.iter_errors(data))
    except RecursionError:
        raise ApiError(400, "the body is not usable JSON: it is nested too deeply") from None
    except ValueError as e:
        raise ApiError(400, f"the body is not JSON: {e}") from None
    while error is not None and error.context and {"type": "null"} in error.validator_value:
        # "Neither this nor null": what is wrong with this?
        error = best_match([e for e in error.context if e.relative_schema_path[0] == 0])
    if error is not None:
        place = ".".join(str(step) for step in error.absolute_path)
        message = error.message if len(error.message) <= 300 else error.message[:300] + " …"
        raise ApiError(400, f"{place}: {message}" if place else message)
    assert isinstance(data, dict)
    return {key: value for key, value in data.items() if value is not None}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def event_stream(
    events: AsyncGenerator[str, None],
    error_event: Callable[[ApiError], str],
    sign_of_life: str | Callable[[], str],
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """A stream of events. An error on the way is the last of them.

    Args:
        error_event: writes an error as an event.
        sign_of_life: sent whenever nothing else was for ``engine.KEEP_ALIVE`` seconds, whatever the reason. Clients
            count events, not comments. A function makes a new one each time.
    """

    async def guarded() -> AsyncGenerator[str, None]:
        try:
            async with aclosing(kept_alive(events, sign_of_life, engine.KEEP_ALIVE)) as lines:
                async for line in lines:
                    yield line
        except Exception as e:
            yield error_event(as_api_error(e))

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type=media_type, headers=headers)


async def kept_alive(
    lines: AsyncGenerator[str, None], sign_of_life: str | Callable[[], str], seconds: float
) -> AsyncGenerator[str, None]:
    """The lines, and a sign of life after each silence of some seconds."""
    following: asyncio.Future[str] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(lines))
            done, _ = await asyncio.wait([following], timeout=seconds)
            if not done:
                yield sign_of_life if isinstance(sign_of_life, str) else sign_of_life()
                continue
            try:
                line = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield line
    finally:
        if following is not None and not following.done():
            following.cancel()
            await asyncio.wait([following])
        await lines.aclose()


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), allow_nan=False)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
