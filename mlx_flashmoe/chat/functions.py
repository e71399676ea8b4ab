"""Python functions as tools: a schema from type hints and docstring, and calls with the model's arguments.

def weather(place: str, days: int = 1) -> str:
    \"""The weather forecast.

    Args:
        place: a town, with its country.
        days: how many days ahead, at most 7.
    \"""
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from mlx_flashmoe.errors import RequestError

MAX_RESULT = 20_000
"""Characters of a result that the model gets to see."""

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


@dataclass(frozen=True)
class Function:
    """A tool.

    Attributes:
        schema: as chat templates take it: ``{"type": "function", "function": {…}}``.
        call: takes the arguments by name; returns text, or anything JSON has a form for.
    """

    schema: dict[str, Any]
    call: Callable[..., Any]

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    @property
    def description(self) -> str:
        return str(self.schema["function"]["description"])


def run(functions: dict[str, Function], name: str, arguments: dict[str, Any]) -> str:
    """A call's result as text for the model: whatever goes wrong in it is text, too."""
    if name not in functions:
        return f"Error: there is no tool {name!r}; there are: {', '.join(functions)}"
    function = functions[name]
    try:
        inspect.signature(function.call).bind(**arguments)
    except TypeError as e:
        return f"Error: {name}: {e}"
    try:
        with redirect_stdout(sys.stderr):  # in a pipe, standard output is for answers
            result = function.call(**arguments)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except (Exception, SystemExit) as e:  # a tool is the user's program, and can raise anything
        text = f"Error: {type(e).__name__}: {e}"
    # File names that are not UTF-8 come as lone surrogates, which no tokenizer takes: every later turn would fail.
    return shorten(text.encode("utf-8", "replace").decode("utf-8"), MAX_RESULT)


def shorten(text: str, limit: int) -> str:
    """Leaves out the middle of a text that is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def load_functions(path: Path) -> list[Function]:
    """The public functions that a Python file defines.

    Raises:
        RequestError: the file cannot be run, or a function's hints or docstring are not enough to describe it.
    """
    if not path.exists():
        raise RequestError(f"--tools {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"tools_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RequestError(f"--tools {path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise RequestError(f"--tools {path}: cannot be imported: {type(e).__name__}: {e}") from None
    functions = [
        from_function(f, str(path))
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not functions:
        raise RequestError(f"--tools {path}: defines no function; names that begin with _ do not count")
    return functions


def from_function(function: Callable[..., Any], where: str) -> Function:
    """A function as a tool. Raises RequestError, which begins with ``where``."""
    name = function.__name__
    place = f"--tools {where}: {name}"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise RequestError(f"{place} is async; a tool is a plain function")
    description, about = _read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise RequestError(f"{place} has no docstring: say in it what the function does, for the model")
    try:
        hints = typing.get_type_hints(function)
    except Exception as e:
        raise RequestError(f"{place}: its type hints cannot be read: {e}") from None
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise RequestError(
                f"{place}: {parameter} cannot be given by name; a model gives all arguments so"
            )
        if key not in hints:
            raise RequestError(f"{place}: parameter {key} has no type hint")
        schema = _json_type(hints[key])
        if schema is None:
            raise RequestError(
                f"{place}: parameter {key} is {inspect.formatannotation(hints[key])}, which JSON has no form for; "
                "use str, int, float, bool, None, list, dict, Literal, or a union of these"
            )
        properties[key] = {**schema, **({"description": about[key]} if key in about else {})}
        if parameter.default is parameter.empty:
            required.append(key)
    if unknown := about.keys() - properties.keys():
        raise RequestError(f"{place}: its docstring tells of {min(unknown)}, which is not a parameter")
    parameters = {"type": "object", "properties": properties, "required": required}
    inner = {"name": name, "description": description, "parameters": parameters}
    return Function({"type": "function", "function": inner}, function)


def _json_type(hint: Any) -> dict[str, Any] | None:
    """The JSON schema of a type; None if there is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if hint is Any:
        return {}
    if origin is Literal:
        kinds = {type(value) for value in inner}
        if not kinds <= _NAMES.keys():
            return None
        return (
            {"type": _NAMES[kinds.pop()], "enum": list(inner)} if len(kinds) == 1 else {"enum": list(inner)}
        )
    if origin in (Union, types.UnionType):
        parts = [_json_type(part) for part in inner]
        if None in parts:
            return None
        if all(part is not None and part.keys() == {"type"} for part in parts):
            return {"type": [part["type"] for part in parts if part is not None]}
        return {"anyOf": parts}
    if hint is list or origin is list:
        items = _json_type(inner[0]) if inner else {}
        return None if items is None else {"type": "array", **({"items": items} if items else {})}
    if hint is dict or origin is dict:
        if inner and inner[0] is not str:
            return None
        values = _json_type(inner[1]) if inner else {}
        return (
            None
            if values is None
            else {"type": "object", **({"additionalProperties": values} if values else {})}
        )
    return None


_SECTION = re.compile(
    r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$", re.MULTILINE
)
_ARGUMENT = re.compile(r"(\w+)(?: ?\([^)]*\))?: *(.*)")


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring in Google's style says before its first section, and of each argument."""
    parts = _SECTION.split(text)
    about: dict[str, str] = {}
    for title, body in zip(parts[1::2], parts[2::2]):
        if title not in ("Args", "Arguments", "Parameters"):
            continue
        lines = inspect.cleandoc("\n" + body.strip("\n")).split("\n")
        name = ""
        for line in lines:
            begun = _ARGUMENT.match(line)
            if begun:
                name = begun[1]
                about[name] = begun[2]
            elif name and line.strip():
                about[name] = f"{about[name]} {line.strip()}".strip()
    return parts[0].strip(), about
