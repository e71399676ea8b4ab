"""The output of a response: its items, and the events that announce them as they are written."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from mlx_flashmoe.server.responses_input import seal
from mlx_flashmoe.server.responses_tools import ClientTools
from mlx_flashmoe.tools import CallDelta, CallStart, Event, Text, Thinking, ToolCall

ApiEvent = dict[str, Any]

_CALLS = ("function_call", "custom_tool_call")


class Output:
    """Items of a response.

    Args:
        summary: thinking is shown as the summary of itself; without it, as the reasoning's text.
        sealed: reasoning items have their thinking as ``encrypted_content``, too.

    Attributes:
        items: as they are so far; the last one may be in progress.
    """

    def __init__(self, tools: ClientTools, summary: bool, sealed: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._begun = 0
        self._tools = tools
        self._summary = summary
        self._sealed = sealed

    def feed(self, event: Event) -> Iterator[ApiEvent]:
        """The API's events, without their numbers, for one event of the answer."""
        if isinstance(event, CallStart):
            yield from self._end()
            yield from self._begin(self._call(event.name))
            return
        if isinstance(event, CallDelta):
            if self._open == "function_call":
                yield from self._write(event.text)
            return
        if isinstance(event, ToolCall):
            if self._open == "custom_tool_call":
                yield from self._write(json.dumps(event.arguments, ensure_ascii=False))
            yield from self._end()
            return
        kind = "reasoning" if isinstance(event, Thinking) else "message"
        if self._open != kind:
            yield from self._end()
            yield from self._begin(self._reasoning() if isinstance(event, Thinking) else self._message())
        yield from self._write(event.text)

    def finish(self, whole: bool, cut: str = "") -> Iterator[ApiEvent]:
        """The events of the answer's end. An answer without any text or call gets an empty message.

        Args:
            whole: the model ended it; otherwise there was no room for more.
            cut: a call that has begun and has no end, as the model wrote it. Its item never gets done: clients run
                the calls that do. What there is of it is a message.
        """
        if cut:
            if self._open in _CALLS:
                self.items.pop()
            yield from self.feed(Text(cut))
        if whole and not any(item["type"] != "reasoning" for item in self.items):
            yield from self.feed(Text(""))
        yield from self._end("completed" if whole else "incomplete")

    # Items

    @property
    def _open(self) -> str | None:
        """The type of the item in progress."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return None
        return str(self.items[-1]["type"])

    def _message(self) -> dict[str, Any]:
        return {"type": "message", "id": _id("msg"), "role": "assistant", "content": []}

    def _reasoning(self) -> dict[str, Any]:
        item: dict[str, Any] = {"type": "reasoning", "id": _id("rs"), "summary": []}
        return item if self._summary else {**item, "content": []}

    def _call(self, name: str) -> dict[str, Any]:
        called = self._tools.called(name)
        kind = "custom_tool_call" if called.custom else "function_call"
        item: dict[str, Any] = {
            "type": kind,
            "id": _id("ctc" if called.custom else "fc"),
            "call_id": _id("call"),
            "name": called.name,
        }
        if called.namespace is not None:
            item["namespace"] = called.namespace
        return {**item, "input": ""} if called.custom else {**item, "arguments": ""}

    # Events

    def _begin(self, item: dict[str, Any]) -> Iterator[ApiEvent]:
        item["status"] = "in_progress"
        self.items.append(item)
        self._begun += 1
        # Lists of its own: the item's are filled later.
        added = {key: [] if isinstance(value, list) else value for key, value in item.items()}
        yield {"type": "response.output_item.added", "output_index": self._begun - 1, "item": added}
        if (parts := self._parts()) is not None:
            parts.append(self._part(""))
            yield self._of_part("added", part=self._part(""))

    def _write(self, text: str) -> Iterator[ApiEvent]:
        item = self.items[-1]
        if (parts := self._parts()) is not None:
            parts[-1]["text"] += text
            if text:
                yield self._of_text("delta", delta=text)
        elif item["type"] == "function_call":
            item["arguments"] += text
            yield self._of_item("response.function_call_arguments.delta", delta=text)
        else:
            # The input is a value within the arguments, and can be read when they are whole.
            given = json.loads(text).get("input")
            item["input"] = given if isinstance(given, str) else text
            yield self._of_item("response.custom_tool_call_input.delta", delta=item["input"])

    def _end(self, status: str = "completed") -> Iterator[ApiEvent]:
        if self._open is None:
            return
        item = self.items[-1]
        if (parts := self._parts()) is not None:
            text = parts[-1]["text"]
            yield self._of_text("done", text=text)
            yield self._of_part("done", part=dict(parts[-1]))
            if item["type"] == "reasoning" and self._sealed:
                item["encrypted_content"] = seal(text)
        elif item["type"] == "function_call":
            done = "response.function_call_arguments.done"
            yield self._of_item(done, name=item["name"], arguments=item["arguments"])
        else:
            yield self._of_item("response.custom_tool_call_input.done", input=item["input"])
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": self._begun - 1, "item": item}

    def _parts(self) -> Any:
        """The parts that the text of the item in progress is in; None for a call."""
        item = self.items[-1]
        if item["type"] == "reasoning" and self._summary:
            return item["summary"]
        return item.get("content")

    def _part(self, text: str) -> dict[str, Any]:
        if self.items[-1]["type"] == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self._summary else "reasoning_text", "text": text}

    @property
    def _index(self) -> dict[str, int]:
        of_summary = self.items[-1]["type"] == "reasoning" and self._summary
        return {"summary_index" if of_summary else "content_index": 0}

    def _of_part(self, what: str, **data: Any) -> ApiEvent:
        of_summary = "summary_index" in self._index
        name = "reasoning_summary_part" if of_summary else "content_part"
        return self._of_item(f"response.{name}.{what}", **self._index, **data)

    def _of_text(self, what: str, **data: Any) -> ApiEvent:
        if self.items[-1]["type"] == "message":
            return self._of_item(f"response.output_text.{what}", **self._index, **data, logprobs=[])
        name = "reasoning_summary_text" if self._summary else "reasoning_text"
        return self._of_item(f"response.{name}.{what}", **self._index, **data)

    def _of_item(self, kind: str, **data: Any) -> ApiEvent:
        place = {"item_id": self.items[-1]["id"], "output_index": self._begun - 1}
        return {"type": kind, **place, **data}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
