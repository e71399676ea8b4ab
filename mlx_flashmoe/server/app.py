"""The server: routes, who may call them, and the loop that serves them."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_flashmoe.errors import FlashMoEError, RequestError
from mlx_flashmoe.prefix_cache import PrefixCache
from mlx_flashmoe.server import (
    anthropic,
    models,
    ollama,
    ollama_models,
    openai,
    responses,
    tokenizing,
)
from mlx_flashmoe.server.engine import Engine
from mlx_flashmoe.server.errors import ApiError, anthropic_body, as_api_error, ollama_body, openai_body
from mlx_flashmoe.server.http import JSON
from mlx_flashmoe.server.log import UNLOGGED, line
from mlx_flashmoe.server.metrics import Metrics
from mlx_flashmoe.server.responses_store import ResponseStore
from mlx_flashmoe.server.schemas import openapi
from mlx_flashmoe.server.worker import Worker
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.watch import MemoryWatch

QUEUE_SIZE = 8


def serve(
    load: Callable[[], tuple[Any, Tokenizer]],
    name: str,
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    without_key: bool = False,
    origins: Sequence[str] = (),
    queue_size: int = QUEUE_SIZE,
    sampling: dict[str, Any] | None = None,
    template: dict[str, Any] | None = None,
    make_prefix_cache: Callable[[Any, Tokenizer], PrefixCache | None] = lambda model, tokenizer: None,
    announce: Callable[[str], None] = print,
    log: Callable[[str], None] | None = None,
) -> None:
    """Loads a model and serves it until interrupted.

    Args:
        load: gives the model and its tokenizer; called on the thread that generates.
        name: of the model, as clients see it.
        port: 0 takes any that is free.
        api_key: what clients have to send; None for nothing.
        without_key: do without a key even where other machines can connect.
        origins: web pages that may call, as "https://example.org"; "*" for all.
        queue_size: requests that wait while one is answered; more are refused.
        sampling: arguments of ``picking`` for requests that do not say.
        template: variables of the chat template for requests that do not say.
        make_prefix_cache: see ``Worker``.
        announce: is told the address when the server can be used, and when the system gets short of memory.
        log: is given a line for each request; see ``server.log``.

    Raises:
        RequestError: the address cannot be used, or would let anybody in; the key is empty.
        FlashMoEError: what loading raises.
    """
    if api_key is not None and not api_key.strip():
        # Whoever sends no key at all would have sent the right one.
        raise RequestError("--api-key is empty: give one of at least one character, or leave it out")
    if not _is_loopback(host) and api_key is None and not without_key:
        raise RequestError(
            f"--host {host} lets other machines connect: give an --api-key, or say --without-api-key"
        )
    listener = _bind(host, port)
    metrics = Metrics()
    worker = Worker(load, queue_size, metrics, make_prefix_cache)
    with listener:
        worker.start()
        try:
            engine = Engine(worker, name, sampling or {}, template)
            config = uvicorn.Config(
                build(engine, metrics, api_key, origins, log),
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
            listener.listen()  # who comes before the loop runs waits for it
            place = f"[{host}]" if ":" in host else host
            address = f"http://{place}:{listener.getsockname()[1]}/v1"
            context = f"{worker.model.max_context:,} tokens of context"
            announce(f"{name}: {address} answers, with {context}; Ctrl-C ends it")
            with MemoryWatch(announce):
                _Server(config, worker).run(sockets=[listener])
        finally:
            worker.close()


class _Server(uvicorn.Server):
    """Ends answers before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        await super().shutdown(sockets)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as e:
        listener.close()
        raise RequestError(f"--host {host} --port {port} cannot be used: {e}") from None
    return listener


