"""What a JSON schema says about a value, as far as it takes to read the value from text."""

from __future__ import annotations

import ast
import json
import sys
import warnings
from typing import Any


def property_schema(schema: Any, key: str) -> Any:
    """The schema of one property of an object's schema; None if it says nothing about it."""
    for part in _alternatives(schema, schema):
        properties = part.get("properties")
        if isinstance(properties, dict) and key in properties:
            return properties[key]
    return None


def _alternatives(schema: Any, root: Any) -> list[dict[str, Any]]:
    """A schema and those it is made of: what ``$ref`` within ``root``, ``anyOf``, ``oneOf`` and ``allOf`` name."""
    parts: dict[int, dict[str, Any]] = {}
    todo = [schema]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict) or id(part) in parts:
            continue
        parts[id(part)] = part
        for key in ("anyOf", "oneOf", "allOf"):
            inner = part.get(key)
            todo += inner if isinstance(inner, list) else ()
        todo.append(referred(part, root))
    return list(parts.values())


def referred(schema: dict[str, Any], root: Any) -> Any:
    """What ``$ref`` names within ``root``; None if there is no such thing."""
    ref = schema.get("$ref")
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    target = root
    for step in ref.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        target = target.get(step) if isinstance(target, dict) else None
    return target


# What people write by hand for JSON's own names.
_ALIASES = {"int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array"}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}


def value_types(schema: Any, root: Any) -> set[str]:
    """Names of the JSON types a schema allows; none if it does not say."""
    types: set[str] = set()
    for part in _alternatives(schema, root):
        named, values = part.get("type"), part.get("enum")
        types |= {
            _ALIASES.get(t, t) for t in (named if isinstance(named, list) else [named]) if isinstance(t, str)
        }
        for value in values if isinstance(values, list) else [part["const"]] if "const" in part else []:
            types |= {"string"} if isinstance(value, str) else {t for t in _PYTHON_TYPES if _is(value, t)}
    return types


def typed_value(text: str, types: set[str]) -> Any:
    """A parameter's text as a value of one of the types; text stays text where it cannot be one."""
    if not types:
        return None if text.strip().lower() == "null" else text
    if types == {"string"}:
        return text
    try:
        value = _read_value(text)
    except ValueError:
        return text
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        value = int(value)
    # A wrong type is given as it is, for whoever checks the call to complain of; a string takes anything.
    if isinstance(value, str) or ("string" in types and not any(_is(value, t) for t in types)):
        return text
    return value


def _is(value: Any, json_type: str) -> bool:
    if isinstance(value, bool) and json_type != "boolean":
        return False
    return isinstance(value, _PYTHON_TYPES.get(json_type, ()))


_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _read_value(text: str) -> Any:
    """A value written as JSON or as Python would write it. ValueError if it is neither."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return read_json(text)
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler has remarks on some strings
            value = ast.literal_eval(text)
        # Through JSON, which has no tuples and no keys but strings.
        return json.loads(json.dumps(value, allow_nan=False))
    except (SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise ValueError(str(e)) from None


def read_json(text: str) -> Any:
    """JSON, but line breaks may stand in strings. ValueError for NaN and infinity too, which JSON has not.

    Numbers too large for a float are the largest one.
    """

    def finite(number: str) -> float:
        return max(-sys.float_info.max, min(float(number), sys.float_info.max))

    def whole(number: str) -> int:
        return int(number) if len(number) < 4000 else int(finite(number))  # int() has a limit of its own

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, strict=False, parse_float=finite, parse_int=whole, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
