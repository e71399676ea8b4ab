"""One thing that is tried, and the row of the report that it gives. Whatever it raises becomes a row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

from mlx_flashmoe.errors import FlashMoEError

PASSED, FAILED, SKIPPED = OUTCOMES = ("passed", "failed", "skipped")
LONGEST = 400  # characters of a detail


@dataclass(frozen=True)
class Trial:
    """``run`` returns a detail worth reading; raises Skip, Wrong, or anything else that went wrong."""

    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Row:
    """Attributes:
    check, name: what was tried.
    outcome: one of OUTCOMES.
    detail: figures of what passed, the reason of everything else.
    seconds: it took.
    """

    check: str
    name: str
    outcome: str
    detail: str
    seconds: float = 0.0


class Skip(Exception):
    """The trial cannot be made here. The message is the reason."""


class Wrong(Exception):
    """A result is not as it should be. The message says how."""


def perform(check: str, trial: Trial) -> Row:
    """Makes a trial."""
    started = perf_counter()
    try:
        outcome, detail = PASSED, trial.run()
    except Skip as e:
        outcome, detail = SKIPPED, str(e)
    except Exception as e:
        outcome, detail = FAILED, reason(e)
    return Row(check, trial.name, outcome, detail[:LONGEST], perf_counter() - started)


def reason(error: Exception) -> str:
    """An error in one line: of a compiler's output its first error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if re.search(r"\berror\b\s*(:|#|\w*\d)", line)), None)
    said = said or (lines[0] if lines else "")
    if isinstance(error, (Wrong, FlashMoEError)):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def shown(error: float) -> str:
    """An error for people: "0", "2e-6", "3"."""
    if error >= 1 or error == 0 or math.isnan(error):
        return f"{error:.0f}"
    return re.sub("e-0+", "e-", f"{error:.0e}")


def compared(parts: Mapping[str, Callable[[], float]], allowed: Mapping[str, float]) -> str:
    """The errors of several parts, by name. All are computed, whatever becomes of the others.

    Raises:
        Wrong: names every part whose error is larger than allowed, or that raises.
    """
    good: list[str] = []
    bad: dict[str, list[str]] = {}  # a complaint -> the parts it is about
    for name, compute in parts.items():
        try:
            error = compute()
        except Exception as e:
            bad.setdefault(reason(e), []).append(name)
            continue
        if error <= allowed[name]:
            good.append(f"{name} {shown(error)}")
        else:
            complaint = f"differs by {shown(error)}, allowed is {shown(allowed[name])}"
            bad.setdefault(complaint, []).append(name)
    if bad:
        raise Wrong("; ".join(f"{', '.join(names)}: {complaint}" for complaint, names in bad.items()))
    return ", ".join(good)
