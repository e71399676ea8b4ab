"""doctor: what this machine, or another, will make of a model, before anything is downloaded or converted."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_flashmoe import memory
from mlx_flashmoe.doctor.examine import Needs, examine
from mlx_flashmoe.doctor.machine import disk_free, measure_machine, measure_rates, measure_reads
from mlx_flashmoe.doctor.predict import (
    PUBLISHED_HITS,
    PUBLISHED_SHARE,
    SEQUENTIAL_SHARE,
    SYSTEM_SHARE,
    Found,
    Rates,
    TokenTime,
    Work,
    found,
    prompt_seconds,
    simulated,
    skewed,
    token_time,
    uniform,
)
from mlx_flashmoe.errors import MemoryPlanError, RequestError
from mlx_flashmoe.experts.store import reads_directly
from mlx_flashmoe.layout import PROJECTIONS, BlobLayout, Quantization, expert_file
from mlx_flashmoe.loader import PLANNED_CONTEXT, prefill_chunk
from mlx_flashmoe.reports import check_report, write_report
from mlx_flashmoe.sizes import show_size

FEWER = 4  # active experts: what the original system uses
PROMPT = 512  # tokens of the prompt whose first token is predicted
GPU_SHARE = 0.75  # of a Mac's memory: what its GPU may use
# Of Qwen3.5-397B at 4 bits, where no model is named.
EXPERT = BlobLayout.build(4096, 1024, dict.fromkeys(PROJECTIONS, Quantization(4, 64)), "bfloat16")
ACTIVE = 10


@dataclass(frozen=True)
class Other:
    """Another machine: what was said of it, in bytes and bytes a second."""

    memory: int | None = None
    disk: float | None = None
    bandwidth: float | None = None


@dataclass(frozen=True)
class Row:
    """One prediction.

    Attributes:
        page_cache: bytes that are left to it.
        even: a token's time if all experts were equally likely.
    """

    expert_memory: str
    plan: memory.Plan
    work: Work
    page_cache: float
    where: Found
    token: TokenTime
    even: TokenTime
    first_token: float


def run(
    model: str | None,
    expert_memory: str = "auto",
    context: int = PLANNED_CONTEXT,
    other: Other | None = None,
    json_file: str | None = None,
) -> None:
    """Prints what there is, what the model takes and what to expect; writes the figures to ``json_file`` if given.

    Args:
        model: a folder, converted or not, or a repository on the hub; None looks at this machine alone.
        expert_memory: as for ``load``; what the arithmetic is shown for.
        context: tokens of prompt and answer.
        other: answer for this machine instead, as far as it is described.

    Raises:
        FlashMoEError: the model cannot be examined, the disk cannot be measured.
        MemoryPlanError: there is too little memory for the model.
    """
    other = other or Other()
    console = Console(highlight=False)
    if model is None:
        if other != Other() or json_file is not None:
            raise RequestError("doctor: --sim-memory, --sim-disk, --sim-bandwidth and --json need a model")
        _print_machine(console, Path.cwd())
        console.print("\nName a model, a folder or a repository on the hub, to see what to expect of it.")
        return
    if context < 2:
        raise RequestError(f"--context {context}: at least 2 tokens are needed")
    check_report(json_file)  # before half a minute is spent

    # A machine of which the bandwidth is given computes on a GPU, in bfloat16.
    on_gpu = mx.default_device() == mx.gpu or other.bandwidth is not None
    dtype = mx.bfloat16 if on_gpu else mx.float32
    needs = examine(model, dtype)
    folder = Path(model) if Path(model).is_dir() else Path.cwd()
    rates = _rates(needs, folder, other)
    total, usable = _memory(other)
    console.print(_facts(_rate_lines(needs, rates, total, usable, other)))
    console.print()
    console.print(_facts(_model_lines(model, needs, folder, context, other)))
    for note in needs.notes:
        console.print(note)
    console.print()
    try:
        here = needs.converted and other == Other()
        may_read_directly = here and reads_directly(folder / expert_file(0))
        rows = list(_rows(needs, rates, expert_memory, context, total, usable, dtype, may_read_directly))
    except MemoryPlanError as e:
        raise MemoryPlanError(f"{e}{_what_would_fit(needs, context, usable, dtype)}") from None
    chosen = rows[0]
    console.print(_facts({"plan": str(chosen.plan).removeprefix("memory: ")}))
    console.print()
    console.print(_rows_table(rows))
    console.print(Text(_ASSUMPTIONS.format(prompt=min(PROMPT, context)), style="dim"))
    console.print()
    console.print(_arithmetic(chosen, rates))
    if json_file is not None:
        _write(json_file, model, needs, rates, rows)


def _print_machine(console: Console, folder: Path) -> None:
    machine = measure_machine(folder)
    disk, page_cache = measure_reads(EXPERT, ACTIVE, folder)
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    reads = f"{ACTIVE} experts of {show_size(EXPERT.blob_size)} at a time, as of Qwen3.5-397B at 4 bits"
    console.print(
        _facts(
            {
                "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, MLX on the {device}",
                "memory": f"{show_size(machine.memory)}, of which a model may take {show_size(machine.usable)}",
                "": f"copied at {_rate(machine.copying)}, read by the {device} at {_rate(machine.reading)}",
                "disk": f"{_rate(disk)}: {reads}",
                "page cache": f"{_rate(page_cache)}: the same",
                "free": f"{show_size(machine.disk_free)} on the disk of {folder}",
            }
        )
    )


def _rates(needs: Needs, folder: Path, other: Other) -> Rates:
    if other.disk is not None and other.bandwidth is not None:
        return simulated(other.disk, other.bandwidth)
    active = needs.settings.num_experts_per_tok
    if other.bandwidth is not None:
        disk, _ = measure_reads(needs.layout, active, folder)
        return replace(simulated(0, other.bandwidth), disk=disk)
    if other.disk is not None:
        folder = Path(tempfile.gettempdir())  # the page cache is the same everywhere; this can be written to
    rates = measure_rates(needs.model_type, needs.settings, needs.layout, active, folder)
    return rates if other.disk is None else replace(rates, disk=SEQUENTIAL_SHARE * other.disk)


def _memory(other: Other) -> tuple[int, int]:
    """Bytes of memory, and of it those that a model may take."""
    if other.memory is None:
        return memory.physical_memory(), memory.memory_limit()
    if other.bandwidth is not None:
        return other.memory, int(GPU_SHARE * other.memory)
    return other.memory, other.memory


def _rows(
    needs: Needs,
    rates: Rates,
    expert_memory: str,
    context: int,
    total: int,
    usable: int,
    dtype: mx.Dtype,
    may_read_directly: bool,
) -> Iterator[Row]:
    """Predictions for the model's own number of active experts and for FEWER, with arenas of several sizes.

    The first is for what was asked.
    """
    settings, layout = needs.settings, needs.layout
    kv = settings.kv_bytes(context, dtype)
    own = settings.num_experts_per_tok
    room = usable - needs.dense_in_memory - kv - memory.WORKING_BYTES
    sizes = [expert_memory, "auto", "os", str(room // 4), str(room // 2), str(3 * room // 4)]
    for active in (own, FEWER) if own > FEWER else (own,):
        work = Work(
            layers=needs.layers,
            experts=settings.num_experts,
            active=active,
            expert_bytes=layout.blob_size,
            expert_parameters=sum(p.out_dims * p.in_dims for p in layout.projections.values()),
            dense_bytes=needs.dense_read,
            dense_parameters=needs.dense_parameters,
            kv_bytes=kv,
            chunk=prefill_chunk(settings, dtype),
        )
        seen: set[int] = set()
        for size in dict.fromkeys(sizes):
            try:
                plan = memory.plan(
                    size,
                    dense=needs.dense_in_memory,
                    slot_bytes=layout.blob_size,
                    experts=work.layers * work.experts,
                    active=active,
                    kv=kv,
                    limit=usable,
                    may_read_directly=may_read_directly,
                )
            except MemoryPlanError:
                if not seen:
                    raise
                continue
            if plan.slots in seen:
                continue
            seen.add(plan.slots)
            left = 0.0 if plan.direct else total * (1 - SYSTEM_SHARE) - plan.total
            where = found(work, plan.slots, left, skewed)
            yield Row(
                size,
                plan,
                work,
                left,
                where,
                token_time(rates, work, where),
                token_time(rates, work, found(work, plan.slots, left, uniform)),
                prompt_seconds(rates, work, min(PROMPT, context), plan.slots == work.layers * work.experts),
            )


def _what_would_fit(needs: Needs, context: int, usable: int, dtype: mx.Dtype) -> str:
    """The rest of the sentence, where not even the smallest arena fits."""
    settings = needs.settings

    def least(tokens: int) -> int:
        experts = max(3, settings.num_experts_per_tok) * needs.layout.blob_size
        fixed = needs.dense_in_memory + memory.WORKING_BYTES
        return fixed + experts + int(settings.kv_bytes(tokens, dtype))

    if least(context) <= usable:
        return ""
    fitting = (n for n in (65536, 32768, 8192, 2048) if n < context and least(n) <= usable)
    shorter = next(fitting, None)
    if shorter is not None:
        return f", with --context {shorter} {show_size(least(shorter))}, which would fit"
    return ": no setting fits here, it takes a machine on which a model may have that much"


# Drawing


def _facts(lines: dict[str, str]) -> Table:
    """Names and what is to be said of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    return table


