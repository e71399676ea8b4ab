"""Decides which custom kernels a GPU uses: those that were compared with plain operations there and found right.

Each kernel is compared once for each set of shapes and dtypes. The outcome is kept in the user's cache, for this chip,
system, version of MLX and text of the kernels. A kernel that does not compile, or whose results differ, is not used:
plain operations take its place, and the user is told.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_flashmoe import system, user_cache

MODES = ("auto", "custom", "mlx")
TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 1e-2, mx.float16: 1e-2}
REPORT = "please report it with the last line of: python -m mlx_flashmoe selftest"

_mode = "auto"
_wrong: dict[tuple[Hashable, ...], str] = {}  # signature -> the fault that was found; "" for none


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


_tell: Callable[[str], None] = _warn


def use(mode: str, tell: Callable[[str], None] | None = None) -> None:
    """Sets, for the process, how kernels are chosen.

    Args:
        mode: "auto" compares each kernel before its first use; "custom" uses them unseen; "mlx" uses plain operations
            only.
        tell: is given a line about each kernel that is not used because it is wrong; warnings.warn if None.
    """
    global _mode, _tell
    if mode not in MODES:
        raise ValueError(f"[kernels] a mode is one of {', '.join(MODES)}, but got {mode!r}")
    _mode, _tell = mode, tell or _warn


def mode() -> str:
    return _mode


def served(name: str, signature: tuple[Hashable, ...], compare: Callable[[], str]) -> bool:
    """Tells whether a kernel is used for these shapes and dtypes.

    Args:
        name: of the kernel, for messages.
        signature: everything that the kernel's text depends on.
        compare: returns the kernel's fault, "" for none; called at most once per signature.
    """
    if _mode != "auto":
        return _mode == "custom"
    key = (name, *signature)
    if key not in _wrong:
        file = kept_name("checked", key)
        kept = user_cache.read("kernels", file)
        found = Fault(kept.decode(), lasting=True) if kept is not None else fault(compare)
        if kept is None and found.lasting:
            user_cache.write("kernels", file, found.text.encode())
        _wrong[key] = found.text
        if found.text:
            tell(name, found.text)
    return not _wrong[key]


class Fault(NamedTuple):
    """Attributes:
    text: what is wrong with a kernel; "" if nothing is.
    lasting: the next process would find the same. An unreadable file or a missing library is no such fault.
    """

    text: str
    lasting: bool


def fault(compare: Callable[[], str]) -> Fault:
    """Returns the fault that ``compare`` finds, or the first line of the error that it ends with."""
    try:
        return Fault(compare(), lasting=True)
    except Exception as e:  # whatever it is, the model is to run without this kernel
        lines = [line.strip() for line in str(e).splitlines() if "error" in line] or str(e).splitlines()
        compiler = isinstance(e, (RuntimeError, ValueError))  # what MLX and the compilers raise
        return Fault(f"it does not run: {lines[0] if lines else type(e).__name__}", lasting=compiler)


def tell(name: str, wrong: str) -> None:
    """Reports a kernel that is not used, to the callback that ``use`` was given."""
    _tell(
        f"the {name} kernel is not used on this GPU: {wrong}; MLX's own operations take its place; {REPORT}"
    )


def judge(got: Sequence[mx.array], expected: Sequence[mx.array], tolerance: float) -> str:
    """Returns the fault of ``got``, "" for none: each array may differ by ``tolerance`` of the expected norm."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        x, y = (np.array(v.astype(mx.float32)).astype(np.float64) for v in (a, b))
        off = float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
        worst = max(worst, off if np.isfinite(off) else float("inf"))
    return "" if worst <= tolerance else f"its results differ by {worst:.1e}, allowed is {tolerance:.0e}"


def normals(*shapes: tuple[int, ...]) -> list[mx.array]:
    """Random float32 arrays, always the same; MLX's own random state, which sampling uses, is left alone."""
    rng = np.random.default_rng(0)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def wrong() -> list[str]:
    """The names of the kernels that were found wrong, sorted."""
    return sorted({str(key[0]) for key, what in _wrong.items() if what})


def kept_name(kind: str, key: object) -> str:
    """The name of a file in the user's cache for ``key`` on this device, with this MLX and these kernels."""
    return f"{kind}-{hashlib.sha256(f'{_here()} {key}'.encode()).hexdigest()[:32]}"


@cache
def _here() -> str:
    info = mx.device_info()
    texts = hashlib.sha256()
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if file.is_file():
            texts.update(file.read_bytes())
    chip = (info.get("device_name"), info.get("architecture"))
    return f"{chip} {system.release()} {version('mlx')} {texts.hexdigest()}"
