"""Messages of Anthropic's API as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

from mlx_flashmoe.server.content import assistant, call, in_order_of_calls, last_of_user, result, text

# Claude Code's line of its version and a checksum that changes with every request: nothing in it is for the model,
# and a prompt that begins differently each time can reuse nothing of the one before.
BILLING = "x-anthropic-billing-header:"
_REMINDER = ("<system-reminder>", "</system-reminder>")


def conversation(
    body: dict[str, Any], deferred: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system prompt and all messages of a request, and the deferred tools that they refer to.

    Args:
        deferred: tools by name. Where a message refers to one, its text says what the tool is.

    Raises:
        ApiError: status 400, for what the model cannot read in the user's newest message.
    """
    out: list[dict[str, Any]] = []
    loaded: dict[str, dict[str, Any]] = {}
    system = _system(body.get("system"))
    if system:
        out.append({"role": "system", "content": system})
    newest = last_of_user([m["role"] for m in body["messages"]])
    for i, message in enumerate(body["messages"]):
        message = {**message, "content": _described(message.get("content"), deferred, loaded)}
        out += _messages(message, f"messages.{i}", refuse_media=i == newest)
    # Messages that say nothing at all ask as an empty one does.
    return in_order_of_calls(out) or [{"role": "user", "content": ""}], list(loaded.values())


def _described(content: Any, deferred: dict[str, Any], loaded: dict[str, Any]) -> Any:
    """Content with the description of each tool that it refers to. Adds these tools to ``loaded``."""
    if isinstance(content, list):
        return [_described(part, deferred, loaded) for part in content]
    if not isinstance(content, dict):
        return content
    tool = deferred.get(str(content.get("tool_name")))
    if content.get("type") == "tool_reference" and tool is not None:
        loaded[tool["function"]["name"]] = tool
        return {
            "type": "text",
            "text": f"This tool can be called now:\n{json.dumps(tool, ensure_ascii=False)}\n",
        }
    if content.get("type") == "tool_result":
        return {**content, "content": _described(content.get("content"), deferred, loaded)}
    return content


def _system(content: Any) -> str:
    blocks = content if isinstance(content, list) else [content]
    texts = [text(block, "system") for block in blocks]
    texts = [t.partition("\n")[2] if t.startswith(BILLING) else t for t in texts]
    return "\n\n".join(t for t in texts if t)


def _messages(message: dict[str, Any], place: str, refuse_media: bool) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says."""
    role, content = message["role"], message["content"]
    place = f"{place}.content"
    if role == "system":
        said = _system(content)
        return [{"role": role, "content": said}] if said else []
    blocks = content if isinstance(content, list) else [content]
    if role == "assistant":
        return [_assistant(blocks, place)]
    texts, results = [], []
    for i, block in enumerate(blocks):
        if isinstance(block, dict) and block.get("type") == "tool_result":
            results.append(result(block.get("tool_use_id"), text(block.get("content"), f"{place}.{i}")))
        else:
            texts.append(text(block, f"{place}.{i}" if isinstance(content, list) else place, refuse_media))
    texts = [t for t in texts if t]
    if results:
        # As with late system messages: a user message would end the run of calls.
        reminders = [
            t for t in texts if t.strip().startswith(_REMINDER[0]) and t.strip().endswith(_REMINDER[1])
        ]
        results[-1]["content"] = "\n\n".join([results[-1]["content"], *reminders])
        texts = [t for t in texts if t not in reminders]
    said = "\n\n".join(texts)
    return results + ([{"role": role, "content": said}] if said or not results else [])


def _assistant(blocks: list[Any], place: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else "text"
        if kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            calls.append(call(block.get("name"), block.get("input"), block.get("id")))
        elif kind != "redacted_thinking":
            texts.append(text(block, f"{place}.{i}"))
    return assistant("\n\n".join(t for t in texts if t), "".join(thoughts), calls)
