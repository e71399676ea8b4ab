"""The model that is served, in every form in which clients list models: /v1/models and LM Studio's /api/v0/models.

All say how many tokens a prompt and its answer may have, each under the name that its clients read.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.server.errors import ApiError
from mlx_flashmoe.server.http import JSON
from mlx_flashmoe.server.schemas import TEXT, Operation, items, record

_LISTED = record({"id": TEXT, "object": {"const": "model"}, "max_context_length": {"type": "integer"}})
OPERATIONS = {
    "/api/v0/models": {
        "get": Operation("The model that is served, as LM Studio has it", record({"data": items(_LISTED)}))
    },
    "/api/v0/models/{model}": {
        "get": Operation("The model, as LM Studio has it", _LISTED, name="model", missing=True),
    },
}

# Codex replaces its own instructions by those of the list of models, also where that has none.
_INSTRUCTIONS = """\
You are a coding agent. You work in the user's terminal, in the folder that the environment context names.

- Read before you write: look at the files that matter and at the project's own instructions (AGENTS.md) first.
- Use the tools that are offered for everything you want to know or change. Never guess what a file holds or what a \
command prints.
- Keep changes small, in the style of the code around them, and leave alone what you were not asked to change. Never \
undo work that is not yours.
- Check your work: run the tests or the program where there are any.
- Go on until the task is done. When something is in your way, say what it is and what you tried.
- At the end say in a few sentences what you did and what you saw.
"""


def for_anthropic(request: Request) -> bool:
    """The client speaks Anthropic's API; both have /v1/models."""
    return "anthropic-version" in request.headers


def check_name(request: Request) -> None:
    """Raises ApiError, status 404, for a path that names another model than the one that is served."""
    engine = request.app.state.engine
    if request.path_params["model"] != engine.name:
        raise ApiError(404, f"there is no such model here, only {engine.name}", code="model_not_found")


async def models(request: Request) -> Response:
    state = request.app.state
    if for_anthropic(request):
        name = state.engine.name
        return JSON(
            {"data": [_anthropic(state)], "has_more": False, "first_id": name, "last_id": name},
        )
    return JSON({"object": "list", "data": [_openai(state)], "models": [_codex(state)]})


async def model(request: Request) -> Response:
    check_name(request)
    state = request.app.state
    return JSON(_anthropic(state) if for_anthropic(request) else _openai(state))


async def lm_studio_models(request: Request) -> Response:
    return JSON({"object": "list", "data": [_lm_studio(request.app.state)]})


async def lm_studio_model(request: Request) -> Response:
    check_name(request)
    return JSON(_lm_studio(request.app.state))


def _openai(state: Any) -> dict[str, Any]:
    """OpenAI's form; vLLM, OpenRouter and llama.cpp each added a name for the context's length."""
    served = state.engine.worker.model
    return {
        "id": state.engine.name,
        "object": "model",
        "created": state.started,
        "owned_by": "mlx-flashmoe",
        "max_model_len": served.max_context,
        "context_length": served.max_context,
        "meta": {
            "n_ctx": served.max_context,
            "n_ctx_train": served.context_length or served.max_context,
            "n_vocab": served.vocab_size,
            "n_params": state.engine.facts.parameters,
            "size": state.engine.facts.size,
        },
    }


def _anthropic(state: Any) -> dict[str, Any]:
    most = state.engine.worker.model.max_context
    return {
        "type": "model",
        "id": state.engine.name,
        "display_name": state.engine.name,
        "created_at": datetime.fromtimestamp(state.started, timezone.utc).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": most,
        "max_tokens": most,
    }


def _lm_studio(state: Any) -> dict[str, Any]:
    served = state.engine.worker.model
    return {
        "id": state.engine.name,
        "object": "model",
        "type": "llm",
        "publisher": "mlx-flashmoe",
        "arch": state.engine.facts.family,
        "compatibility_type": "mlx",
        "quantization": state.engine.facts.quantization,
        "state": "loaded",
        "max_context_length": served.max_context,
        "loaded_context_length": served.max_context,
    }


def _codex(state: Any) -> dict[str, Any]:
    """Codex reads no list without ``models``, and no model without all of these fields."""
    return {
        "slug": state.engine.name,
        "display_name": state.engine.name,
        "description": None,
        "supported_reasoning_levels": [],
        "shell_type": "unified_exec",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "upgrade": None,
        "base_instructions": _INSTRUCTIONS,
        "supports_reasoning_summaries": True,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": None,
        "truncation_policy": {"mode": "bytes", "limit": 10_000},
        "supports_parallel_tool_calls": True,
        "context_window": state.engine.worker.model.max_context,
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
    }
