"""The model in Ollama's API: /api/tags, /api/show, /api/ps, /api/pull and /api/version."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import mlx.core as mx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.server.errors import ApiError
from mlx_flashmoe.server.http import JSON, read_body
from mlx_flashmoe.server.ollama import ERROR, NDJSON
from mlx_flashmoe.server.schemas import TEXT, Operation, items, record, validator
from mlx_flashmoe.tokenizer import Tokenizer

# The first version of Ollama that has what this server has of its API, /v1/responses included. Clients refuse
# servers of lower versions than they need: Codex asks for 0.13.4, VS Code for 0.6.4.
VERSION = "0.13.4"

_NAMED = record({}, {"model": TEXT, "name": TEXT, "stream": {"type": "boolean"}})
_LIST = record({"models": items(record({"name": TEXT, "model": TEXT, "digest": TEXT}))})
_SHOWN = record({"model_info": {"type": "object"}, "capabilities": items(TEXT)})
OPERATIONS = {
    "/api/tags": {"get": Operation("The model that is served", _LIST, error=ERROR)},
    "/api/ps": {"get": Operation("The model, as one that is loaded", _LIST, error=ERROR)},
    "/api/show": {
        "post": Operation("Details of the model", _SHOWN, _NAMED, ERROR, missing=True, stream=None)
    },
    "/api/pull": {
        "post": Operation(
            "Nothing, for the model that is there",
            record({"status": TEXT}),
            _NAMED,
            ERROR,
            missing=True,
            stream=NDJSON,
        )
    },
    "/api/version": {"get": Operation("Ollama's version, as far as clients ask", record({"version": TEXT}))},
}
_VALIDATOR = validator(_NAMED)


async def root(request: Request) -> Response:
    """Answers clients that look whether there is a server."""
    return PlainTextResponse("mlx-flashmoe is running")


async def version(request: Request) -> Response:
    return JSON({"version": VERSION})


async def tags(request: Request) -> Response:
    state = request.app.state
    listed = {**_named(state), "modified_at": _started(state), "size": state.engine.facts.size}
    return JSON({"models": [listed]})


async def ps(request: Request) -> Response:
    state = request.app.state
    memory = mx.get_active_memory()
    running = {
        **_named(state),
        "size": memory,
        "size_vram": memory,
        "context_length": state.engine.worker.model.max_context,
        "expires_at": "9999-12-31T23:59:59Z",
    }
    return JSON({"models": [running]})


async def show(request: Request) -> Response:
    await _asked(request)
    state = request.app.state
    served, tokenizer = state.engine.worker.model, state.engine.tokenizer
    facts = state.engine.facts
    return JSON(
        {
            "modelfile": f"# {state.engine.name}, served by mlx-flashmoe\n",
            "parameters": "",
            "template": tokenizer.chat_templates.get("default", ""),
            "details": _details(state),
            "model_info": {
                "general.architecture": facts.family,
                "general.basename": state.engine.name,
                "general.parameter_count": facts.parameters,
                "general.type": "model",
                f"{facts.family}.context_length": served.max_context,
            },
            "capabilities": capabilities(tokenizer),
            "modified_at": _started(state),
        }
    )


async def pull(request: Request) -> Response:
    """Succeeds for the model that is served: some clients pull before they ask."""
    body = await _asked(request)
    done = {"status": "success"}
    if not body.get("stream", True):
        return JSON(done)
    lines = (JSON(status).body for status in ({"status": "pulling manifest"}, done))
    return Response(b"".join(bytes(line) + b"\n" for line in lines), media_type=NDJSON)


async def embed(request: Request) -> Response:
    raise ApiError(404, "embeddings are not supported: this server's model writes text")


def capabilities(tokenizer: Tokenizer) -> list[str]:
    """The model's abilities, as its chat template shows them."""
    found = ["completion"]
    tool = {"type": "function", "function": {"name": "a_tool_that_is_shown", "parameters": {}}}
    try:
        template = tokenizer.chat_template([tool])
        prompt = template.render([{"role": "user", "content": "?"}], [tool])
    except RequestError:
        return found
    if "a_tool_that_is_shown" in prompt:
        found.append("tools")
    if any(mark in template.source for mark in ("<think>", "enable_thinking", "reasoning_effort")):
        found.append("thinking")
    return found


async def _asked(request: Request) -> dict[str, Any]:
    """The body of a request about a model. Raises ApiError, status 404, if it is about another one."""
    body = await read_body(request, _VALIDATOR)
    name = body.get("model") or body.get("name") or ""
    served = request.app.state.engine.name
    if name.removesuffix(":latest") != served.removesuffix(":latest"):
        raise ApiError(404, f"model {name[:200]!r} not found: this server has only {served}")
    return body


def _named(state: Any) -> dict[str, Any]:
    """The model in a list. Ollama's names have a tag."""
    name = state.engine.name if ":" in state.engine.name else f"{state.engine.name}:latest"
    digest = state.engine.worker.model.identity
    return {"name": name, "model": name, "digest": digest, "details": _details(state)}


def _details(state: Any) -> dict[str, Any]:
    facts = state.engine.facts
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": facts.parameter_size,
        "quantization_level": facts.quantization,
    }


def _started(state: Any) -> str:
    return datetime.fromtimestamp(state.started, timezone.utc).isoformat().replace("+00:00", "Z")