def _rate_lines(needs: Needs, rates: Rates, total: int, usable: int, other: Other) -> dict[str, str]:
    def given(value: float | None) -> str:
        return ", as given" if value is not None else ""

    active, size = needs.settings.num_experts_per_tok, show_size(needs.layout.blob_size)
    weights = f"{_rate(rates.dense)} dense, {_rate(rates.experts)} of experts"
    if rates.dense == rates.experts:
        weights = _rate(rates.dense)
    published = ", as published of an M3 Max" if other.bandwidth is not None else ""
    return {
        "memory": f"{show_size(total)}{given(other.memory)}, of which a model may take {show_size(usable)}",
        "disk": f"{_rate(rates.disk)}, {active} experts of {size} at a time"
        + (f": a third of {_rate(other.disk)}, as given" if other.disk is not None else ""),
        "page cache": f"{_rate(rates.page_cache)}, the same{published and ', as four threads copy'}",
        "weights": f"{weights} go through products with one token{given(other.bandwidth)}",
        "a layer": f"{1e3 * rates.layer:.3g} ms apart from its weights{published}",
    }


def _model_lines(model: str, needs: Needs, folder: Path, context: int, other: Other) -> dict[str, str]:
    s = needs.settings
    lines = {
        "model": f"{model} ({needs.model_type}), {needs.state}",
        "experts": f"{needs.layers} layers of {s.num_experts}, {s.num_experts_per_tok} used by a token, "
        f"{show_size(needs.layout.blob_size)} each: {show_size(needs.expert_bytes)}",
        "all the rest": f"{show_size(needs.dense_bytes)} on disk, {show_size(needs.dense_in_memory)} in memory, "
        f"of which a token goes through {show_size(needs.dense_read)}",
    }
    if s.context_length is not None:
        lines["context"] = f"{context} tokens counted here, {s.context_length} the most the model is made for"
    if not needs.converted and other == Other():
        space, free = needs.expert_bytes + needs.dense_bytes, disk_free(folder)
        enough = "enough" if free > space else "not enough"
        lines["disk space"] = f"{show_size(space)} needed, {show_size(free)} free on this disk: {enough}"
    return lines


