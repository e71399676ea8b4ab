"""The tools that a request offers, in any API's form.

Kinds that only a vendor's servers can run (web search, a computer, MCP connectors), and kinds whose form only a
vendor's models know, are left out and counted: a client that offers them offers others too, or can do without.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mlx_flashmoe.server.errors import ApiError

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


class Offered:
    """The functions that may be called.

    Args:
        tools: of a request.
        custom: tools of the type "custom" are functions, as in Anthropic's API; in OpenAI's they take free text.

    Attributes:
        tools: functions, as chat templates take them.
        deferred: functions by name that the model gets to know only when the conversation refers to them (Anthropic's
            ``defer_loading``): listed with the others, each new one would change the prompt from its beginning.
        left_out: how many tools of each kind are in neither.
    """

    def __init__(self, tools: Any, custom: bool = False) -> None:
        self.tools: list[dict[str, Any]] = []
        self.deferred: dict[str, dict[str, Any]] = {}
        self.left_out: Counter[str] = Counter()
        names: set[str] = set()
        for tool in _flat(tools):
            function = _function(tool, custom)
            if function is None:
                self.left_out[_kind(tool)] += 1
            elif function["name"] not in names:
                names.add(function["name"])
                made = {"type": "function", "function": function}
                if tool.get("defer_loading") is True:
                    self.deferred[function["name"]] = made
                else:
                    self.tools.append(made)
        if self.deferred and not self.tools:  # nothing to find them with
            self.tools, self.deferred = list(self.deferred.values()), {}

    def required(self, names: list[str] | None) -> list[dict[str, Any]] | None:
        """The tools of which one has to be called; None if none has to be.

        Args:
            names: of the functions that the request wants called; None for any.

        Raises:
            ApiError: status 400; the request offers no such tool. One that was left out cannot be required.
        """
        every = self.tools if names is None else [*self.tools, *self.deferred.values()]
        wanted = [t for t in every if names is None or t["function"]["name"] in names]
        if wanted or self.left_out:
            return wanted or None
        raise ApiError(400, "tool_choice asks for a tool that is not among tools")


def _flat(tools: Any) -> Iterator[dict[str, Any]]:
    """Tools, and the functions within those that only group others (OpenAI's namespaces)."""
    for tool in tools if isinstance(tools, list) else []:
        if not isinstance(tool, dict):
            continue
        inner = tool.get("tools")
        if isinstance(inner, list) and tool.get("type") == "namespace":
            yield from _flat(inner)
        else:
            yield tool


def _function(tool: dict[str, Any], custom: bool) -> dict[str, Any] | None:
    """Name, description and parameters of a function; None for a tool of another kind."""
    if tool.get("type") not in (None, "function", *(["custom"] if custom else [])):
        return None
    inner = tool.get("function")
    function = inner if isinstance(inner, dict) else tool
    name = function.get("name")
    if not isinstance(name, str) or not name:
        return None
    parameters = function.get("parameters", function.get("input_schema"))
    out: dict[str, Any] = {"name": name}
    if isinstance(function.get("description"), str):
        out["description"] = function["description"]
    out["parameters"] = parameters if isinstance(parameters, dict) and parameters else NO_PARAMETERS
    return out


def _kind(tool: dict[str, Any]) -> str:
    """A tool's kind as a metric's label: without its date, and nothing that a client makes up."""
    kind = re.sub(r"_?\d{6,8}$", "", str(tool.get("type") or "unnamed"))
    return kind if re.fullmatch(r"[a-z][a-z_0-9]{0,39}", kind) else "other"