def build(
    engine: Engine,
    metrics: Metrics,
    api_key: str | None,
    origins: Sequence[str],
    log: Callable[[str], None] | None = None,
) -> Starlette:
    """The ASGI application."""
    routes = [
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/openapi.json", _openapi),
        Route("/", ollama_models.root),
        Route("/v1", ollama_models.root),
        Route("/v1/models", models.models),
        Route("/v1/models/{model:path}", models.model),
        Route("/api/v0/models", models.lm_studio_models),
        Route("/api/v0/models/{model:path}", models.lm_studio_model),
        Route("/api/chat", ollama.chat, methods=["POST"]),
        Route("/api/generate", ollama.generate, methods=["POST"]),
        Route("/api/tags", ollama_models.tags),
        Route("/api/ps", ollama_models.ps),
        Route("/api/show", ollama_models.show, methods=["POST"]),
        Route("/api/pull", ollama_models.pull, methods=["POST"]),
        Route("/api/version", ollama_models.version),
        Route("/api/embed", ollama_models.embed, methods=["POST"]),
        Route("/api/embeddings", ollama_models.embed, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{id}", responses.retrieve),
        Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
        Route("/tokenizer_info", tokenizing.tokenizer_info),
        Route("/tokenize", tokenizing.tokenize, methods=["POST"]),
        Route("/detokenize", tokenizing.detokenize, methods=["POST"]),
        Route("/v1/messages", anthropic.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
    ]
    known = {route.path for route in routes}
    middleware = [Middleware(_Counted, metrics=metrics, known=known, log=log)]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        )
    middleware.append(Middleware(_Guarded, api_key=api_key, origins=frozenset(origins)))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: _failed,
            FlashMoEError: _failed,
            HTTPException: _not_served,
            Exception: _failed,
        },
    )
    app.state.engine = engine
    app.state.metrics = metrics
    app.state.responses = ResponseStore()
    app.state.started = int(time.time())
    app.state.keyed = api_key is not None
    return app


async def _health(request: Request) -> Response:
    if request.app.state.engine.worker.alive:
        return JSON({"status": "ok"})
    raise ApiError(503, "the model is gone; the server's log has more")


async def _metrics(request: Request) -> Response:
    state = request.app.state
    worker = state.engine.worker
    text = state.metrics.text(worker.model.stats(), worker.waiting, worker.busy)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _openapi(request: Request) -> Response:
    described = {
        **responses.OPERATIONS,
        **models.OPERATIONS,
        **ollama.OPERATIONS,
        **ollama_models.OPERATIONS,
    }
    return JSON(openapi("mlx-flashmoe", version("mlx-flashmoe"), request.app.state.keyed, described))


# Errors


def _failed(request: Request, error: Exception) -> Response:
    return _error_response(request.url.path, request.headers, as_api_error(error))


def _not_served(request: Request, error: Exception) -> Response:
    """What the router has to say: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error_response(
        request.url.path,
        request.headers,
        ApiError(error.status_code, message, headers=dict(error.headers or {})),
    )


def _error_response(path: str, headers: Headers, error: ApiError) -> Response:
    """An error as the API says it that the request was made to."""
    if path.startswith("/v1/messages") or (path.startswith("/v1/models") and "anthropic-version" in headers):
        body = anthropic_body(error)
    elif path.startswith("/api/") and not path.startswith("/api/v0/"):
        body = ollama_body(error)
    else:
        body = openai_body(error)
    return JSON(body, error.status, headers=error.headers)


# Around every request


class _Counted:
    """Counts requests by path and status, and writes the log."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, known: set[str], log: Callable[[str], None] | None
    ) -> None:
        self._app, self._metrics, self._known, self._log = app, metrics, known, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, start = 500, time.perf_counter()

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            if scope["type"] == "http":
                path = scope["path"]
                self._metrics.requested(path if path in self._known else "other", status)
                if self._log is not None and (path not in UNLOGGED or status >= 400):
                    seconds, jobs = time.perf_counter() - start, scope.get("flashmoe.jobs", ())
                    self._log(line(scope["method"], path, status, seconds, jobs))


class _Guarded:
    """Lets in who has the key, and no web page that was not allowed to call.

    A page that a browser shows can reach this machine's loopback; browsers say in ``Origin`` where it is from.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, origins: frozenset[str]) -> None:
        self._app, self._key, self._origins = app, api_key, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["type"] == "http" and (error := self._refusal(scope["path"], headers)):
            await _error_response(scope["path"], headers, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        origin = headers.get("origin")
        if origin is not None and not {origin, "*"} & self._origins:
            return ApiError(403, f"web pages of {origin} may not call this server (--allow-origin)")
        if self._key is None or path == "/health":
            return None
        bearer = headers.get("authorization", "").removeprefix("Bearer ").strip()
        given = headers.get("x-api-key") or bearer
        if hmac.compare_digest(given.encode(), self._key.encode()):
            return None
        missing = "the API key is wrong" if given else "an API key is needed"
        return ApiError(401, missing, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
