"""Standard input as text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper

from mlx_flashmoe.errors import RequestError


def read_all() -> str:
    """Everything until the end.

    Raises:
        RequestError: it is closed, or not text.
    """
    if sys.stdin is None:
        raise RequestError("the prompt should come from standard input, which is closed; give --prompt TEXT")
    return _text(sys.stdin.read)


def read_line() -> str:
    """The next line with its line break; "" after the last. Raises RequestError: it is not text."""
    return "" if sys.stdin is None else _text(sys.stdin.readline)


def _text(read: Callable[[], str]) -> str:
    if isinstance(sys.stdin, TextIOWrapper) and sys.stdin.errors != "strict":
        # In some locales Python lets bytes through that are no text.
        sys.stdin.reconfigure(errors="strict")
    try:
        return read()
    except UnicodeDecodeError as e:
        raise RequestError(
            f"standard input is not {e.encoding.upper()}: {e.reason} at byte {e.start}; give text"
        ) from None
