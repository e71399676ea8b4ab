"""The tokenizer over HTTP, as vLLM has it and evaluation harnesses use it: /tokenizer_info, /tokenize, /detokenize."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mlx_flashmoe.server.engine import Engine
from mlx_flashmoe.server.errors import ApiError
from mlx_flashmoe.server.http import JSON, read_body
from mlx_flashmoe.server.schemas import VALIDATORS


async def tokenizer_info(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    tokenizer = engine.tokenizer
    special = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return JSON(
        {
            **special,
            "chat_template": tokenizer.chat_templates.get("default"),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": engine.worker.model.max_context,
        }
    )


async def tokenize(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["tokenize"])
    engine: Engine = request.app.state.engine
    tokens = await run_in_threadpool(
        engine.tokenizer.encode, body["prompt"], body.get("add_special_tokens", True)
    )
    return JSON({"tokens": tokens, "count": len(tokens), "max_model_len": engine.worker.model.max_context})


async def detokenize(request: Request) -> Response:
    body = await read_body(request, VALIDATORS["detokenize"])
    engine: Engine = request.app.state.engine
    tokens = [int(token) for token in body["tokens"]]
    if tokens and max(tokens) >= engine.worker.model.vocab_size:
        raise ApiError(400, f"tokens: {max(tokens)} is not a token id of this model")
    return JSON({"prompt": await run_in_threadpool(engine.tokenizer.decode, tokens)})
