"""A prompt in one piece against the same prompt token by token: experts read, and time.

    python examples/prompt_against_tokens.py --model DIR --prompt 512 --expert-memory 1GB [--direct-reads]

Both begin with nothing resident and the expert files out of the page cache. A prompt in one piece reads each expert
that any of its tokens is routed to once; with --direct-reads the page cache never helps, as if the model were many
times larger than memory. Tokens are random, routing is the model's own. Medians of --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe import load
from mlx_flashmoe.generate import prefill
from mlx_flashmoe.loader import StreamingModel
from mlx_flashmoe.sizes import show_size


def routed_experts(model: StreamingModel, prompt: mx.array) -> int:
    """Distinct (layer, expert) pairs that a prompt is routed to, counted where the router's choice is known."""
    seen: set[tuple[int, int]] = set()
    touch = model.arena.touch

    def spy(layer: int, experts: np.ndarray) -> bool:
        seen.update((layer, e) for e in experts.tolist())
        return touch(layer, experts)

    model.arena.touch = spy  # type: ignore[method-assign]
    prefill(model, prompt, model.make_cache(), prompt.size)
    model.arena.touch = touch  # type: ignore[method-assign]
    return len(seen)


def measure(model: StreamingModel, prompt: mx.array, step: int) -> tuple[float, int]:
    """Seconds and expert bytes read of a prompt given ``step`` tokens at a time."""
    model.arena.clear()
    model.arena.store.drop_page_cache()
    before, started = model.stats(), time.perf_counter()
    prefill(model, prompt, model.make_cache(), step)
    return time.perf_counter() - started, (model.stats() - before).bytes_read


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--expert-memory", default="auto")
    parser.add_argument("--direct-reads", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, _ = load(args.model, args.expert_memory, direct_reads=args.direct_reads)
    if model.resident:
        raise SystemExit("error: all experts fit in memory; give less --expert-memory")
    prompt = mx.array(np.random.default_rng(0).integers(0, model.vocab_size, args.prompt))
    union = routed_experts(model, prompt) * model.arena.slot_bytes
    ways = {"in one piece": model.prefill_chunk, "token by token": 1}
    runs: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, step in ways.items():
            runs[way].append(measure(model, prompt, step))
    seconds = {way: statistics.median(s for s, _ in each) for way, each in runs.items()}
    table = Table("", "seconds", "tok/s", "read", "of the routed experts' bytes", box=None)
    for way, each in runs.items():
        read = statistics.median(n for _, n in each)
        rate = args.prompt / seconds[way]
        table.add_row(way, f"{seconds[way]:.2f}", f"{rate:.1f}", show_size(read), f"{read / union:.3f}")
    console = Console()
    console.print(table)
    console.print(f"in one piece is {seconds['token by token'] / seconds['in one piece']:.1f} times as fast")


if __name__ == "__main__":
    main()
