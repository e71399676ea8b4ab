"""What was asked for: bits and group sizes, for everything, for the experts, and layer by layer.

A recipe file is TOML. All of it is optional. The command line's own options come before what it says of the whole
model (--q-bits before gate_up and down, too), but not before its [layers]:

    bits = 4              # everything that is not named below
    group_size = 64
    gate_up = 3           # bits of all experts' gate_proj and up_proj …
    down = 4              # … and of their down_proj

    [layers."0-3,59"]     # experts of these layers; says what differs
    bits = 6
    group_size = 32
    down = 8
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

from mlx_flashmoe.errors import ConversionError
from mlx_flashmoe.layout import BITS, GROUP_SIZES, UNQUANTIZED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ALLOWED = {
    "bits": (*BITS, UNQUANTIZED),
    "gate_up": (*BITS, UNQUANTIZED),
    "down": (*BITS, UNQUANTIZED),
    "group_size": GROUP_SIZES,
}


@dataclass(frozen=True)
class Choice:
    """Bits and group size; None where nothing was asked for."""

    bits: int | None = None
    group_size: int | None = None
    gate_up: int | None = None
    down: int | None = None

    def over(self, other: Choice) -> Choice:
        """This choice, and the other one where this asks for nothing."""
        # Bits given here mean all of the experts, and so come before the other's for one projection.
        other_gate_up, other_down = (None, None) if self.bits else (other.gate_up, other.down)
        return Choice(
            self.bits or other.bits,
            self.group_size or other.group_size,
            self.gate_up or other_gate_up,
            self.down or other_down,
        )

    def projection(self, name: str) -> tuple[int | None, int | None]:
        """(bits, group size) of the experts' ``gate``, ``up`` or ``down``."""
        return (self.down if name == "down" else self.gate_up) or self.bits, self.group_size

    def to_json(self) -> dict[str, int]:
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Recipe:
    """The choice for the whole model, and what layers have instead."""

    model: Choice = Choice()
    layers: dict[int, Choice] = field(default_factory=dict)

    def layer(self, number: int) -> Choice:
        """The choice for a layer's experts."""
        return self.layers[number].over(self.model) if number in self.layers else self.model

    def to_json(self) -> dict[str, Any]:
        layers = {str(n): c.to_json() for n, c in sorted(self.layers.items())}
        return {**self.model.to_json(), **({"layers": layers} if layers else {})}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Recipe:
        """Reads what ``to_json`` wrote, or a recipe file holds. Raises ConversionError."""
        if not isinstance(data, dict):
            raise ConversionError(f"{where}: not a table")
        data = dict(data)
        tables = data.pop("layers", {})
        if not isinstance(tables, dict):
            raise ConversionError(f'{where}: layers is not a table of tables such as [layers."0-3"]')
        layers: dict[int, Choice] = {}
        for name, table in tables.items():
            at = f"{where}: layers.{short(name)}"
            choice = _choice(table, at)
            for number in _numbers(name, at):
                if number in layers:
                    raise ConversionError(f"{at}: layer {number} is named twice")
                layers[number] = choice
        return cls(_choice(data, where), layers)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Raises ConversionError: the file cannot be read, or is no recipe."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConversionError(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ConversionError(f"{path}: not valid TOML: {e}") from None
    return Recipe.from_json(data, str(path))


def check(option: str, value: Any, allowed: tuple[int, ...]) -> None:
    """Raises ConversionError unless ``value`` is None or one of ``allowed``."""
    if value is not None and (type(value) is not int or value not in allowed):
        raise ConversionError(f"{option} must be one of {', '.join(map(str, allowed))}, not {short(value)}")


def _choice(table: Any, where: str) -> Choice:
    if not isinstance(table, dict):
        raise ConversionError(f"{where} is not a table")
    for key, value in table.items():
        if key not in _ALLOWED:
            raise ConversionError(f"{where}: {short(key)} is unknown; {', '.join(_ALLOWED)} are known")
        if value is None:
            raise ConversionError(f"{where}: {key} has no value")
        check(f"{where}: {key}", value, _ALLOWED[key])
    return Choice(**table)


def _numbers(text: str, where: str) -> list[int]:
    """The numbers of "0-3,59"."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ConversionError(f'{where}: not layers; give numbers and ranges such as "0-3,59"')
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers
