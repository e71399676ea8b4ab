"""The content of messages, in any form that clients send, as the text that chat templates take.

Every API has its own kinds of parts, and clients send those of one API to another. A part that holds text is its
text. A part that this model cannot read (an image, a recording) becomes a few words where it stands in the history
or in a tool's result, so that a conversation never fails for good; in the user's newest message it is refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

from mlx_flashmoe.chat_template import map_text
from mlx_flashmoe.schema import read_json
from mlx_flashmoe.server.errors import ApiError
from mlx_flashmoe.tokenizer import THINK_END, THINK_START

# Senses by which parts that hold no text are named.
_SENSES = {"image": "image", "audio": "audio", "video": "video"}
_TEXT_KINDS = {"text", "input_text", "output_text", "refusal", "thinking", "reasoning"}
_BREAKS = "\n\n"  # between documents; texts of one message follow each other as they are


def valid(said: str) -> str:
    """A text that every encoding can hold: half a character (a lone surrogate) becomes U+FFFD."""
    try:
        said.encode()
        return said
    except UnicodeEncodeError:
        return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text(content: Any, place: str, refuse_media: bool = False) -> str:
    """The text of a message's content.

    Args:
        content: None, a text, a part, or a list of texts and parts.
        place: names the content in errors, for example "messages.3.content".
        refuse_media: refuse images, audio and video, which the model cannot read; otherwise they become words.

    Raises:
        ApiError: status 400; an image and so on, if ``refuse_media``, or a part that is not a text or an object.
    """
    pieces = []
    parts = content if isinstance(content, list) else [content]
    for i, part in enumerate(parts):
        where = f"{place}.{i}" if parts is content else place
        if isinstance(part, dict):
            pieces.append(_part(part, where, refuse_media))
        elif part is None or isinstance(part, str):
            pieces.append(part or "")
        else:
            raise ApiError(400, f"{where}: a text or an object is expected, not {type(part).__name__}")
    return "".join(pieces)


def _part(part: dict[str, Any], place: str, refuse_media: bool) -> str:
    kind = str(part.get("type") or ("text" if "text" in part else ""))
    for key in ("text", "refusal"):
        if isinstance(part.get(key), str):
            return str(part[key])
    if kind in _TEXT_KINDS:  # without its text
        return ""
    if kind == "document":
        return _document(part, place, refuse_media)
    if kind in ("file", "input_file"):
        return _file(part)
    if kind == "search_result":
        head = " ".join(str(part[key]) for key in ("title", "source") if isinstance(part.get(key), str))
        return f"{head}\n{text(part.get('content'), place, refuse_media)}{_BREAKS}"
    if kind == "tool_reference":
        return f"The tool {part.get('tool_name')} can be called now."
    sense = next((name for mark, name in _SENSES.items() if mark in kind), None)
    if sense and refuse_media:
        raise ApiError(400, f"{place}: {kind} is not supported: this model reads text only, no {sense}")
    if sense:
        return f"[{sense}: this model reads text only and cannot see it]"
    if "content" in part and isinstance(part["content"], str | list):
        return text(part["content"], f"{place}.content", refuse_media)
    return f"[{kind or 'part'}: not shown]"


def _document(part: dict[str, Any], place: str, refuse_media: bool) -> str:
    source = part.get("source")
    source = source if isinstance(source, dict) else {}
    title = part.get("title")
    head = f"{title}\n" if isinstance(title, str) and title else ""
    if source.get("type") == "content":
        return head + text(source.get("content"), f"{place}.source", refuse_media) + _BREAKS
    data, media = source.get("data"), str(source.get("media_type", ""))
    if isinstance(data, str) and source.get("type") == "text":
        return head + data + _BREAKS
    if isinstance(data, str) and (read := _decoded(data, media)) is not None:
        return head + read + _BREAKS
    return f"{head}[document {media or source.get('url') or ''}: only text can be read]{_BREAKS}"


def _file(part: dict[str, Any]) -> str:
    file = part.get("file") if isinstance(part.get("file"), dict) else part
    assert isinstance(file, dict)
    name = file.get("filename") or file.get("file_id") or "file"
    data = file.get("file_data")
    if isinstance(data, str) and (match := re.match(r"data:([^,;]*)([^,]*),(.*)", data, re.DOTALL)):
        media, options, body = match.groups()
        if media.startswith("text/") or media in _TEXT_MEDIA:
            read = (
                _decoded(body, media)
                if "base64" in options
                else unquote_to_bytes(body).decode("utf-8", "replace")
            )
            if read is not None:
                return f"{name}\n{read}{_BREAKS}"
    return f"[file {name}: only text can be read]{_BREAKS}"


_TEXT_MEDIA = {"application/json", "application/xml", "application/javascript", "application/x-yaml"}


def _decoded(data: str, media: str) -> str | None:
    """The text of base64 data of a text's media type; None for another type."""
    if not (media.startswith("text/") or media in _TEXT_MEDIA):
        return None
    try:
        return base64.b64decode(data, validate=False).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return None


def arguments(value: Any) -> dict[str, Any]:
    """The arguments of a call in the history, as the object that chat templates take.

    Clients send them as an object, as its JSON, as nothing, or as what was left of a call that was cut. That is
    shown to the model all the same, as a parameter called "arguments".
    """
    if isinstance(value, dict):
        return value
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            read = read_json(value)
        except ValueError:
            return {"arguments": value}
        read = map_text(read, valid)  # escapes can spell half a character
        return read if isinstance(read, dict) else {} if read is None else {"arguments": read}
    return {"arguments": value}


def call(name: Any, given: Any, call_id: Any = None) -> dict[str, Any]:
    """A call in the history, as chat templates take it."""
    function = {"name": name if isinstance(name, str) and name else "unknown", "arguments": arguments(given)}
    out: dict[str, Any] = {"type": "function", "function": function}
    return {"id": call_id, **out} if isinstance(call_id, str) and call_id else out


def assistant(
    content: str, reasoning: str | None = None, calls: Iterable[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A message of the model's. Thinking that a client left in the text, in its tags, is told apart again."""
    if not reasoning and content.lstrip().startswith(THINK_START) and THINK_END in content:
        reasoning, _, content = content.lstrip().removeprefix(THINK_START).partition(THINK_END)
        reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = list(calls)
    if calls:
        message["tool_calls"] = calls
    return message


def result(call_id: Any, content: str) -> dict[str, Any]:
    """A tool's result."""
    return {"role": "tool", "tool_call_id": call_id if isinstance(call_id, str) else "", "content": content}


def in_order_of_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the results of tools in the order of the calls: templates show them without their ids."""
    out: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    results: list[dict[str, Any]] = []
    for message in [*messages, {"role": ""}]:
        if message["role"] == "tool":
            results.append(message)
            continue
        out += sorted(results, key=lambda m: places.get(m.get("tool_call_id", ""), len(places)))
        results = []
        places = {c.get("id", ""): i for i, c in enumerate(message.get("tool_calls", []))}
        out.append(message)
    return out[:-1]


def is_unfinished(messages: list[dict[str, Any]]) -> bool:
    """Tells whether the model continues the last message: an assistant's message without calls."""
    return messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]


def last_of_user(roles: list[str]) -> int:
    """The place of the newest message of the user's; -1 if there is none."""
    return max((i for i, role in enumerate(roles) if role == "user"), default=-1)
