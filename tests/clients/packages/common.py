"""What every script of this folder does: two questions to a server at the address that the environment has.

The first asks for a file, which the model reads with the tool that the script offers; the second continues. Printed
are both answers, and the tokens of the last prompt that the client says were known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

AGAIN = "What was the code word?"


def read_file(path: str) -> str:
    """Returns the text of a file.

    Args:
        path: of the file.
    """
    return Path(path).read_text()


def main(talk: Callable[[str], tuple[str, str, int | None]]) -> None:
    """Calls ``talk`` with the first question; prints what it returns."""
    first, again, cached = talk(f"Read the file {sys.argv[1]} and tell me the code word")
    print(json.dumps({"first": first, "again": again, "cached": cached}))
