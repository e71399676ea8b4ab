"""Tools of the Responses API, as functions that every model knows, and their calls, as clients know them.

A namespace groups functions: its functions get its name before theirs. A custom tool takes free text: it becomes a
function with one text, ``input``. Clients find a tool by the names that they gave, so calls go back under these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mlx_flashmoe.server.offered import Offered


class Called(NamedTuple):
    """A tool as its client names it."""

    name: str
    namespace: str | None = None
    custom: bool = False


class ClientTools:
    """The tools of a request, of its body and of its input items.

    Args:
        tools: the body's.

    Attributes:
        offered: the same, for the model.
    """

    def __init__(self, tools: Any) -> None:
        self._known: dict[str, Called] = {}
        self.offered = Offered(list(self._functions(tools)))

    def more(self, tools: Any) -> list[dict[str, Any]]:
        """Tools that an input item brings, for the model. Those that were left out are counted with the others."""
        offered = Offered(list(self._functions(tools)))
        self.offered.left_out += offered.left_out
        return [*offered.tools, *offered.deferred.values()]

    def called(self, name: str) -> Called:
        """The tool that the model calls by a name."""
        return self._known.get(name, Called(name))

    def choice(self, choice: Any) -> Any:
        """A ``tool_choice``, with the names that the model knows."""
        if not isinstance(choice, dict):
            return choice
        choice = dict(choice)
        for name in ("tools", "allowed_tools"):
            if isinstance(choice.get(name), list):
                choice[name] = [
                    {"type": "function", "name": flat_name(tool)}
                    for tool in choice[name]
                    if isinstance(tool, dict)
                ]
        return {**choice, "name": flat_name(choice)} if "name" in choice else choice

    def _functions(self, tools: Any, namespace: str | None = None) -> Iterator[dict[str, Any]]:
        for tool in tools if isinstance(tools, list) else []:
            if not isinstance(tool, dict):
                continue
            kind, name = tool.get("type"), tool.get("name")
            if kind == "namespace" and namespace is None:
                yield from self._functions(tool.get("tools"), str(name))
                continue
            # In a namespace, or in the chat API's form, a function's type may be missing.
            if kind in (None, "function", "custom") and isinstance(name, str) and name:
                flat = flat_name({"name": name, "namespace": namespace})
                self._known[flat] = Called(name, namespace, kind == "custom")
                tool = {**tool, "name": flat}
            yield _free_text(tool) if kind == "custom" else tool


def flat_name(called: dict[str, Any]) -> str:
    """The name that the model knows, of a call or a choice with the client's names."""
    name, namespace = str(called.get("name")), called.get("namespace")
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace.rstrip('_')}__{name}"


def _free_text(tool: dict[str, Any]) -> dict[str, Any]:
    description = str(tool.get("description") or "")
    form = tool.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        description += f"\n\nThe input keeps to this {form.get('syntax', '')} grammar:\n{form['definition']}"
    parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": description,
        "parameters": parameters,
    }
