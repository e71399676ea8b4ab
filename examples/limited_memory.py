"""Generates under a memory limit, with several --expert-memory settings, and compares them. Linux, as root.

    python examples/limited_memory.py --model DIR --fraction 8 --settings os 200MB auto 400MB+direct

Each setting runs in a process of its own, in a control group whose limit is the model's size over --fraction: page
cache counts, as it does on a machine with that much memory. The tokens fed are random and the same for all; the
most likely next token at every step must be the same for all, and the same as without a limit. Rates are medians
over tokens, of --repeats runs in turn. "+direct" behind a setting reads around the page cache, as --direct-reads does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_flashmoe.layout import Manifest
from mlx_flashmoe.sizes import show_size

GROUPS = Path("/sys/fs/cgroup/memory")

WORKER = """
import json, statistics, sys, time
import mlx.core as mx, numpy as np
from mlx_flashmoe import load
from mlx_flashmoe.generate import prefill
memory, _, direct = sys.argv[2].partition("+")
model, _ = load(sys.argv[1], expert_memory=memory, direct_reads=direct == "direct")
rng = np.random.default_rng(0)
prompt = mx.array(rng.integers(0, model.vocab_size, int(sys.argv[3])))
feed = rng.integers(0, model.vocab_size, int(sys.argv[4])).tolist()
cache = model.make_cache()
chosen, took = [], []
prefill(model, prompt, cache, model.prefill_chunk)
before = model.stats()
for token in feed:
    started = time.perf_counter()
    chosen.append(int(mx.argmax(model(mx.array([[token]]), cache)[0, -1])))
    took.append(time.perf_counter() - started)
spent = model.stats() - before
print(json.dumps({
    "rate": 1 / statistics.median(took[len(took) // 4 :]), "chosen": chosen, "arena": model.plan.arena,
    "hits": spent.hits / max(1, spent.hits + spent.misses), "read": spent.bytes_read / len(feed),
}))
"""


def run(arguments: list[str], limit: int | None) -> dict[str, Any]:
    """One process of WORKER, under ``limit`` bytes if given; "peak" is what its control group held at most."""
    group = GROUPS / f"flashmoe-{os.getpid()}"
    if limit is not None:
        group.mkdir()
        # What is in the page cache already is charged to nobody in the group.
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        (group / "memory.limit_in_bytes").write_text(str(limit))
    try:
        result = subprocess.run(
            [sys.executable, "-c", WORKER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if limit else None,
        )
        if result.returncode:
            raise SystemExit(f"error: a run under {limit} bytes ended with status {result.returncode}")
        measured: dict[str, Any] = json.loads(result.stdout)
        if limit is not None:
            measured["peak"] = int((group / "memory.max_usage_in_bytes").read_text())
            measured["failures"] = int((group / "memory.failcnt").read_text())
        return measured
    finally:
        if limit is not None:
            (group / "memory.force_empty").write_text("0")
            group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--fraction", type=float, default=8, help="the limit is the model's size over this")
    parser.add_argument("--settings", nargs="+", default=["os", "auto"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not (GROUPS / "cgroup.procs").exists() or os.geteuid() != 0:
        raise SystemExit("error: needs root and control groups of version 1 (/sys/fs/cgroup/memory)")
    manifest = Manifest.load(args.model)
    size = manifest.expert_bytes + manifest.dense_bytes
    limit = int(size / args.fraction)
    console = Console()
    console.print(f"model {show_size(size)}, limit {show_size(limit)}")

    def worker(setting: str) -> list[str]:
        return [args.model, setting, str(args.prompt), str(args.tokens)]

    want = run(worker("auto"), None)["chosen"]
    runs: dict[str, list[dict[str, Any]]] = {setting: [] for setting in args.settings}
    for _ in range(args.repeats):
        for setting in args.settings:
            runs[setting].append(run(worker(setting), limit))
    table = Table(
        "setting", "arena", "tok/s", "of each", "hits", "read a token", "peak", "same tokens", box=None
    )
    for setting, each in runs.items():
        rates = [r["rate"] for r in each]
        table.add_row(
            setting,
            show_size(each[0]["arena"]),
            f"{statistics.median(rates):.2f}",
            " ".join(f"{r:.2f}" for r in rates),
            f"{100 * each[0]['hits']:.0f}%",
            show_size(each[0]["read"]),
            show_size(max(r["peak"] for r in each)),
            "yes" if all(r["chosen"] == want for r in each) else "NO",
        )
    console.print(table)
    if any(r["chosen"] != want for each in runs.values() for r in each):
        raise SystemExit("error: a limit changed the tokens")


if __name__ == "__main__":
    main()
