"""Messages of OpenAI's chat API, and of those that took its form, as chat templates take them."""

from __future__ import annotations

from typing import Any

from mlx_flashmoe.server.content import assistant, call, in_order_of_calls, last_of_user, result, text

ROLES = {"developer": "system", "function": "tool"}


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All messages of a request. Raises ApiError, status 400, for what the model cannot read in the newest one."""
    newest = last_of_user([m["role"] for m in messages])
    return in_order_of_calls(
        [_message(m, f"messages.{i}", refuse_media=i == newest) for i, m in enumerate(messages)]
    )


def _message(message: dict[str, Any], place: str, refuse_media: bool) -> dict[str, Any]:
    role = ROLES.get(message["role"], message["role"])
    content = message.get("content")
    if role == "assistant":
        reasoning, content = _reasoning(message, content)
        return assistant(text(content, f"{place}.content"), reasoning, _calls(message))
    said = text(content, f"{place}.content", refuse_media)
    if role == "tool":
        return result(message.get("tool_call_id") or message.get("name"), said)
    return {"role": role, "content": said}


def _reasoning(message: dict[str, Any], content: Any) -> tuple[str, Any]:
    """The thinking of an assistant's message, by the names that clients use, and its content without it."""
    reasoning = ""
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            reasoning = reasoning or message[key]
    if isinstance(content, list):
        thoughts = [part for part in content if isinstance(part, dict) and part.get("type") in _THOUGHTS]
        reasoning = reasoning or "".join(str(p.get("thinking") or p.get("text") or "") for p in thoughts)
        content = [part for part in content if part not in thoughts]
    return reasoning, content


_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = []
    made_calls = message.get("tool_calls")
    for made in made_calls if isinstance(made_calls, list) else []:
        function = made.get("function") if isinstance(made, dict) else None
        if isinstance(function, dict):
            calls.append(call(function.get("name"), function.get("arguments"), made.get("id")))
        elif isinstance(made, dict) and isinstance(made.get("custom"), dict):
            calls.append(
                call(made["custom"].get("name"), {"input": made["custom"].get("input")}, made.get("id"))
            )
    old = message.get("function_call")  # before there were tool_calls
    if isinstance(old, dict):
        calls.append(call(old.get("name"), old.get("arguments"), old.get("name")))
    return calls
