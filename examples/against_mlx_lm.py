"""mlx-flashmoe beside mlx-lm on the same synthetic weights, at the layer shapes of Qwen3.5-397B-A17B.

    python examples/against_mlx_lm.py --layers 4 --work DIR            needs 7.3 GB of disk a layer, and mlx-lm

Each of the two runs in a process of its own, one after the other: mlx-lm with everything in memory; mlx-flashmoe
likewise, the same but asking the host for every layer's experts as streaming does, and with --expert-memory for the
experts, at 10 and at 4 active experts. All are fed the same random tokens (a model of random weights would repeat
itself, and with itself its experts). Medians of --repeats; the first run of everything compiles, and is left out. Page
cache warm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import true_shapes
from rich.console import Console
from rich.table import Table

EVERYTHING = "1000GB"
ASKED = "host asked, nothing missing"
# Of each system: a row's name, the experts' memory (None: --expert-memory), active experts (None: the model's own).
ROWS = {
    "mlx-lm": (("mlx-lm, all in memory", EVERYTHING, None), ("mlx-lm, 4 experts", EVERYTHING, 4)),
    "mlx-flashmoe": (
        ("all in memory", EVERYTHING, None),
        (ASKED, EVERYTHING, None),
        ("streamed", None, None),
        ("streamed, 4 experts", None, 4),
    ),
}


def tokens(count: int, vocabulary: int) -> list[int]:
    return np.random.default_rng(0).integers(0, vocabulary, count).tolist()


def feeder(vocabulary: int) -> Callable[[mx.array], mx.array]:
    """A sampler that pays no heed to the model."""
    feed = iter(tokens(4096, vocabulary))
    return lambda logprobs: mx.array([next(feed)])


def decode_rate(steps: Iterator[Any]) -> float:
    """Tokens a second, by the median over all but the first."""
    next(steps)
    took, last = [], time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        took.append(now - last)
        last = now
    return 1 / statistics.median(took)


def load(system: str, name: str, memory: str, active: int | None, work: Path) -> tuple[Any, Any]:
    """A row's model, and its system's generate_step."""
    model: Any
    generate_step: Any
    if system == "mlx-lm":
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model

        model, _ = load_model(work / "source")
        if active is not None:
            for layer in model.layers:
                layer.mlp.top_k = active
    else:
        from mlx_flashmoe import load
        from mlx_flashmoe.generate import generate_step

        model, _ = load(work / "converted", memory, active)
        if name == ASKED:
            model.arena.resident = False
    return model, generate_step


def measure(model: Any, generate_step: Any, vocabulary: int, streamed: bool, args: Any) -> dict[str, Any]:
    prompt = mx.array([tokens(args.prompt, vocabulary)])

    def prefill() -> float:
        if streamed:
            model.arena.clear()
        cache = model.make_cache()
        started = time.perf_counter()
        model(prompt, cache=cache)
        mx.eval([layer.state for layer in cache])
        return args.prompt / (time.perf_counter() - started)

    feed = feeder(vocabulary)  # no repeat sees another's tokens: their experts would still be there

    def decode() -> float:
        start = mx.array(tokens(8, vocabulary))
        return decode_rate(generate_step(start, model, max_tokens=args.tokens + 1, sampler=feed))

    prefill(), decode()
    mx.reset_peak_memory()
    before = model.stats().reads if streamed else 0
    prefills = [prefill() for _ in range(args.repeats)]
    read = (model.stats().reads - before) / args.repeats if streamed else 0
    decodes = [decode() for _ in range(args.repeats)]
    return {"prefill": prefills, "decode": decodes, "peak": mx.get_peak_memory(), "reads": read}


def measure_all(system: str, work: Path, args: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A system's rows, one after the other."""
    vocabulary = true_shapes.TRUE_VOCABULARY if args.vocabulary is None else args.vocabulary
    for name, memory, active in ROWS[system]:
        model, generate_step = load(system, name, memory or args.expert_memory, active, work)
        yield name, measure(model, generate_step, vocabulary, memory is None, args)
        del model
        mx.clear_cache()


def prepare(work: Path, args: Any) -> None:
    from mlx_flashmoe import convert

    vocabulary = true_shapes.TRUE_VOCABULARY if args.vocabulary is None else args.vocabulary
    true_shapes.make_checkpoint(work / "source", args.layers, "mlx4", vocabulary)
    convert(str(work / "source"), str(work / "converted"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--expert-memory", default="4GiB")
    parser.add_argument(
        "--work", type=Path, help="folder for the weights, kept for another run; default: none"
    )
    parser.add_argument("--system", choices=ROWS, help="measure this one alone; prints JSON")
    args = parser.parse_args()
    if args.system:
        for row in measure_all(args.system, args.work, args):
            print(json.dumps(row), flush=True)
        return
    work = args.work or Path(tempfile.mkdtemp(prefix="against-mlx-lm-"))
    console = Console()
    columns = ("tokens a second of", "prompt", "answer", "ms a layer", "peak GB", "prompt reads")
    table = Table(*columns, box=None)
    try:
        if not (work / "converted").exists():
            prepare(work, args)
        for system in ROWS:
            command = [sys.executable, __file__, *sys.argv[1:], "--work", str(work), "--system", system]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for name, figures in map(json.loads, result.stdout.splitlines()):
                rate = statistics.median(figures["decode"])
                table.add_row(
                    name,
                    f"{statistics.median(figures['prefill']):.0f}",
                    f"{rate:.1f}",
                    f"{1e3 / rate / args.layers:.2f}",
                    f"{figures['peak'] / 1e9:.1f}",
                    f"{figures['reads']:.0f}",
                )
    finally:
        if args.work is None:
            shutil.rmtree(work)
    console.print(table)


if __name__ == "__main__":
    main()
