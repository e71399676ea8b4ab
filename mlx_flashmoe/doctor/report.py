"""doctor: what this machine, or another, will make of a model, before anything is downloaded or converted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_flashmoe import memory, system
from mlx_flashmoe.doctor.examine import Needs, examine
from mlx_flashmoe.doctor.machine import disk_free, measure_machine, measure_reads
from mlx_flashmoe.doctor.predict import PUBLISHED_HITS, PUBLISHED_SHARE, Rates
from mlx_flashmoe.doctor.predictions import (
    FEWER,
    PROMPT,
    Other,
    Row,
    memory_of,
    predictions,
    rates_of,
    why_nothing_fits,
)
from mlx_flashmoe.doctor.verdict import choose, commands, figure, verdict
from mlx_flashmoe.errors import MemoryPlanError, RequestError
from mlx_flashmoe.experts.store import reads_directly
from mlx_flashmoe.fetch import find
from mlx_flashmoe.layout import PROJECTIONS, BlobLayout, Quantization, expert_file
from mlx_flashmoe.loader import PLANNED_CONTEXT
from mlx_flashmoe.reports import check_report, write_report
from mlx_flashmoe.sizes import counted, show_size

# Of Qwen3.5-397B at 4 bits, where no model is named.
EXPERT = BlobLayout.build(4096, 1024, dict.fromkeys(PROJECTIONS, Quantization(4, 64)), "bfloat16")
ACTIVE = 10


def run(
    model: str | None,
    expert_memory: str = "auto",
    context: int = PLANNED_CONTEXT,
    other: Other | None = None,
    json_file: str | None = None,
    explain: bool = False,
) -> None:
    """Prints what to expect of a model and what to type; writes the figures to ``json_file`` if given.

    Args:
        model: a folder, converted or not, or a repository on the hub; None looks at this machine alone.
        expert_memory: as for ``load``; "auto" stands for the best setting.
        context: tokens of prompt and answer.
        other: answer for this machine instead, as far as it is described.
        explain: print also what the figures are made of.

    Raises:
        FlashMoEError: the model cannot be examined, the disk cannot be measured.
        MemoryPlanError: there is too little memory for the model, or ``expert_memory`` is not a size.
    """
    other = other or Other()
    console = Console(highlight=False)
    if model is None:
        if other.described or json_file is not None:
            raise RequestError("doctor: --sim-memory, --sim-disk, --sim-bandwidth and --json need a model")
        _print_machine(console, Path.cwd())
        console.print("\nName a model, a folder or a repository on the hub, to see what to expect of it.")
        return
    if context < 2:
        raise RequestError(f"--context {context}: at least 2 tokens are needed")
    # Wrong arguments are found before half a minute is spent.
    if expert_memory not in ("auto", "os"):
        memory.parse_size(expert_memory)
    check_report(json_file)

    # A machine of which the bandwidth is given computes on a GPU, in bfloat16.
    on_gpu = mx.default_device() == mx.gpu or other.bandwidth is not None
    dtype = mx.bfloat16 if on_gpu else mx.float32
    if not Path(model).exists():
        model = str(find(model) or model)  # what was fetched of a repository
    needs = examine(model, dtype)
    room = memory_of(other)
    impossible = why_nothing_fits(model, needs, context, room, dtype, other)
    if impossible is not None:
        raise MemoryPlanError(impossible)
    folder = Path(model) if Path(model).is_dir() else Path.cwd()
    rates = rates_of(needs, folder, other)
    here = needs.converted and Path(model).is_dir() and not other.described
    may_read_directly = here and reads_directly(folder / expert_file(0))
    largest = None if other.described else memory.largest_buffer()
    rows = list(predictions(needs, rates, expert_memory, context, room, dtype, may_read_directly, largest))
    chosen, why = choose(rows)

    free = None if other.described else disk_free(folder)
    fits = any(row.where.resident for row in rows)
    for line in verdict(needs, chosen, fits, min(PROMPT, context), free):
        console.print(Text(line, style="bold"))
    auto = next((row for row in rows if row.expert_memory == "auto"), chosen)
    notes = () if other.described else chosen.plan.notes or auto.plan.notes
    for note in (*needs.notes, *notes):
        console.print(Text(note))  # a path in it is no markup
    console.print()
    for command in commands(model, needs, chosen):
        console.print(Text(command), soft_wrap=True)
    active = needs.settings.num_experts_per_tok
    fewer = f" --active-experts {FEWER} changes answers" * (active > FEWER)
    console.print(f"  # serve, generate: the same options.{fewer}\n", style="dim")
    shown = [row for row in rows if row.work.active == active or row.expert_memory == chosen.expert_memory]
    console.print(_rows_table(rows if explain else shown, chosen))
    if why:
        console.print(why)
    console.print()
    facts = _reasons(needs, rates, chosen, room, other)
    if explain:
        console.print(_facts(facts | _details(model, needs, rates, chosen, other)))
        console.print()
        console.print(Text(_ASSUMPTIONS.format(prompt=min(PROMPT, context)), style="dim"))
        console.print()
        console.print(_arithmetic(chosen, rates))
    else:
        console.print(_facts(facts))
        console.print("These are predictions: --explain shows the arithmetic.", style="dim")
    if json_file is not None:
        _write(json_file, model, needs, rates, rows)


def _print_machine(console: Console, folder: Path) -> None:
    machine = measure_machine(folder)
    room = machine.room
    disk, page_cache = measure_reads(EXPERT, ACTIVE, folder)
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    reads = f"{ACTIVE} experts of {show_size(EXPERT.blob_size)} at a time, as of Qwen3.5-397B at 4 bits"
    console.print(
        _facts(
            {
                "machine": f"{system.description()}, MLX on the {device}",
                "memory": f"{show_size(room.total)}, of which a model may take {show_size(room.usable)}, and "
                f"{show_size(room.available)} are free now",
                "": f"copied at {_rate(machine.copying)}, read by the {device} at {_rate(machine.reading)}",
                "disk": f"{_rate(disk)}: {reads}",
                "page cache": f"{_rate(page_cache)}: the same",
                "free": f"{show_size(machine.disk_free)} on the disk of {folder}",
            }
        )
    )


# Drawing


def _facts(lines: dict[str, str]) -> Table:
    """Names and what is to be said of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, Text(text))
    return table


