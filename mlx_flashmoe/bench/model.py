"""A converted model, measured as it is used: prompts and answers, cold and warm, and where the time goes.

Tokens are random, routing is the model's own. "Cold" forgets every resident expert and asks the operating
system to drop the expert files from its page cache; "warm" is the same again with the page cache as it then is,
and no resident experts either. An answer goes on from the warm prompt. Beside the model's reads, the same
number of experts is read plainly, by as many threads and from the same files, in the same run.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe import system
from mlx_flashmoe.console import print_note
from mlx_flashmoe.errors import FlashMoEError, RequestError
from mlx_flashmoe.experts.readers import READ_THREADS
from mlx_flashmoe.experts.store import ExpertStore
from mlx_flashmoe.generate import generate_step, prefill
from mlx_flashmoe.loader import Stats, StreamingModel, load
from mlx_flashmoe.progress import Steps
from mlx_flashmoe.reports import check_report, write_report
from mlx_flashmoe.sizes import show_size
from mlx_flashmoe.terminal.bars import loading_bar
from mlx_flashmoe.watch import MemoryWatch

WARM_UP_TOKENS = 3


@dataclass(frozen=True)
class Phase:
    """One measurement.

    Attributes:
        name: "cold prompt", "warm prompt" or "answer".
        tokens: of the prompt, or generated.
        seconds: in all; for an answer, of the tokens after the first.
        tokens_per_second: for an answer the median over its tokens.
        routing, reading: seconds the caller waited for the router's choice and for experts.
        other: the remaining seconds: building and computing.
        read_gb_per_s: expert bytes over the time in which anything was being read; None if nothing was.
    """

    name: str
    prompt: int
    tokens: int
    seconds: float
    tokens_per_second: float
    routing: float
    reading: float
    other: float
    hits: int
    misses: int
    bytes_read: int
    read_gb_per_s: float | None


def run(
    folder: str, prompts: Sequence[int], tokens: int, json_file: str | None = None, **options: Any
) -> None:
    """Measures, prints a table, and writes the figures to ``json_file`` if given.

    Args:
        prompts: their lengths in tokens.
        tokens: of an answer.
        options: of ``load``.

    Raises:
        FlashMoEError: the folder cannot be used, ``json_file`` cannot be written, a read failed, or a run
            that had to read has read nothing.
    """
    if tokens < 2 or not prompts or min(prompts) < 1:
        raise RequestError(
            "bench needs prompts of at least 1 token (--prompts) and 2 tokens or more (--tokens)"
        )
    check_report(json_file)
    console = Console()
    with closing(loading_bar()) as bar:
        model, _ = load(folder, announce=console.print, progress=bar, **options)
    longest = max(prompts) + tokens
    if longest > model.max_context:
        raise RequestError(
            f"a prompt of {max(prompts)} tokens and an answer of {tokens} do not fit into the context of "
            f"{model.max_context} tokens: give shorter --prompts"
        )
    model.reserve(longest)
    vocabulary = model.vocab_size
    rng = np.random.default_rng(0)
    # Kernels are compiled at their first use: not part of anything measured.
    _answer(model, rng.integers(0, vocabulary, 40), WARM_UP_TOKENS)
    phases = []
    with MemoryWatch(print_note), Steps("bench", 3 * len(prompts), "measurements") as steps:

        def measured(phase: Phase) -> None:
            phases.append(phase)
            steps.advance()

        for length in prompts:
            prompt = rng.integers(0, vocabulary, length)
            dropped = _forget(model, page_cache=True)
            measured(_prompt(model, prompt, "cold prompt" if dropped else "prompt"))
            _forget(model, page_cache=False)
            measured(_prompt(model, prompt, "warm prompt"))
            measured(_answer(model, prompt, tokens))
    plain = plain_reads(model.arena.store)
    report = {
        "model": str(Path(folder).resolve().name),
        "machine": system.description(),
        "device": str(mx.default_device()),
        "versions": {name: version(name) for name in ("mlx", "mlx-flashmoe")},
        "plan": str(model.plan),
        "arena_slots": model.arena.capacity,
        "prefill_chunk": model.prefill_chunk,
        "peak_memory": mx.get_peak_memory(),
        "plain_reads_gb_per_s": plain,
        "phases": [asdict(phase) for phase in phases],
    }
    console.print(_table(phases))
    for kind, rate in plain.items():
        console.print(f"plain reads of whole experts, {kind}: {rate:.2f} GB/s with {READ_THREADS} threads")
    console.print(f"peak memory in MLX's count: {show_size(mx.get_peak_memory())}")
    if json_file is not None:
        write_report(json_file, report)


def _forget(model: StreamingModel, page_cache: bool) -> bool:
    """Empties the arena and, if asked, the page cache; whether the latter could be done."""
    if not model.arena.resident:
        model.arena.clear()
        return page_cache and model.arena.store.drop_page_cache()
    return False


def _phase(
    model: StreamingModel, name: str, prompt: int, tokens: int, seconds: float, rate: float, spent: Stats
) -> Phase:
    if spent.misses and not spent.bytes_read:
        raise FlashMoEError(f"bench: {name} had {spent.misses} misses, but nothing was read: no figure")
    return Phase(
        name=name,
        prompt=prompt,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=rate,
        routing=spent.routing_seconds,
        reading=spent.reading_seconds,
        other=seconds - spent.routing_seconds - spent.reading_seconds,
        hits=spent.hits,
        misses=spent.misses,
        bytes_read=spent.bytes_read,
        read_gb_per_s=spent.bytes_read / spent.busy_seconds / 1e9 if spent.bytes_read else None,
    )


def _prompt(model: StreamingModel, prompt: np.ndarray, name: str) -> Phase:
    """All of a prompt, in the chunks that generate would use."""
    cache = model.make_cache()
    tokens = mx.array(prompt)
    before, started = model.stats(), perf_counter()
    prefill(model, tokens, cache, model.prefill_chunk)
    seconds = perf_counter() - started
    spent = model.stats() - before
    return _phase(model, name, prompt.size, prompt.size, seconds, prompt.size / seconds, spent)


def _answer(model: StreamingModel, prompt: np.ndarray, tokens: int) -> Phase:
    """Greedy tokens after a prompt; the first, which ends the prompt's work, is not timed."""
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    next(steps)
    before, started = model.stats(), perf_counter()
    took = []
    last = started
    for _ in steps:
        now = perf_counter()
        took.append(now - last)
        last = now
    spent = model.stats() - before
    rate = 1 / statistics.median(took)
    return _phase(model, "answer", prompt.size, len(took), last - started, rate, spent)


