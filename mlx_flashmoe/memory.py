"""Arithmetic before allocation: what the machine has, what a model takes, how many slots the experts get."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_flashmoe import system
from mlx_flashmoe.errors import MemoryPlanError
from mlx_flashmoe.sizes import show_size

# What a generation takes besides the named parts: activations of one chunk of a prompt, buffers MLX keeps for
# reuse, the interpreter.
WORKING_BYTES = 500 * 10**6
# The share of memory that "auto" leaves to other programs at least.
OTHERS_SHARE = 0.05
# Freed buffers MLX may keep for reuse; more would only take memory from the page cache.
CACHE_LIMIT = 128 * 2**20

# The interpreter and MLX; on a CPU also numba, and the states of a segment of the delta rule.
PROCESS_BYTES = {mx.DeviceType.gpu: 64 * 10**6, mx.DeviceType.cpu: 260 * 10**6}
MAX_CHUNK = 4096
# macOS's limit of what the GPU may use, in MiB; 0 for its own choice.
WIRED_LIMIT = "iogpu.wired_limit_mb"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str | int, flag: str = "--expert-memory", choices: str = ", or auto, or os") -> int:
    """Bytes of "8GB" (10^9), "8GiB" (2^30) or "800MB". A number of bytes stays what it is; text needs a unit.

    Args:
        flag, choices: for the error: where the size was given, and what else can be given there.

    Raises:
        MemoryPlanError: not a size, or text without a unit that is not "0".
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)(B?)\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise MemoryPlanError(f"{flag} {text!r} is not a size; give one like 8GB{choices}")
    number = float(match[1])
    if number and not match[2] and not match[3]:
        # 48 would be 48 bytes, which no user means. The unit is asked for, not guessed.
        unit = "GB" if number < 10**6 else "B"
        raise MemoryPlanError(f"{flag} {text.strip()}: give a unit, {match[1]}{unit}{choices}")
    return int(number * _UNITS[match[2]])


