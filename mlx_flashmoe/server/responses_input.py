"""Input items of the Responses API as the messages that chat templates take.

The items that the model wrote in one answer (reasoning, messages, calls) are one message again: the prompt then
begins with what the model wrote, and that part of it need not be read again.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from mlx_flashmoe.server.content import assistant, call, in_order_of_calls, last_of_user, result, text
from mlx_flashmoe.server.openai_messages import ROLES
from mlx_flashmoe.server.responses_tools import ClientTools, flat_name

Item = dict[str, Any]

_SEALED = "mlx-flashmoe:"  # begins the encrypted_content that is ours


def seal(thinking: str) -> str:
    """Thinking as a reasoning item's ``encrypted_content``: clients that keep no reasoning send this back."""
    return _SEALED + base64.b64encode(thinking.encode("utf-8", "replace")).decode()


def _unsealed(content: Any) -> str | None:
    if not isinstance(content, str) or not content.startswith(_SEALED):
        return None
    try:
        return base64.b64decode(content.removeprefix(_SEALED), validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def as_items(given: Any) -> list[Item]:
    """A request's ``input`` as a list of items. A text is a message of the user's; null items are left out."""
    given = [given] if isinstance(given, str | dict) else given or []
    return [{"role": "user", "content": i} if isinstance(i, str) else i for i in given if i]


class Conversation:
    """The messages of a list of items.

    Args:
        items: references to stored items are resolved.
        instructions: come first.
        tools: of the request; those that items bring are added.

    Attributes:
        messages: as chat templates take them.
        loaded: tools that the model gets to know in the middle of the conversation.

    Raises:
        ApiError: status 400, for what the model cannot read in the user's newest message.
    """

    def __init__(self, items: list[Item], instructions: Any, tools: ClientTools) -> None:
        self.messages: list[dict[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self._tools = tools
        self._answer: _Answer | None = None
        if said := text(instructions, "instructions"):
            self.messages.append({"role": "system", "content": said})
        newest = last_of_user([_role(item) for item in items])
        for i, item in enumerate(items):
            self._add(item, f"input.{i}", refuse_media=i == newest)
        self._end_answer()
        if not any(m["role"] != "system" for m in self.messages):
            self.messages.append({"role": "user", "content": ""})
        self.messages = in_order_of_calls(self.messages)

    def _add(self, item: Item, place: str, refuse_media: bool) -> None:
        kind, role = _kind(item), _role(item)
        if kind == "reasoning":
            self._writes(ends_if=lambda answer: answer.began).thinking.append(_thinking(item))
        elif kind in ("function_call", "custom_tool_call"):
            given = item.get("arguments") if kind == "function_call" else {"input": item.get("input") or ""}
            self._writes().calls.append(call(flat_name(item), given, item.get("call_id")))
        elif role == "assistant":
            self._writes().texts.append(text(item.get("content"), f"{place}.content"))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._end_answer()
            self.messages.append(result(item.get("call_id"), text(item.get("output"), f"{place}.output")))
        elif kind in ("additional_tools", "tool_search_output"):
            self._brings(self._tools.more(item.get("tools")))
        elif kind == "message":
            self._end_answer()
            said = text(item.get("content"), f"{place}.content", refuse_media)
            if role == "tool":
                self.messages.append(result(item.get("tool_call_id") or item.get("call_id"), said))
            else:
                self.messages.append({"role": role, "content": said})
        # Other kinds are of a vendor's own tools, or not known yet: nothing in them is for this model.

    def _writes(self, ends_if: Callable[[_Answer], bool] = lambda answer: False) -> _Answer:
        """The answer that the model's next item belongs to."""
        if self._answer is not None and ends_if(self._answer):
            self._end_answer()
        self._answer = self._answer or _Answer()
        return self._answer

    def _end_answer(self) -> None:
        if self._answer is not None:
            self.messages.append(self._answer.message())
            self._answer = None

    def _brings(self, tools: list[dict[str, Any]]) -> None:
        self._end_answer()
        if not tools:
            return
        if all(m["role"] == "system" for m in self.messages):
            self._tools.offered.tools += tools
            return
        # Listed with the others, they would change the prompt from its beginning.
        self.loaded += tools
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        self.messages.append({"role": "system", "content": f"These tools can be called now:\n{listed}"})


class _Answer:
    """The model's items between two messages of others, as one message."""

    def __init__(self) -> None:
        self.thinking: list[str] = []
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []

    @property
    def began(self) -> bool:
        """It has more than thinking."""
        return bool(self.texts or self.calls)

    def message(self) -> dict[str, Any]:
        said = "\n\n".join(t for t in self.texts if t)
        return assistant(said, "".join(self.thinking), self.calls)


def _kind(item: Item) -> str:
    return str(item.get("type") or ("message" if "role" in item else ""))


def _role(item: Item) -> str:
    role = str(item.get("role") or "")
    return (ROLES.get(role, role) or "user") if _kind(item) == "message" else ""


def _thinking(item: Item) -> str:
    sealed = _unsealed(item.get("encrypted_content"))
    if sealed is not None:
        return sealed
    parts = item.get("content") or item.get("summary") or []
    return "".join(text(part, "reasoning") for part in parts if isinstance(part, dict | str))
