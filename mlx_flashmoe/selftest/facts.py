"""Facts about the machine that a report of what works on it needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flashmoe import memory, system
from mlx_flashmoe.bench.kernels import environment
from mlx_flashmoe.sizes import show_size


def facts_of(folder: Path) -> dict[str, Any]:
    """Versions, chip, system, and bytes of memory and of the disk with ``folder``; None is unknown.

    Returns:
        what ``bench`` writes, with platform, memory (physical, available, gpu_working_set, largest_buffer) and
        disk_free.
    """
    on_gpu = mx.default_device() == mx.gpu
    working_set = mx.device_info().get("max_recommended_working_set_size") if on_gpu else None
    return {
        **environment(),
        "platform": system.release(),
        "memory": {
            "physical": system.physical_memory(),
            "available": system.available_memory(),
            "gpu_working_set": int(working_set) if working_set else None,
            "largest_buffer": memory.largest_buffer(),
        },
        "disk_free": shutil.disk_usage(folder).free,
    }


def versions(facts: dict[str, Any]) -> str:
    """For people: the packages, without this one, and Python."""
    packages = [f"{p} {v}" for p, v in facts["versions"].items() if p != "mlx-flashmoe"]
    return ", ".join([*packages, f"Python {facts['python']}"])


def chip(facts: dict[str, Any]) -> str:
    """For people."""
    return f"{facts['device_name']} ({facts['device'].upper()}), {facts['cpus']} cores, {facts['machine']}"


def memory_line(facts: dict[str, Any]) -> str:
    """For people: sizes that are known."""
    sizes = facts["memory"]
    named = {
        "of which available": sizes["available"],
        "GPU working set": sizes["gpu_working_set"],
        "largest buffer": sizes["largest_buffer"],
    }
    return ", ".join([show_size(sizes["physical"]), *(f"{n} {show_size(s)}" for n, s in named.items() if s)])
