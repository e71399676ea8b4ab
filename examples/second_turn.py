"""Time to the first token of a conversation's second turn: without kept prompts, with them, and after a restart.

    python examples/second_turn.py --model DIR

Messages are random tokens: a long first one, an answer, and a short question. Every measurement is made by a
process of its own; the one after a restart has nothing but the files that the process before it has left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe import load
from mlx_flashmoe.generate import generate_step
from mlx_flashmoe.prefix_cache import PrefixCache
from mlx_flashmoe.sizes import show_size

START = 1  # begins a message; the random tokens are above it
CASES = {"without": "nothing kept", "kept": "in memory", "restarted": "on disk, restarted"}


def turn(model: Any, prompt: list[int], prefixes: PrefixCache | None) -> dict[str, Any]:
    """Seconds until a prompt's first token, and the tokens of the answer."""
    started = time.perf_counter()
    steps = generate_step(mx.array(prompt), model, prefix_cache=prefixes, max_tokens=8)
    tokens = [next(steps)[0]]
    seconds = time.perf_counter() - started
    tokens += [token for token, _ in steps]
    return {"seconds": seconds, "tokens": tokens, "restored": prefixes.restored if prefixes else 0}


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """One process: the first turn, or the second one, or both."""
    model, _ = load(args.model, args.expert_memory)
    rng = np.random.default_rng(0)

    def message(tokens: int) -> list[int]:
        return [START, *rng.integers(2, model.vocab_size, tokens - 1).tolist()]

    first = [*message(args.prefix), START, 2]
    second = [*first[:-2], *message(args.answer), *message(args.question), START, 2]
    # What is compiled at its first use belongs to no turn.
    list(generate_step(mx.array(message(64)), model, max_tokens=2))
    prefixes = PrefixCache(model.identity, START, directory=args.directory)
    if args.case == "first":
        return turn(model, first, prefixes)
    if args.case == "kept":
        turn(model, first, prefixes)
    return turn(model, second, None if args.case == "without" else prefixes)


def run(case: str, directory: str | None) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
    if directory is not None:
        command += ["--directory", directory]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--expert-memory", default="auto")
    parser.add_argument("--prefix", type=int, default=1500, help="tokens of the first message")
    parser.add_argument("--answer", type=int, default=30, help="tokens of the answer to it")
    parser.add_argument("--question", type=int, default=20, help="tokens of the next question")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(worker(args)))
        return

    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(args.repeats):
        runs["without"].append(run("without", None))
        runs["kept"].append(run("kept", None))
        with tempfile.TemporaryDirectory() as directory:
            run("first", directory)
            on_disk = sum(f.stat().st_size for f in Path(directory).iterdir())
            runs["restarted"].append(run("restarted", directory))
    want = runs["without"][0]["tokens"]
    base = statistics.median(r["seconds"] for r in runs["without"])
    table = Table("second turn", "first token", "of each, ms", "shorter", "same tokens", box=None)
    for case, each in runs.items():
        median = statistics.median(r["seconds"] for r in each)
        times = " ".join(f"{1000 * r['seconds']:.0f}" for r in each)
        same = all(r["tokens"] == want for r in each)
        table.add_row(CASES[case], f"{1000 * median:.0f} ms", times, f"{base / median:.1f}x", str(same))
    Console().print(table)
    found = runs["kept"][0]["restored"]
    print(
        f"{found} of {args.prefix + args.answer + args.question + 2} tokens kept; on disk {show_size(on_disk)}"
    )
    if any(r["tokens"] != want for each in runs.values() for r in each):
        raise SystemExit("error: what was kept changed the tokens")


if __name__ == "__main__":
    main()
