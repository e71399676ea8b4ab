"""The command ``models``: the architectures that can be converted, and how each runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlx_flashmoe.external.library import LIBRARIES, Library
from mlx_flashmoe.models import ARCHITECTURES

NATIVE = "native"
SWITCH = re.compile(r"\bswitch_layers\b|\bSwitch(GLU|MLP|Linear)\b")
# "from .x import", "from ..x.y import", "from . import x, y": of modules in the same package.
IMPORTED = re.compile(r"^\s*from \.+([\w.]*) import ([^\n#]+)", re.MULTILINE)
# The class that a module of an architecture has, its own or another's.
MODEL = re.compile(r"^(class Model\b|from .* import .*\bModel\b)", re.MULTILINE)
HELPERS = {"switch_layers", "base", "cache", "activations", "kernels", "linear", "fast_ops"}


@dataclass(frozen=True)
class Supported:
    """Attributes:
    model_type: of config.json.
    through: NATIVE, or the name of a library.
    """

    model_type: str
    through: str


def supported() -> list[Supported]:
    """Architectures of this package and of the libraries that are installed, in the order of their names."""
    through = dict.fromkeys(sorted(ARCHITECTURES), NATIVE)
    for library in LIBRARIES.values():
        for model_type in with_experts(library):
            through.setdefault(model_type, library.name)
    return [Supported(model_type, name) for model_type, name in sorted(through.items(), key=_by_name)]


def _by_name(item: tuple[str, str]) -> str:
    return item[0].lower()


def missing() -> list[str]:
    """Libraries that are not installed."""
    return [name for name, library in LIBRARIES.items() if not library.installed]


def with_experts(library: Library) -> list[str]:
    """A library's architectures whose source has layers of experts, or is built on one that has.

    Read, not imported: there are hundreds. Names that the library maps to others are among them.
    """
    if not library.installed:
        return []
    spec = importlib.util.find_spec(f"{library.module}.models")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    texts = {name: text for folder in folders for name, text in _texts(folder).items()}
    direct = {name for name, text in texts.items() if SWITCH.search(text)}
    found = direct - HELPERS
    grown = True
    while grown:
        more = {name for name, text in texts.items() if name not in found and _imports(text) & found}
        grown = bool(more - HELPERS)
        found |= more - HELPERS
    mapped = [kind for kind, name in library.aliases().items() if name in found]
    return sorted({*(name for name in found if MODEL.search(texts[name])), *mapped})


def _texts(folder: Path) -> dict[str, str]:
    """The source of each module of a package of models; of a module that is a folder, that of all its files."""
    texts = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            texts[path.stem] = path.read_text(encoding="utf-8")
        elif (path / "__init__.py").is_file():
            texts[path.name] = "\n".join(f.read_text(encoding="utf-8") for f in sorted(path.glob("*.py")))
    return texts


def _imports(text: str) -> set[str]:
    """Names of modules of the same package that a module imports."""
    names: set[str] = set()
    for module, items in IMPORTED.findall(text):
        names.add(module.split(".")[0])
        if not module:
            names.update(item.strip().split(" ")[0] for item in items.strip("()").split(","))
    return names - {""}


def run(as_json: bool) -> None:
    """Prints the list."""
    rows = supported()
    if as_json:
        print(json.dumps([{"model_type": row.model_type, "through": row.through} for row in rows], indent=2))
        return
    console = Console(file=sys.stdout, highlight=False, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("through", no_wrap=True)
    table.add_column("model_type in config.json", overflow="fold")
    for through in (NATIVE, *LIBRARIES):
        names = [row.model_type for row in rows if row.through == through]
        if through == NATIVE:
            label = NATIVE
        else:
            library = LIBRARIES[through]
            label = f"{through} {library.version}" if library.installed else through
        if names:
            table.add_row(label, ", ".join(names))
        else:
            table.add_row(
                label, f"not installed: pip install 'mlx-flashmoe[{through}]' adds its architectures"
            )
    console.print(table)
    if len(missing()) < len(LIBRARIES):
        console.print(
            "\nThose of libraries are the ones whose source has layers of experts. convert and doctor read a model's "
            "headers first, and say which of it cannot be streamed."
        )
