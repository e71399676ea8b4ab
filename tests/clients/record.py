"""Requests as clients send them and the answers that they got, one JSON file each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECRET = {"authorization", "x-api-key", "cookie"}


class Recorder:
    """Passes everything on, and writes it down.

    Args:
        folder: made when needed; files are named by the order of the requests. They never hold keys.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        number = next(self._numbers)
        sent, got = bytearray(), bytearray()
        status = 0

        async def hearing() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def saying(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            got.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, hearing, saying)
        finally:
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            query = scope["query_string"].decode("latin-1")
            record = {
                "method": scope["method"],
                "path": scope["path"] + (f"?{query}" if query else ""),
                "headers": {k: v for k, v in headers.items() if k not in SECRET},
                "body": _json(bytes(sent)),
                "status": status,
                "answer": got.decode("utf-8", "replace"),
            }
            text = json.dumps(record, indent=1, ensure_ascii=False)
            part = self._folder / f"{number:03}.part"
            part.write_text(text, encoding="utf-8", errors="replace")
            part.replace(
                part.with_suffix(".json")
            )  # whole, or not there: the test may read before the answer is over


def _json(body: bytes) -> Any:
    """A body as JSON, or as text where it is none."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")
