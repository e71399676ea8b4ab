"""The command: facts, rows, report, in a folder that is gone afterwards."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.reports import check_report, write_report
from mlx_flashmoe.selftest.facts import facts_of
from mlx_flashmoe.selftest.report import counts, print_report, to_json
from mlx_flashmoe.selftest.trial import FAILED
from mlx_flashmoe.selftest.worker import perform_all
from mlx_flashmoe.terminal.bars import Bar


def run(folder: str | None = None, json_file: str | None = None, console: Console | None = None) -> bool:
    """Makes every check, prints a table, writes JSON.

    Args:
        folder: on the disk to measure; the user's folder for temporary files by default.
        json_file: where to write facts and rows.
        console: to print on; stdout by default.

    Returns:
        whether no row has failed.

    Raises:
        RequestError: a file or a folder that cannot be written.
    """
    check_report(json_file)
    base = Path(tempfile.gettempdir() if folder is None else folder)
    facts = None
    try:
        with tempfile.TemporaryDirectory(prefix="flashmoe-selftest-", dir=base) as name:
            facts = facts_of(base)
            bar = _bar()
            try:
                rows = perform_all(Path(name).resolve(), bar)
            finally:
                bar.close()
    except OSError as e:
        if facts is not None:
            raise
        raise RequestError(
            f"{base}: no folder can be made there: {e.strerror}; give --folder another"
        ) from None
    print_report(console or Console(highlight=False), facts, base, rows)
    if json_file is not None:
        write_report(json_file, to_json(facts, rows))
    return counts(rows)[FAILED] == 0


def _bar() -> Bar:
    """Rows done, of all of them; nothing where stderr is no terminal."""
    return Bar(
        SpinnerColumn(),
        TextColumn("Self-test"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        delay=0,
    )