def _reasons(needs: Needs, rates: Rates, row: Row, room: memory.Room, other: Other) -> dict[str, str]:
    """The figures of the machine that the speed depends on, and why they are what they are."""
    may_take = f"a model may take {show_size(room.usable)}"
    if other.gpu_share < 1:
        share = "two thirds" if room.usable < 0.7 * room.total else "three quarters"
        may_take += f": macOS gives a GPU {share}"
    if other.memory is None:
        may_take += f"; {show_size(room.available)} are free now"
    reads = f"{needs.settings.num_experts_per_tok} experts of {show_size(needs.layout.blob_size)} at a time"
    disk = f"{_rate(rates.disk)} for {reads}"
    if other.disk is not None:
        disk += f": a third of {_rate(other.disk)}, as such reads were on the Mac that was published"
    seconds = rates.resident_layer if row.where.resident else rates.layer
    layer = f"{1e3 * seconds:.3g} ms in addition to its weights' time"
    if other.bandwidth is None:
        layer += ", measured now"
    elif row.where.resident:
        layer += ": launches, as measured on an NVIDIA H200's host; not on a Mac"
    else:
        layer += ", as another program published of an M3 Max that streams"
    return {"memory": f"{show_size(room.total)}; {may_take}", "disk": disk, "a layer": layer}


