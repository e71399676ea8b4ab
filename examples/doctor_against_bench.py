"""What doctor predicts beside what bench measures, in one run, at the layer shapes of Qwen3.5-397B-A17B.

    python examples/doctor_against_bench.py --work DIR --json FILE       7.3 GB of disk for the two layers, and 8 more

Setting by setting, doctor, bench and an answer run one after the other, each in a process of its own. Weights and
tokens are random, so that routing favours nobody: what counts is doctor's figure for experts that are all equally
likely. The first token is bench's, from a cold page cache. An answer's rate is measured apart, after all expert files
have been read once: bench's page cache holds no more than what its prompt was routed to, of 4 experts and 256 tokens
87%, while doctor predicts what comes when it has filled.
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


ANSWER = """
import json, statistics, sys, time
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_flashmoe import load
from mlx_flashmoe.generate import generate_step
folder, expert_memory, active, prompt, tokens, out = sys.argv[1:]
buffer = bytearray(1 << 23)
for path in sorted(Path(folder, "experts").iterdir()):
    with open(path, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass
model, _ = load(folder, expert_memory=expert_memory, active_experts=int(active), read_ahead=False)
ids = np.random.default_rng(0).integers(0, model.vocab_size, int(prompt))
took, spent, last = [], [], None
for _ in generate_step(mx.array(ids), model, max_tokens=int(tokens)):
    now, stats = time.perf_counter(), model.stats()
    if last is not None:
        took.append(now - last[0])
        spent.append(stats - last[1])
    last = now, stats
hits, misses = sum(s.hits for s in spent), sum(s.misses for s in spent)
report = {
    "tokens_per_second": 1 / statistics.median(took),
    "reading_seconds": statistics.median(s.reading_seconds for s in spent),
    "hits": hits / (hits + misses) if misses else 1.0,
}
Path(out).write_text(json.dumps(report))
"""


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

        def python(*arguments: object) -> dict[str, Any]:
            out = Path(scratch) / "out.json"
            subprocess.run(
                [sys.executable, *map(str, arguments), out],
                stdout=subprocess.DEVNULL,
                check=True,
                preexec_fn=(lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None,
            )
            report: dict[str, Any] = json.loads(out.read_text())
            return report

        def command(*arguments: object) -> dict[str, Any]:
            return python("-m", "mlx_flashmoe", *arguments, "--expert-memory", expert_memory, "--json")

        doctor = command("doctor", model, "--context", args.prompt)
        bench = command(
            *("bench", "--model", model, "--active-experts", active, "--no-read-ahead"),
            *("--prompts", args.prompt, "--tokens", 2),
        )
        answer = python("-c", ANSWER, model, expert_memory, active, args.prompt, args.tokens)
    slots = bench["arena_slots"]
    row = next(
        row
        for row in doctor["predictions"]
        if row["active_experts"] == active and row["arena_slots"] == slots
    )
    cold = bench["phases"][0]
    return {
        "expert_memory": expert_memory,
        "limit": limit,
        "prompt": args.prompt,
        "rates": doctor["rates"],
        "prediction": row,
        "measured": {
            **answer,
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