@dataclass(frozen=True)
class Room:
    """The memory of a machine, in bytes.

    Attributes:
        total: what there is; a control group's limit counts.
        usable: of it, what a model may take: less where a GPU may not use all.
        available: of it, what is not in use now; page cache is not in use.
    """

    total: int
    usable: int
    available: int

    @property
    def free(self) -> int:
        """Bytes that a model may take without taking from other programs what they use, or may soon need."""
        return min(self.usable, self.available, self.total - int(OTHERS_SHARE * self.total))

    @classmethod
    def here(cls) -> Room:
        """This machine's, now."""
        total = usable = system.physical_memory()
        if mx.default_device() == mx.gpu:
            info = mx.device_info()
            size = info.get("max_recommended_working_set_size") or info.get("memory_size")
            if size:
                usable = min(total, int(size))
        # A discrete GPU's memory holds nothing of what programs use on the host.
        shared = mx.default_device() != mx.gpu or mx.metal.is_available()
        return cls(total, usable, system.available_memory() if shared else total)

    def hint(self, needed: int, then: str) -> str:
        """The command that lets a Mac's GPU use enough for ``needed`` bytes, and still leaves macOS a quarter or 8 GB.

        Args:
            then: what is so if it is given.

        Returns:
            "" where there is no such command, or it would not do.
        """
        most = (self.total - min(8 * 10**9, self.total // 4)) // 2**20
        if not self.usable < needed <= most * 2**20 or system.sysctl(WIRED_LIMIT) is None:
            return ""
        return (
            f"macOS lets the GPU use {show_size(self.usable)} of {show_size(self.total)}: with `sudo sysctl "
            f"{WIRED_LIMIT}={most}`, which holds until the next restart, {then}"
        )


def largest_buffer() -> int | None:
    """Bytes of the largest array on the current device; None where nothing but memory limits it."""
    if mx.default_device() != mx.gpu:
        return None
    length = mx.device_info().get("max_buffer_length")
    return int(length) if length else None


def prefill_chunk(activation_bytes: int, besides: int = 0) -> int:
    """Prompt tokens in one call such that their activations, so many bytes a token and some besides, stay within
    the plan."""
    room = WORKING_BYTES - CACHE_LIMIT - PROCESS_BYTES[mx.default_device().type] - besides
    return max(64, min(MAX_CHUNK, room // activation_bytes // 64 * 64))


@dataclass(frozen=True)
class Plan:
    """What a loaded model takes, in bytes, and why the arena has the size it has."""

    dense: int
    slots: int
    slot_bytes: int
    kv: int
    limit: int
    reason: str
    prefixes: int = 0
    direct: bool = False  # experts are to be read around the page cache
    notes: tuple[str, ...] = ()  # lines for the user: too little memory is free, or the GPU may use more

    @property
    def arena(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total(self) -> int:
        return self.dense + self.arena + self.kv + self.prefixes + WORKING_BYTES

    def __str__(self) -> str:
        prefixes = f"kept prompts {show_size(self.prefixes)} + " if self.prefixes else ""
        return (
            f"memory: dense {show_size(self.dense)} + experts {show_size(self.arena)} ({self.reason}) + "
            f"KV cache {show_size(self.kv)} + {prefixes}working {show_size(WORKING_BYTES)} = {show_size(self.total)} "
            f"of {show_size(self.limit)}"
        )


def plan(
    expert_memory: str | int,
    *,
    dense: int,
    slot_bytes: int,
    experts: int,
    active: int,
    kv: int,
    prefixes: int = 0,
    room: Room | None = None,
    largest_buffer: int | None = None,
    may_read_directly: bool = False,
) -> Plan:
    """Decides how many slots the arena has.

    Args:
        expert_memory: a size, "os" (slots only for the layer at work; the page cache does the rest), or "auto", which
            leaves to other programs what they use.
        dense, kv, prefixes: bytes of the dense part in memory, of the KV cache, of prompts kept for later.
        slot_bytes: bytes of one slot.
        experts: in the whole model.
        active: experts a token uses in a layer.
        room: the memory there is; this machine's if None.
        largest_buffer: bytes one array can have, where the device limits that: the arena is one.
        may_read_directly: "auto" may choose to read experts around the page cache.

    Raises:
        MemoryPlanError: it does not fit; says what would.
    """
    room = Room.here() if room is None else room
    # In prefill three waves share the arena: one computed, one being read, one spared.
    least = min(experts, max(active, 3))
    most = experts if largest_buffer is None else min(experts, largest_buffer // slot_bytes)
    others = dense + kv + prefixes + WORKING_BYTES
    direct = False
    if expert_memory == "auto":
        share, rest = room.free - others, "the rest of memory is left to the page cache"
        if most == experts and experts * slot_bytes <= share:
            slots, reason = experts, "all of them fit"
        else:
            if may_read_directly:
                # Experts in the arena need not be in the page cache too.
                direct, rest = True, "the others are read around the page cache"
            else:
                share //= 2
            slots = max(least, min(most, share // slot_bytes))
            in_use = f"{show_size(room.total - room.available)} are in use, "
            reason = f"{100 * slots / experts:.0f}% of them; {in_use * (room.free == room.available)}{rest}"
    elif expert_memory == "os":
        slots = min(experts, max(least, min(32, (room.usable - others) // slot_bytes)))
        reason = "for the layer at work; the page cache keeps the rest"
    else:
        slots = min(experts, parse_size(expert_memory) // slot_bytes)
        if slots > most:
            raise MemoryPlanError(
                f"--expert-memory {expert_memory}: the device's largest buffer is "
                f"{show_size(most * slot_bytes)}; give at most that"
            )
        reason = "as asked" if slots < experts else "all of them, as asked"
        if slots < least:
            raise MemoryPlanError(
                f"--expert-memory {expert_memory} holds {slots} experts of {show_size(slot_bytes)}, but a layer "
                f"at work needs {least}: give at least {show_size(least * slot_bytes)}"
            )
    result = Plan(dense, int(slots), slot_bytes, kv, room.usable, reason, prefixes, direct)
    if result.total > room.usable:
        hint = room.hint(result.total, "it fits")
        raise MemoryPlanError(
            f"{result}: does not fit; {_what_is_too_much(result, least)}{f'; {hint}' * bool(hint)}"
        )
    notes = []
    if result.total > room.available:
        less = ", or give less --expert-memory" * (slots > least)
        notes.append(
            f"warning: only {show_size(room.available)} of memory are free now, so that the system may swap: "
            f"close other programs{less}"
        )
    if expert_memory == "auto" and slots < most == experts:
        whole = others + experts * slot_bytes
        if whole <= replace(room, usable=room.total).free and (hint := room.hint(whole, "all experts fit")):
            notes.append(hint)
    return replace(result, notes=tuple(notes))


def _what_is_too_much(plan: Plan, least: int) -> str:
    """What takes the most, the option that would make it fit, and what is needed with ``least`` experts."""
    needed = plan.total - plan.arena + least * plan.slot_bytes
    if needed <= plan.limit:
        room = plan.limit - plan.total + plan.arena
        return f"give less --expert-memory: besides everything else there is room for {show_size(room)}"
    parts = {"the dense part": plan.dense, "the KV cache": plan.kv, "kept prompts": plan.prefixes}
    name, size = max(parts.items(), key=lambda part: part[1])
    without = needed - plan.prefixes
    advice = f", give less --prefix-memory: without it {show_size(without)} will do" * (without <= plan.limit)
    return (
        f"most goes to {name} ({show_size(size)}){advice}; with {least} experts all need {show_size(needed)}"
    )