def plain_reads(store: ExpertStore, experts: int = 64, repeats: int = 3) -> dict[str, float]:
    """GB/s of os.preadv of whole experts into ordinary memory, with the store's number of threads and disks.

    Args:
        experts: how many to read at a time, spread over all layers.
        repeats: of each measurement; the median is returned.

    Returns:
        "page cache" and, where the page cache can be dropped, "disk".
    """
    rng = np.random.default_rng(1)
    layers = store.layers
    size = max(store.layout(layer).blob_size for layer in layers)
    buffers = [bytearray(size) for _ in range(READ_THREADS)]
    files = {layer: [os.open(path, os.O_RDONLY) for path in store.paths(layer)] for layer in layers}

    def timed(chosen: list[tuple[int, int]]) -> float:
        work = enumerate(chosen)

        def drain(buffer: bytearray) -> int:
            done = 0
            for turn, (layer, expert) in work:
                blob = store.layout(layer).blob_size
                fd = files[layer][turn % len(files[layer])]
                done += os.preadv(fd, [memoryview(buffer)[:blob]], expert * blob)
            return done

        started = perf_counter()
        total = sum(pool.map(drain, buffers))
        seconds = perf_counter() - started
        if total != sum(store.layout(layer).blob_size for layer, _ in chosen):
            raise FlashMoEError("bench: plain reads came back short: no figure")
        return total / seconds / 1e9

    rates: dict[str, list[float]] = {"disk": [], "page cache": []}
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for _ in range(repeats):
                count = min(experts, sum(store.num_experts(layer) for layer in layers))
                every = [(layer, e) for layer in layers for e in range(store.num_experts(layer))]
                chosen = [every[i] for i in rng.permutation(len(every))[:count]]
                if store.drop_page_cache():
                    rates["disk"].append(timed(chosen))
                else:
                    timed(chosen)
                rates["page cache"].append(timed(chosen))
    finally:
        for fds in files.values():
            for fd in fds:
                os.close(fd)
    return {kind: statistics.median(values) for kind, values in rates.items() if values}


def _table(phases: Sequence[Phase]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for column in ("tok", "tok/s", "router", "read", "other", "hits", "from disk", "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)

    def per_token(seconds: float, phase: Phase) -> str:
        return f"{1e3 * seconds / phase.tokens:.2f}"

    for p in phases:
        hits = f"{100 * p.hits / (p.hits + p.misses):.0f}%" if p.hits + p.misses else "all"
        table.add_row(
            f"{p.name} {p.prompt}" if p.name != "answer" else f"answer to {p.prompt}",
            str(p.tokens),
            f"{p.tokens_per_second:.2f}" if p.tokens_per_second < 100 else f"{p.tokens_per_second:.0f}",
            per_token(p.routing, p),
            per_token(p.reading, p),
            per_token(p.other, p),
            hits,
            show_size(p.bytes_read),
            f"{p.read_gb_per_s:.1f}" if p.read_gb_per_s is not None else "-",
        )
    table.caption = "router, read, other: milliseconds a token waiting for routing, for experts, and the rest"
    table.caption_justify = "left"
    return table
