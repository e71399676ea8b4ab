"""Bytes, for people."""

from __future__ import annotations


def show_size(n: float) -> str:
    """A size for people: "6.75 MB", "209 GB" (powers of ten)."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if n < 1000:
            break
        n, unit = n / 1000, larger
    return f"{n:.0f} {unit}" if n >= 100 or unit == "bytes" else f"{n:.3g} {unit}"
