"""Arithmetic before allocation: what the machine has, what a model takes, how many slots the experts get."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_flashmoe.errors import MemoryPlanError
from mlx_flashmoe.sizes import show_size

# What a generation takes besides the named parts: activations of one chunk of a prompt, buffers MLX keeps for
# reuse, the interpreter.
WORKING_BYTES = 500 * 10**6
# Of memory, what is left to everyone else at least where the arena takes the rest.
OTHERS_SHARE = 0.05
# Freed buffers MLX may keep for reuse; more would only take memory from the page cache.
CACHE_LIMIT = 128 * 2**20

# The interpreter and MLX; on a CPU also numba, and the states of a segment of the delta rule.
PROCESS_BYTES = {mx.DeviceType.gpu: 64 * 10**6, mx.DeviceType.cpu: 260 * 10**6}
MAX_CHUNK = 4096

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


def physical_memory() -> int:
    """Bytes of memory, or of a control group's limit on it: programs and page cache together."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def available_memory() -> int:
    """Bytes of memory that nobody has taken, page cache included, as Linux counts it; elsewhere all of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return physical_memory()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(kib)


def memory_limit() -> int:
    """Bytes this process may take: of memory, or of the GPU's working set."""
    limits = [physical_memory()]
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        size = info.get("max_recommended_working_set_size") or info.get("memory_size")
        if size:
            limits.append(int(size))
    return min(limits)


def largest_buffer() -> int | None:
    """Bytes of the largest array on the current device; None where nothing but memory limits it."""
    if mx.default_device() != mx.gpu:
        return None
    length = mx.device_info().get("max_buffer_length")
    return int(length) if length else None


def _cgroup_limits() -> list[int]:
    """Memory limits of the control groups this process is in (version 1 and 2), and of their parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            try:
                text = (folder / name).read_text().strip()
                if text.isdigit():
                    limits.append(int(text))
            except OSError:
                pass
            if folder == root or folder == folder.parent:
                break
            folder = folder.parent
    return limits


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
    limit: int | None = None,
    largest_buffer: int | None = None,
    may_read_directly: bool = False,
) -> Plan:
    """Decides how many slots the arena has.

    Args:
        expert_memory: a size, "os" (slots only for the layer at work; the page cache does the rest), or "auto".
        dense, kv, prefixes: bytes of the dense part in memory, of the KV cache, of prompts kept for later.
        slot_bytes: bytes of one slot.
        experts: in the whole model.
        active: experts a token uses in a layer.
        limit: bytes there are; this machine's if None.
        largest_buffer: bytes one array can have, where the device limits that: the arena is one.
        may_read_directly: "auto" may choose to read experts around the page cache.

    Raises:
        MemoryPlanError: it does not fit; says what would.
    """
    limit = memory_limit() if limit is None else limit
    # In prefill three waves share the arena: one computed, one being read, one spared.
    least = min(experts, max(active, 3))
    most = experts if largest_buffer is None else min(experts, largest_buffer // slot_bytes)
    room = limit - dense - kv - prefixes - WORKING_BYTES
    direct = False
    if expert_memory == "auto":
        if most == experts and experts * slot_bytes <= room:
            slots, reason = experts, "all of them fit"
        elif may_read_directly:
            # What is read into the arena need not be in the page cache too; some memory is for everyone else.
            direct = True
            others = max(int(OTHERS_SHARE * limit), limit - available_memory())
            slots = max(least, min(most, (room - others) // slot_bytes))
            reason = f"{100 * slots / experts:.0f}% of them; the others are read around the page cache"
        else:
            # Half for the arena, half left to the page cache.
            slots = max(least, min(most, room // 2 // slot_bytes))
            reason = f"{100 * slots / experts:.0f}% of them; the rest of memory is left to the page cache"
    elif expert_memory == "os":
        slots = min(experts, max(least, min(32, room // slot_bytes)))
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
    result = Plan(dense, int(slots), slot_bytes, kv, limit, reason, prefixes, direct)
    if result.total > limit:
        raise MemoryPlanError(f"{result}: does not fit; {_what_is_too_much(result, least)}")
    return result


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
