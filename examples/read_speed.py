"""Reading whole experts into the arena, beside plain reads of the same sizes and a copy of memory, in turn.

    python examples/read_speed.py --model DIR --experts 64 --repeats 9          a converted folder, see true_shapes.py

Cold asks the operating system to drop the expert files from its page cache first; warm has just read the same experts.
Plain reads are bench's, by as many threads. The copy is numpy's, by as many threads.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe.bench.model import plain_reads
from mlx_flashmoe.experts import ExpertStore
from mlx_flashmoe.experts.readers import READ_THREADS
from mlx_flashmoe.experts.slab import make_slab
from mlx_flashmoe.experts.store import ReadRequest
from mlx_flashmoe.layout import Manifest

COPIED = 480 * 10**6  # bytes, more than any cache


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--experts", type=int, default=64, help="read at a time")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    store = ExpertStore(args.model, Manifest.load(args.model))
    every = [(layer, expert) for layer in store.layers for expert in range(store.num_experts(layer))]
    count = min(args.experts, len(every))
    slab = make_slab(count, max(store.layout(layer).blob_size for layer in store.layers))
    rng = np.random.default_rng(0)
    source, target = np.ones((2, READ_THREADS, COPIED // 8 // READ_THREADS))

    def read(requests: list[ReadRequest]) -> float:
        """GB/s."""
        started = perf_counter()
        store.start(requests, slab).wait()
        return sum(store.layout(r.layer).blob_size for r in requests) / (perf_counter() - started) / 1e9

    def copy() -> float:
        started = perf_counter()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(np.copyto, target, source))
        return source.nbytes / (perf_counter() - started) / 1e9

    rates: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        chosen = rng.permutation(len(every))[:count].tolist()
        requests = [ReadRequest(*every[i], slot) for slot, i in enumerate(chosen)]
        dropped = store.drop_page_cache()
        first = read(requests)
        if dropped:
            rates.setdefault("cold", []).append(first)
        rates.setdefault("warm", []).append(read(requests))
        for kind, rate in plain_reads(store, count, repeats=1).items():
            rates.setdefault(f"plain reads, {kind}", []).append(rate)
        rates.setdefault("copying memory", []).append(copy())
    table = Table("", "GB/s, median", "least", "most", box=None)
    for kind, values in rates.items():
        figures = (statistics.median(values), min(values), max(values))
        table.add_row(kind, *(f"{figure:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
