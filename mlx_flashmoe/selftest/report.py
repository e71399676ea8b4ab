"""A self-test's rows: as a table, as JSON, and as one line to paste into an issue."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_flashmoe.console import printable
from mlx_flashmoe.selftest.facts import chip, memory_line, versions
from mlx_flashmoe.selftest.trial import FAILED, OUTCOMES, PASSED, SKIPPED, Row
from mlx_flashmoe.sizes import show_size

STYLES = {PASSED: "green", FAILED: "bold red", SKIPPED: "yellow"}


def counts(rows: list[Row]) -> dict[str, int]:
    """Rows of each outcome."""
    counted = Counter(row.outcome for row in rows)
    return {outcome: counted[outcome] for outcome in OUTCOMES}


def issue_line(facts: dict[str, Any], rows: list[Row]) -> str:
    """Versions, chip, memory and outcomes, with the names of rows that failed."""
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in counts(rows).items())
    failed = "; ".join(f"{row.check}: {row.name}" for row in rows if row.outcome == FAILED)
    parts = [
        f"mlx-flashmoe {facts['versions'].get('mlx-flashmoe', 'unknown')} selftest: {outcomes}",
        *([f"failed: {failed}"] if failed else []),
        chip(facts),
        facts["platform"],
        memory_line(facts),
        versions(facts),
    ]
    return " | ".join(parts)


def print_report(console: Console, facts: dict[str, Any], folder: Path, rows: list[Row]) -> None:
    """The facts, a table of the rows, and the line to paste, which is one line however long."""
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", no_wrap=True)
    head.add_column()
    for name, text in {
        "versions": f"mlx-flashmoe {facts['versions'].get('mlx-flashmoe', 'unknown')}, {versions(facts)}",
        "chip": chip(facts),
        "system": facts["platform"],
        "memory": memory_line(facts),
        "disk": f"{show_size(facts['disk_free'])} free in {folder}",
    }.items():
        head.add_row(name, Text(text))
    table = Table.grid(padding=(0, 1))
    table.add_column(width=35)
    table.add_column(no_wrap=True)
    table.add_column()
    before = None
    for row in rows:
        if row.check != before:
            table.add_row(Text(row.check, style="bold"))
            before = row.check
        outcome = Text(row.outcome, style=STYLES[row.outcome])
        table.add_row(Padding(Text(row.name), (0, 0, 0, 2)), outcome, Text(printable(row.detail)))
    console.print(head, "", table, "", sep="\n", highlight=False)
    console.print("To paste into an issue:", style="bold")
    console.print(Text(issue_line(facts, rows)), soft_wrap=True)


def to_json(facts: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Everything."""
    return {
        "facts": facts,
        "rows": [asdict(row) for row in rows],
        **counts(rows),
        "line": issue_line(facts, rows),
    }
