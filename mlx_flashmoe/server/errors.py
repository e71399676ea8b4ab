"""What can go wrong with a request, as HTTP has it and as each API says it."""

from __future__ import annotations

from typing import Any

from mlx_flashmoe.errors import FlashMoEError, MemoryPlanError, RequestError


class ApiError(Exception):
    """A request is refused or has failed.

    Attributes:
        status: of HTTP.
        code: OpenAI's name for some errors.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}


def as_api_error(error: Exception) -> ApiError:
    """An error of the package's or of anybody's. What is nobody's fault outside says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | MemoryPlanError):
        return ApiError(400, str(error))
    if isinstance(error, FlashMoEError):
        return ApiError(500, str(error))
    return ApiError(500, "internal error; the server's log has more")


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def openai_body(error: ApiError) -> dict[str, Any]:
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_body(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}