def _details(model: str, needs: Needs, rates: Rates, row: Row, other: Other) -> dict[str, str]:
    """The model's needs, and the machine's other figures."""
    s = needs.settings
    weights = f"{_rate(rates.dense)} dense, {_rate(rates.experts)} of experts"
    if rates.dense == rates.experts:
        weights = _rate(rates.dense)
    given = ", as given" if other.bandwidth is not None else ""
    copied = ", as four threads copy elsewhere" if other.bandwidth is not None else ""
    otherwise = rates.layer if row.where.resident else rates.resident_layer
    holds = "experts may be missing" if row.where.resident else "every expert is in memory"
    return {
        "": f"{1e3 * otherwise:.3g} ms where {holds}",
        "page cache": f"{_rate(rates.page_cache)} in the same reads{copied}",
        "weights": f"{weights} go through products with one token{given}",
        "model": f"{model} ({needs.model_type}), {needs.state}",
        "experts": f"{counted(needs.layers, 'layer')} of {s.num_experts}, {s.num_experts_per_tok} used by a token, "
        f"{show_size(needs.layout.blob_size)} each: {show_size(needs.expert_bytes)}",
        "all the rest": f"{show_size(needs.dense_bytes)} on disk, {show_size(needs.dense_in_memory)} in memory, "
        f"of which a token goes through {show_size(needs.dense_read)}",
        "plan": str(row.plan).removeprefix("memory: "),
    }


_ASSUMPTIONS = (
    "arena, page cache, disk: where a token's experts are found if few of them do most of the work, as was published "
    f"of the 397B: {100 * PUBLISHED_HITS:.0f}% were in {100 * PUBLISHED_SHARE:.0f}% of the memory that all would take. "
    "At least: tok/s if all are equally likely. First token: after a prompt of {prompt} tokens, no expert being in "
    "memory yet unless the arena holds all."
)


def _rows_table(rows: list[Row], chosen: Row) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ("active", "experts in", "arena", "page cache", "disk", "tok/s", "at least", "first token")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column != "page cache")
    for row in sorted(rows, key=lambda row: (-row.work.active, row.plan.slots)):
        where, size = row.where, show_size(row.plan.arena)
        table.add_row(
            f"{'*' if row is chosen else ''} {row.work.active}",
            f"{row.expert_memory} {size}" if row.expert_memory in ("auto", "os") else size,
            *(f"{100 * share:.0f}%" for share in (where.arena, where.page_cache, where.disk)),
            figure(1 / row.token.seconds),
            figure(1 / row.even.seconds),
            f"{figure(row.first_token)} s",
            style="bold" if row is chosen else "",
        )
    return table


def _arithmetic(row: Row, rates: Rates) -> Table:
    """How the row's time comes about, term by term."""
    work, token, where = row.work, row.token, row.where
    routed = work.layers * work.active
    size = show_size(work.expert_bytes)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    lines = [
        (f"{work.layers} layers x {1e3 * token.layers / work.layers:.3g} ms", token.layers),
        (
            f"{show_size(work.dense_bytes)} of dense weights + {show_size(work.kv_bytes)} of KV cache, "
            f"at {_rate(rates.dense)}",
            token.dense,
        ),
        (f"{work.layers} x {work.active} experts x {size}, at {_rate(rates.experts)}", token.experts),
        (
            f"{100 * where.page_cache:.0f}% of {routed} experts read at {_rate(rates.page_cache)}, from the page cache",
            token.page_cache,
        ),
        (f"{100 * where.disk:.0f}% of {routed} experts read at {_rate(rates.disk)}, from disk", token.disk),
    ]
    table.add_row(
        f"[bold]A token, {work.active} experts, {show_size(row.plan.arena)} of them in memory[/bold]", ""
    )
    for text, seconds in lines:
        table.add_row(text, f"{1e3 * seconds:.1f} ms")
    table.add_row(
        f"together: {figure(1 / token.seconds)} tok/s", f"[bold]{1e3 * token.seconds:.1f} ms[/bold]"
    )
    return table


def _rate(bytes_per_second: float) -> str:
    return f"{show_size(bytes_per_second)}/s"


def _write(json_file: str, model: str, needs: Needs, rates: Rates, rows: list[Row]) -> None:
    report: dict[str, Any] = {
        "model": model,
        "state": needs.state,
        "rates": asdict(rates),
        "predictions": [
            {
                "active_experts": row.work.active,
                "expert_memory": row.expert_memory,
                "arena_slots": row.plan.slots,
                "plan": asdict(row.plan),
                "page_cache_bytes": row.page_cache,
                "work": asdict(row.work),
                "found": asdict(row.where),
                "token_seconds": row.token.seconds,
                "token_seconds_at_most": row.even.seconds,
                "first_token_seconds": row.first_token,
            }
            for row in rows
        ],
    }
    write_report(json_file, report)
