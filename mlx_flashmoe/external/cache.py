"""Caches of any kind that a library's model makes, kept and restored by their attributes.

The libraries have many kinds (growing, rotating, quantized, recurrent, pooled, lists of them), and some models have
their own. Each is an object whose attributes are arrays, plain values, or more of such objects.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.models.cache import Cache

PLAIN = (bool, int, float, str, type(None))
FORM = "form"  # the name, in a snapshot, of everything that is not an array: JSON
PACKAGES = ("mlx_lm", "mlx_vlm")  # objects of their classes are taken apart


class ExternalCache(Cache):
    """The caches of all layers of one sequence, as the library's model takes them.

    Attributes:
        theirs: the library's objects.
        offset: tokens seen.
    """

    def __init__(self, theirs: list[Any]):
        self.theirs = theirs
        self.offset = 0

    @property
    def state(self) -> list[mx.array]:
        arrays: list[mx.array] = []
        _form(self.theirs, arrays)
        return arrays

    def snapshot(self) -> dict[str, mx.array]:
        """The arrays, by number, and the form that they are in.

        Raises:
            TypeError: a cache has an attribute that is neither an array nor plain; names it.
        """
        arrays: list[mx.array] = []
        form = _form(self.theirs, arrays)
        if (strange := _strange(form)) is not None:
            raise TypeError(f"a cache of this model holds a {strange}")
        text = np.frombuffer(json.dumps(form).encode(), np.uint8)
        kept = {str(i): mx.contiguous(a) for i, a in enumerate(arrays)}
        return {**kept, FORM: mx.array(text)}

    def restore(self, snapshot: dict[str, mx.array], offset: int) -> None:
        form = json.loads(np.asarray(snapshot[FORM]).tobytes())
        # New array objects: the libraries write into theirs, and the snapshot may be restored again.
        arrays = {int(n): mx.array(a) for n, a in snapshot.items() if n != FORM}
        self.theirs = _made(form, arrays)
        self.offset = offset


def _form(value: Any, arrays: list[mx.array]) -> dict[str, Any]:
    """Describes a value as JSON; its arrays are appended to ``arrays`` and described by their number."""
    if isinstance(value, mx.array):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, PLAIN):
        return {"plain": value}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_form(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_form(k, arrays), _form(v, arrays)] for k, v in value.items()]}
    kind = type(value)
    if kind.__module__.split(".")[0] in PACKAGES and hasattr(value, "__dict__"):
        attributes = {name: _form(item, arrays) for name, item in vars(value).items()}
        return {"object": [kind.__module__, kind.__qualname__], "attributes": attributes}
    return {"strange": f"{kind.__module__}.{kind.__qualname__}"}


def _strange(form: Any) -> str | None:
    """The first class in a form that cannot be restored; None if there is none."""
    if isinstance(form, dict):
        if "strange" in form:
            return str(form["strange"])
        form = list(form.values())
    if isinstance(form, list):
        return next((found for item in form if (found := _strange(item)) is not None), None)
    return None


def _made(form: dict[str, Any], arrays: dict[int, mx.array]) -> Any:
    """The value that a form describes."""
    if "array" in form:
        return arrays[form["array"]]
    if "plain" in form:
        return form["plain"]
    if "list" in form:
        return [_made(item, arrays) for item in form["list"]]
    if "tuple" in form:
        return tuple(_made(item, arrays) for item in form["tuple"])
    if "dict" in form:
        return {_made(k, arrays): _made(v, arrays) for k, v in form["dict"]}
    module, name = form["object"]
    if module.split(".")[0] not in PACKAGES:
        raise ValueError(f"{module}.{name} is not a cache of {' or '.join(PACKAGES)}")
    kind: Any = importlib.import_module(module)
    for part in name.split("."):
        kind = getattr(kind, part)
    value = kind.__new__(kind)
    for attribute, item in form["attributes"].items():
        vars(value)[attribute] = _made(item, arrays)
    return value
