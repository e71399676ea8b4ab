"""A command that kills its process in the middle of a conversion: ``python -m …killed UNITS convert …``.

It kills from inside: a small conversion is too short to be hit in the middle from outside.
"""

from __future__ import annotations

import os
import signal
import sys

from mlx_flashmoe import cli
from mlx_flashmoe.convert.journal import Journal


def main(units: int, arguments: list[str]) -> int:
    """Runs a command line, and kills the process when the journal has ``units`` units."""
    finish = Journal.finish

    def killing(self: Journal, unit: str, crcs: list[int]) -> None:
        finish(self, unit, crcs)
        if len(self.done) == units:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.finish = killing  # type: ignore[method-assign]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
