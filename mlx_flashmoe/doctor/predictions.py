"""Predictions of one model on one machine: for several sizes of the arena, and for fewer active experts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_flashmoe import memory
from mlx_flashmoe.doctor.examine import Needs
from mlx_flashmoe.doctor.machine import measure_rates, measure_reads
from mlx_flashmoe.doctor.predict import (
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
from mlx_flashmoe.errors import MemoryPlanError
from mlx_flashmoe.loader import prefill_chunk
from mlx_flashmoe.sizes import show_size

FEWER = 4  # active experts: what the original system uses
PROMPT = 512  # tokens of the prompt whose first token is predicted
# The share of a Mac's memory that its GPU may use: two thirds of a small memory, three quarters of a larger one.
SMALL_MEMORY, SMALL_GPU_SHARE, GPU_SHARE = 35e9, 2 / 3, 3 / 4


@dataclass(frozen=True)
class Other:
    """Another machine: what was said of it, in bytes and bytes per second."""

    memory: int | None = None
    disk: float | None = None
    bandwidth: float | None = None

    @property
    def described(self) -> bool:
        """Anything was said of it."""
        return self != Other()

    @property
    def gpu_share(self) -> float:
        """The part of its memory that a model may take."""
        if self.bandwidth is None or self.memory is None:
            return 1.0
        return SMALL_GPU_SHARE if self.memory < SMALL_MEMORY else GPU_SHARE


@dataclass(frozen=True)
class Row:
    """One prediction.

    Attributes:
        expert_memory: as for ``load``.
        page_cache: bytes that are left to it.
        even: a token's time if all experts were equally likely.
        first_token: seconds.
    """

    expert_memory: str | int
    plan: memory.Plan
    work: Work
    page_cache: float
    where: Found
    token: TokenTime
    even: TokenTime
    first_token: float


def rates_of(needs: Needs, folder: Path, other: Other) -> Rates:
    """Measured here, except what is said of another machine."""
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


def memory_of(other: Other) -> memory.Room:
    """This machine's memory as it is now, or the other's with no programs."""
    if other.memory is None:
        return memory.Room.here()
    return memory.Room(other.memory, int(other.gpu_share * other.memory), other.memory)


def predictions(
    needs: Needs,
    rates: Rates,
    expert_memory: str,
    context: int,
    room: memory.Room,
    dtype: mx.Dtype,
    may_read_directly: bool = False,
    largest_buffer: int | None = None,
) -> Iterator[Row]:
    """Rows for the model's own number of active experts and for FEWER, with arenas of several sizes.

    The first is for what was asked.

    Args:
        expert_memory: what was asked, as for ``load``.
        context: tokens that the KV cache is counted for.
        room: the memory there is.
        dtype: of the activations.
        may_read_directly, largest_buffer: as for ``memory.plan``.

    Raises:
        MemoryPlanError: what was asked does not fit.
    """
    settings, layout = needs.settings, needs.layout
    kv = settings.kv_bytes(context, dtype)
    own = settings.num_experts_per_tok
    most = room.free - needs.dense_in_memory - kv - memory.WORKING_BYTES
    sizes: list[str | int] = [expert_memory, "auto", "os", most // 4, most // 2, 3 * most // 4]
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
                    room=room,
                    largest_buffer=largest_buffer,
                    may_read_directly=may_read_directly,
                )
            except MemoryPlanError:
                if not seen:
                    raise
                continue
            if plan.slots in seen:
                continue
            seen.add(plan.slots)
            free = min(room.total * (1 - SYSTEM_SHARE), room.available)
            left = 0.0 if plan.direct else free - plan.total
            where = found(work, plan.slots, left, skewed)
            yield Row(
                size,
                plan,
                work,
                left,
                where,
                token_time(rates, work, where),
                token_time(rates, work, found(work, plan.slots, left, uniform)),
                prompt_seconds(rates, work, min(PROMPT, context), where.resident),
            )


def why_nothing_fits(
    model: str, needs: Needs, context: int, room: memory.Room, dtype: mx.Dtype, other: Other
) -> str | None:
    """A sentence for a model that cannot run with this context, with what would help; None if some size would fit."""
    settings = needs.settings
    experts = max(3, settings.num_experts_per_tok) * needs.layout.blob_size

    def least(tokens: int) -> int:
        kv = int(settings.kv_bytes(tokens, dtype))
        return needs.dense_in_memory + memory.WORKING_BYTES + experts + kv

    usable = room.usable
    if least(context) <= usable:
        return None
    says = (
        f"{model} does not fit in memory: with a context of {context} tokens and the least expert memory it takes "
        f"{show_size(least(context))}, and a model may take {show_size(usable)} here; "
    )
    shorter = next((n for n in (65536, 32768, 8192, 2048) if n < context and least(n) <= usable), None)
    if shorter is not None:
        return f"{says}it fits with --context {shorter}, which takes {show_size(least(shorter))}"
    hint = "" if other.described else room.hint(least(context), "it fits")
    if hint:
        return f"{says}{hint}"
    return f"{says}no option makes it fit: use a machine with more memory, or a smaller model"