_ASSUMPTIONS = (
    "arena, page cache, disk: where a token's experts are found if few of them do most of the work, as was published "
    f"of the 397B: {100 * PUBLISHED_HITS:.0f}% were in {100 * PUBLISHED_SHARE:.0f}% of the memory that all would take. "
    "At least: tok/s if all are equally likely. First token: after a prompt of {prompt} tokens, no expert being in "
    "memory yet unless the arena holds all."
)


def _rows_table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ("active", "experts in", "arena", "page cache", "disk", "tok/s", "at least", "first token")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column != "page cache")
    for row in sorted(rows, key=lambda row: (-row.work.active, row.plan.slots)):
        where = row.where
        table.add_row(
            str(row.work.active),
            f"{row.expert_memory} " * (not row.expert_memory[0].isdigit()) + show_size(row.plan.arena),
            *(f"{100 * share:.0f}%" for share in (where.arena, where.page_cache, where.disk)),
            f"{1 / row.token.seconds:.3g}",
            f"{1 / row.even.seconds:.3g}",
            f"{row.first_token:.3g} s",
            style="bold" if row is rows[0] else "",
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
        (f"{work.layers} layers x {1e3 * rates.layer:.3g} ms", token.layers),
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
    table.add_row(f"together: {1 / token.seconds:.3g} tok/s", f"[bold]{1e3 * token.seconds:.1f} ms[/bold]")
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
