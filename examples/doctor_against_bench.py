"""What doctor predicts beside what bench measures, in one run, at the layer shapes of Qwen3.5-397B-A17B.

    python examples/doctor_against_bench.py --work DIR --json FILE       7.3 GB of disk for the two layers, and 8 more

Setting by setting, doctor and bench run one after the other, each in a process of its own. Weights and tokens
are random, so that routing favours nobody: what counts is doctor's figure for experts that are all equally likely.
Settings with a limit run in a control group that has so much memory, page cache included (Linux, version 1, root).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import true_shapes
from rich.console import Console
from rich.table import Table

from mlx_flashmoe import convert
from mlx_flashmoe.memory import parse_size

GROUPS = Path("/sys/fs/cgroup/memory")
# --expert-memory, active experts, memory limit
SETTINGS = [
    ("os", 10, None),
    ("400MB", 10, None),
    ("2GB", 10, None),
    ("1000GB", 10, None),
    ("os", 4, None),
    ("2GB", 4, None),
    ("400MB", 10, "2.5GB"),
    ("1GB", 4, "3GB"),
]


@contextlib.contextmanager
def limited(limit: str | None) -> Iterator[Path | None]:
    """A control group with that much memory, for a while."""
    if limit is None:
        yield None
        return
    group = GROUPS / f"doctor-{os.getpid()}"
    group.mkdir()
    try:
        os.sync()
        # What is in the page cache already is charged to nobody in the group.
        Path("/proc/sys/vm/drop_caches").write_text("3")
        (group / "memory.limit_in_bytes").write_text(str(parse_size(limit)))
        yield group
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()


def measure(model: Path, expert_memory: str, active: int, limit: str | None, args: Any) -> dict[str, Any]:
    with limited(limit) as group, tempfile.TemporaryDirectory() as scratch:

        def command(*arguments: str) -> dict[str, Any]:
            out = Path(scratch) / "out.json"
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "mlx_flashmoe",
                    *arguments,
                    "--expert-memory",
                    expert_memory,
                    "--json",
                    out,
                ],
                stdout=subprocess.DEVNULL,
                check=True,
                preexec_fn=(lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None,
            )
            report: dict[str, Any] = json.loads(out.read_text())
            return report

        doctor = command("doctor", str(model), "--context", str(args.prompt))
        bench = command(
            *("bench", "--model", str(model), "--active-experts", str(active), "--no-read-ahead"),
            *("--prompts", str(args.prompt), "--tokens", str(args.tokens)),
        )
    slots = bench["arena_slots"]
    row = next(
        row
        for row in doctor["predictions"]
        if row["active_experts"] == active and row["arena_slots"] == slots
    )
    cold, _, answer = bench["phases"]
    return {
        "expert_memory": expert_memory,
        "limit": limit,
        "rates": doctor["rates"],
        "prediction": row,
        "measured": {
            "tokens_per_second": answer["tokens_per_second"],
            "hits": answer["hits"] / (answer["hits"] + answer["misses"]) if answer["misses"] else 1.0,
            "first_token_seconds": cold["seconds"] + 1 / answer["tokens_per_second"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--work", type=Path, help="folder for the weights; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="doctor-"))
    model = work / "converted"
    if not model.exists():
        true_shapes.make_checkpoint(work / "source", args.layers, "mlx4", args.vocabulary)
        convert(str(work / "source"), str(model))
        shutil.rmtree(work / "source")
    limits = GROUPS.exists() and os.geteuid() == 0
    results = [measure(model, *s, args) for s in SETTINGS if limits or s[2] is None]
    if args.work is None:
        shutil.rmtree(work)
    table = Table("experts in", "active", "limit", "tok/s", "predicted", "first token", "predicted", box=None)
    for r in results:
        measured, row = r["measured"], r["prediction"]
        table.add_row(
            r["expert_memory"],
            str(row["active_experts"]),
            r["limit"] or "-",
            f"{measured['tokens_per_second']:.2f}",
            f"{1 / row['token_seconds_at_most']:.2f}",
            f"{measured['first_token_seconds']:.1f} s",
            f"{row['first_token_seconds']:.1f} s",
        )
    Console().print(table)
    if args.json is not None:
        args.json.write_text(json.dumps({"command": sys.argv, "settings": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
