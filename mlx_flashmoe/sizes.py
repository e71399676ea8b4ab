"""Bytes and times, for people."""

from __future__ import annotations


def show_size(n: float) -> str:
    """A size for people: "6.75 MB", "209 GB" (powers of ten)."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if n < 1000:
            break
        n, unit = n / 1000, larger
    return f"{n:.0f} {unit}" if n >= 100 or unit == "bytes" else f"{n:.3g} {unit}"


def show_duration(seconds: float) -> str:
    """A time for people: "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def counted(n: int, noun: str) -> str:
    """A number of things: "1 layer", "60 layers"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
