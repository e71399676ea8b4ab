"""Which Metal kernels the package makes, by its source, and which of them in which formats a list of launches has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from metal_emulator import Launch
from mlx_flashmoe.kernels import gpu

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    path for folder in ("mlx_flashmoe", "kernels", "convert") for path in (ROOT / folder).rglob("*.py")
]
MAKERS = ("make", "row_kernel")  # of kernels/gpu.py; the second argument is the kernel's name


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a source file with what is called, as in "gpu.make"; those in MAKERS themselves are left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if path.name == "gpu.py" and isinstance(node, ast.FunctionDef) and node.name in MAKERS:
            continue
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        pending.extend(ast.iter_child_nodes(node))


def names_made() -> dict[str, str]:
    """Every name that the package gives a GPU kernel of its own that Metal may run -> the file that makes it.

    Raises:
        AssertionError: a name that is not written out where the kernel is made, or a kernel made without MAKERS.
    """
    names: dict[str, str] = {}
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        for called, call in calls(path):
            assert not re.search(r"\b(metal_kernel|make_kernel)$", called), (
                f"{where}: {called}(): kernels/gpu.py alone makes Metal kernels, so that tests know of all of them"
            )
            if called in [f"gpu.{maker}" for maker in MAKERS] or (path.name == "gpu.py" and called in MAKERS):
                name = call.args[1]
                branches = [name.body, name.orelse] if isinstance(name, ast.IfExp) else [name]
                for branch in branches:
                    assert isinstance(branch, ast.Constant) and isinstance(branch.value, str), (
                        f"{where}: {called}() takes the name {ast.unparse(name)}: write it out there, or one"
                        " `if` and `else` of two names, so that tests know of it"
                    )
                    names[branch.value] = where
    return names


def mlx_kernels_called() -> list[str]:
    """MLX's own fused kernels that the package calls, as in "mx.fast.rope"."""
    called = {name for path in SOURCES for name, _ in calls(path) if re.fullmatch(r"mx\.fast\.\w+", name)}
    return sorted(called - {"mx.fast.cuda_kernel"})


@dataclass(frozen=True)
class Format:
    """What an expert kernel computes with, or a row kernel, which has a dtype alone."""

    dtype: str  # of the activations
    formulation: str = ""
    bits: int = 0
    group_size: int = 0  # 0: unquantized


@dataclass
class Coverage:
    """Of one kernel."""

    texts: set[str] = field(default_factory=set)
    formats: set[Format] = field(default_factory=set)


KERNEL = re.compile(r"\[\[kernel\]\] void custom_kernel_flashmoe_(\w+?)_[0-9a-f]{8}(?:_\w*)?\(")
ACTIVATIONS = re.compile(r"device (float|bfloat16_t|float16_t)\* [xy] \[\[")
MATRIX = re.compile(r"struct (Gate|Up|Down) \{.*?\bquantized = (\d), bits = (\d+),.*?group_size = (\d+)")
DTYPE = {"float": "float32", "bfloat16_t": "bfloat16", "float16_t": "float16"}


def name_of(launch: Launch) -> str:
    """The name that the package gave the kernel, read from the text that MLX generates."""
    match = KERNEL.search(launch.text)
    assert match, launch.text[-1000:]
    return match[1]


def formats_of(launch: Launch) -> set[Format]:
    """Read from the text, not from what a test meant to launch."""
    text = launch.text
    if rows := re.search(r"^typedef fm_(\w+) T;", text, re.MULTILINE):
        return {Format(rows[1])}
    activations, formulation = ACTIVATIONS.search(text), re.search(r"\bFORMULATION = (\d)", text)
    assert activations and formulation, text[-1000:]
    down = "down" in name_of(launch)
    return {
        Format(
            DTYPE[activations[1]],
            gpu.FORMULATIONS[int(formulation[1])],
            int(bits),
            int(group_size) if quantized == "1" else 0,
        )
        for matrix, quantized, bits, group_size in MATRIX.findall(text)
        if (matrix == "Down") == down
    }


def cover(launches: Iterable[Launch]) -> dict[str, Coverage]:
    """Name -> what the launches have of it."""
    covered: dict[str, Coverage] = {}
    for launch in launches:
        one = covered.setdefault(name_of(launch), Coverage())
        one.texts.add(launch.key)
        one.formats |= formats_of(launch)
    return covered
