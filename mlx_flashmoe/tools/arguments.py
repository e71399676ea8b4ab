"""A call's arguments, and their JSON text piece by piece, while the model writes them."""

from __future__ import annotations

import json
from typing import Any

from mlx_flashmoe.schema import property_schema, typed_value, value_types
from mlx_flashmoe.tools.events import CallDelta, CallStart, Reading, ToolCall


class ArgumentWriter:
    """Collects the arguments of one call. Each step returns the events that it settles."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._values: dict[str, Any] = {}
        self._key: str | None = None  # of the string that is being written
        self._pieces: list[str] = []

    def start(self) -> list[Reading]:
        return [CallStart(self.name), CallDelta("{")]

    def value(self, key: str, value: Any) -> list[Reading]:
        """A whole value."""
        value = whole_characters(value)
        lead = self._lead(key)
        self._values[key] = value
        return [CallDelta(lead + json.dumps(value, ensure_ascii=False))]

    def piece(self, key: str, text: str) -> list[Reading]:
        """A piece of a string value, which ``end_string`` ends."""
        lead = ""
        if self._key is None:
            self._key, self._pieces, lead = key, [], self._lead(key) + '"'
            self._values[key] = ""
        text = whole_characters(text)
        self._pieces.append(text)
        delta = lead + json.dumps(text, ensure_ascii=False)[1:-1]
        return [CallDelta(delta)] if delta else []

    def end_string(self) -> list[Reading]:
        assert self._key is not None
        self._values[self._key] = "".join(self._pieces)
        self._key = None
        return [CallDelta('"')]

    def end(self, text: str) -> list[Reading]:
        """The call is whole. ``text``: as the model wrote it."""
        return [CallDelta("}"), ToolCall(self.name, self._values, text)]

    def _lead(self, key: str) -> str:
        return (", " if self._values else "") + json.dumps(key, ensure_ascii=False) + ": "


class PlainValue:
    """One value that is written as plain text, and gets its type from the function's schema.

    Args:
        schema: JSON schema of the function's parameters.
        string: the syntax itself says that the value is a string (True) or JSON (False); None if it does not say.
        trim: a line break after the opening mark and one before the closing mark belong to the form.
    """

    def __init__(
        self, writer: ArgumentWriter, key: str, schema: Any, trim: bool, string: bool | None = None
    ) -> None:
        self._writer, self.key, self._schema, self._trim = writer, key, schema, trim
        self._types = value_types(property_schema(schema, key), schema)
        if string is not None:
            self._types = {"string"} if string else self._types - {"string"} or {"object"}
        # These texts are null where the schema allows it; every other one is a string, so it can be shown at once.
        words = ("null", "none") if "null" in self._types else () if self._types else ("null",)
        self._words = words if self._types <= {"string", "null"} else None
        self._begun = False  # the first character is settled
        self._streams = False
        self._held = ""

    def feed(self, text: str) -> list[Reading]:
        """A piece of the value's text."""
        self._held += text
        if self._trim and not self._begun and self._held:
            self._begun, self._held = True, self._held.removeprefix("\n")
        if self._words is None:
            return []
        if not self._streams:
            word = self._held.strip().lower()
            if any(w.startswith(word) for w in self._words):
                return []
            self._streams = True
        keep = 1 if self._trim and self._held.endswith("\n") else 0
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._writer.piece(self.key, shown) if shown else []

    def end(self) -> list[Reading]:
        text = self._held.removesuffix("\n") if self._trim else self._held
        if self._streams:
            return self._writer.piece(self.key, text) + self._writer.end_string()
        return self._writer.value(self.key, typed_value(text, self._types))


def whole_characters(value: Any) -> Any:
    """The value without half characters, which escapes can spell and no encoding has: each becomes "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        whole = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        return json.loads(whole)
