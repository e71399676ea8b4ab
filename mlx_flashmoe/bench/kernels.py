"""The expert kernels against MLX's own operations and against the memory, on whatever device runs this.

Every path computes the same experts. In each round every path runs twice, in an order drawn anew: once to wake the
cores, which may be asleep after a path that uses only one, and once for the clock; on experts that no path has
touched for a whole turn through the slab. So neither caches nor a machine that is busy for a moment favour one of
them. A path's figure is its median over the rounds.

The memory is measured in the same rounds. On a CPU: reading as many bytes as the experts have, on all threads.
On a GPU: copying an array, reading and writing counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe import kernels, system
from mlx_flashmoe.errors import FlashMoEError, RequestError
from mlx_flashmoe.kernels import chosen, gpu, mlx_experts, reference
from mlx_flashmoe.kernels.random_slab import random_slab
from mlx_flashmoe.layout import PROJECTIONS, BlobLayout, Projection, Quantization
from mlx_flashmoe.reports import check_report, write_report

TOKENS = (1, 4, 16)
TOP_K = (4, 10)
MEMORY = "memory"
BASELINE = "MLX gather_qmm"
TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 1e-2}
LEAST_ROUNDS, MOST_ROUNDS = 5, 500
CHAIN = 16  # calls to a timing on a GPU, each on the result of the one before: what decoding pays for a layer

Path_ = Callable[
    [mx.array, mx.array, mx.array], mx.array
]  # (x [T, D], slots [T, K], weights [T, K]) -> [T, D]


@dataclass(frozen=True)
class Figure:
    """One path in one case. Seconds are of one call; ``gb_per_s`` counts the bytes of the distinct experts."""

    tokens: int
    top_k: int
    path: str
    seconds: float
    seconds_p10: float
    seconds_p90: float
    gb_per_s: float
    rounds: int


def _mlx_path(slab: mx.array, layout: BlobLayout, dtype: mx.Dtype) -> Path_:
    """MLX's own operations: three gather_qmm over all slots, SwiGLU, weighting, sum.

    Over views of the slab on Metal, where they cost nothing. The CPU would copy all of them in every call, and CUDA
    refuses them: there MLX gets contiguous arrays, on the CPU with scales in the activations' dtype.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu

    def part(component: Any) -> mx.array:
        view = mlx_experts.view(slab, component)
        return view.astype(dtype) if on_cpu and view.dtype != mx.uint32 else view

    parts = {n: [part(c) for c in p.components.values()] for n, p in layout.projections.items()}
    mx.eval(parts)

    def project(x: mx.array, name: str, p: Projection, slots: mx.array) -> mx.array:
        weight, scales, biases = parts[name]
        return mx.gather_qmm(
            x, weight, scales, biases, rhs_indices=slots, transpose=True, group_size=p.group_size, bits=p.bits
        )

    def ffn(x: mx.array, slots: mx.array, weights: mx.array) -> mx.array:
        rows = x[:, None, None, :]
        gate, up = (project(rows, n, getattr(layout, n), slots) for n in PROJECTIONS[:2])
        y = project(nn.silu(gate) * up, "down", layout.down, slots).squeeze(2)
        return (y * weights[..., None]).sum(axis=1).astype(x.dtype)

    return ffn


def _our_paths(slab: mx.array, layout: BlobLayout) -> dict[str, Path_]:
    """Every kernel that runs on the current device, GPU kernels in every formulation, and as they were tuned."""

    def bind(function: Callable[..., mx.array], **options: Any) -> Path_:
        return lambda x, slots, weights: function(x, slab, slots, weights, layout, **options)

    module = gpu.backend()
    if module is None:
        try:
            return {"numba": bind(import_module("mlx_flashmoe.kernels.cpu").expert_ffn)}
        except ImportError:
            raise RequestError(
                "bench kernels needs numba on a CPU: pip install 'mlx-flashmoe[cpu]'"
            ) from None
    backend = module.__name__.rpartition(".")[2]
    formulations = list(gpu.FORMULATIONS)
    if module.LANGUAGE.prefer_matrix and gpu.supports_matrix(layout, mx.bfloat16):
        formulations.append(gpu.MATRIX)
    paths = {f"{backend} {f}": bind(module.expert_ffn, formulation=f) for f in formulations}
    return {**paths, f"{backend} as tuned": bind(kernels.expert_ffn)}


def memory_reader(slab: mx.array, nbytes: int) -> Callable[[], float]:
    """A function that measures the memory and returns bytes per second; on a CPU it reads ``nbytes``."""
    if mx.default_device().type != mx.DeviceType.cpu:
        source = slab.reshape(-1)[: 1 << 28]  # 1 GiB: launching takes no time beside it
        mx.eval(source)

        def copy() -> float:
            started = perf_counter()
            mx.eval(~source)
            return 2 * source.nbytes / (perf_counter() - started)

        return copy

    words = np.asarray(slab).reshape(-1).view(np.uint64)
    threads = len(system.usable_processors())
    pool = ThreadPoolExecutor(threads)
    pieces = cycle(np.array_split(words, max(1, words.nbytes // 2**20)))  # of 1 MiB
    count = max(threads, nbytes // 2**20)

    def read() -> float:
        todo = [next(pieces) for _ in range(count)]
        shares = [todo[i::threads] for i in range(threads)]
        started = perf_counter()
        list(pool.map(lambda share: [np.add.reduce(piece) for piece in share], shares))
        return sum(p.nbytes for p in todo) / (perf_counter() - started)

    return read


def _turns(slots: int, tokens: int, top_k: int) -> Iterator[mx.array]:
    """int32 [tokens, top_k] for ever, going round the slab in an order that is not its own."""
    order = np.random.default_rng(1).permutation(slots)
    at = 0
    while True:
        picked = order[(at + np.arange(tokens * top_k)) % slots].reshape(tokens, top_k)
        at = (at + tokens * top_k) % slots
        turn = mx.array(picked.astype(np.int32))
        mx.eval(turn)
        yield turn


def _check(name: str, y: mx.array, expected: mx.array, case: str) -> None:
    a, b = (np.array(v.astype(mx.float32)).astype(np.float64) for v in (y, expected))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not error <= TOLERANCE[y.dtype]:
        raise FlashMoEError(
            f"bench kernels: {name} at {case} is wrong: it differs from the reference by {error:.1e} of its "
            f"size, allowed is {TOLERANCE[y.dtype]:.0e}"
        )


def _time(path: Path_, x: mx.array, turns: list[mx.array], weights: mx.array) -> float:
    """Seconds of a call; of several, each works on the result of the one before."""
    started = perf_counter()
    y = path(x, turns[0], weights)
    for slots in turns[1:]:
        x = x + y
        y = path(x, slots, weights)
    mx.eval(y)
    return (perf_counter() - started) / len(turns)


def _measure(
    tokens: int, top_k: int, paths: dict[str, Path_], slab: mx.array, layout: BlobLayout, seconds: float
) -> list[Figure]:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    dtype = mx.float32 if on_cpu else mx.bfloat16
    chain = 1 if on_cpu else CHAIN
    rng = np.random.default_rng(2)
    x = mx.array(rng.standard_normal((tokens, layout.hidden_size)).astype(np.float32)).astype(dtype)
    shares = rng.uniform(0.5, 1.5, (tokens, top_k))
    weights = mx.array((shares / shares.sum(axis=1, keepdims=True)).astype(np.float32))
    turns = _turns(slab.shape[0], tokens, top_k)

    first = next(turns)
    expected = reference.expert_ffn(x, slab, first, weights, layout)
    for name, path in paths.items():  # compiles what is compiled at first use, too
        _check(name, path(x, first, weights), expected, f"T={tokens}, K={top_k}")

    distinct = min(tokens * top_k, slab.shape[0])
    nbytes = distinct * sum(c.nbytes for _, _, c in layout.components())
    memory = memory_reader(slab, nbytes)
    memory()
    taken: dict[str, list[float]] = {name: [] for name in [MEMORY, *paths]}
    started = perf_counter()
    rounds = 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and perf_counter() - started < seconds):
        for name in rng.permutation(list(taken)).tolist():
            for timed in (False, True):
                if name == MEMORY:
                    elapsed = nbytes / memory()
                else:
                    elapsed = _time(paths[name], x, [next(turns) for _ in range(chain)], weights)
                if timed:
                    taken[name].append(elapsed)
        rounds += 1
    figures = []
    for name, times in taken.items():
        low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
        figures.append(Figure(tokens, top_k, name, middle, low, high, nbytes / middle / 1e9, rounds))
    return figures


def environment() -> dict[str, Any]:
    """What was measured on: device, system, versions."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    device = mx.default_device()
    packages = ("mlx-flashmoe", "mlx", "mlx-cuda-13", "mlx-metal", "numpy", "numba")
    return {
        "device": "cpu" if device.type == mx.DeviceType.cpu else "gpu",
        "device_name": mx.device_info(device).get("device_name"),
        "cpus": os.cpu_count(),
        "machine": system.machine_name(),
        "system": system.system_name(),
        "python": sys.version.split()[0],
        "versions": {p: v for p in packages if (v := installed(p))},
    }


def run(
    hidden: int,
    intermediate: int,
    bits: int,
    group_size: int,
    slots: int,
    seconds: float = 5.0,
    json_file: str | None = None,
    console: Console | None = None,
) -> list[Figure]:
    """Measures, prints a table, writes JSON.

    Args:
        hidden, intermediate, bits, group_size: the experts' shape and quantization.
        slots: experts in memory to rotate over.
        seconds: to spend on each case at least, unless ``MOST_ROUNDS`` are over sooner.
        json_file: where to write figures and environment.
        console: to print on; stdout by default.

    Raises:
        FlashMoEError: a kernel disagrees with the reference.
        RequestError: a shape that cannot be; a file that cannot be written; fewer slots than a token's experts;
            no kernel for this device.
    """
    check_report(json_file)
    if slots < max(TOP_K):
        raise RequestError(f"bench kernels: --slots must be at least {max(TOP_K)}, a token's experts")
    try:
        quantization = {n: Quantization(bits, group_size) for n in PROJECTIONS}
        layout = BlobLayout.build(hidden, intermediate, quantization, "bfloat16")
    except ValueError as e:
        raise RequestError(f"bench kernels: {e}") from None
    slab = random_slab(layout, slots)
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.bfloat16
    paths = {BASELINE: _mlx_path(slab, layout, dtype), **_our_paths(slab, layout)}
    console = console or Console()
    for top_k in TOP_K:
        chosen.prepare(layout, dtype, top_k, lambda count: np.array(slab[:count]), console.print)
    about = environment()
    console.print(
        f"{slots} experts {intermediate} x {hidden} of {layout.blob_size / 1e6:.2f} MB, {bits} bits, "
        f"groups of {group_size}; {str(dtype).rpartition('.')[2]} x",
        f"{about['device_name']} ({about['device']}), "
        + ", ".join(f"{p} {v}" for p, v in about["versions"].items()),
        sep="\n",
        highlight=False,
    )
    table = Table(
        *("T", "K", "path", "time", "p10-p90", "GB/s", "memory", "x MLX"),
        caption="T tokens, K experts each. Median, 10th and 90th percentile of a call. GB/s of the experts' "
        "bytes, as a share of the memory's bandwidth; how many times as fast as MLX's own operations.",
    )
    for column in table.columns:
        column.justify = "left" if column.header == "path" else "right"
        column.no_wrap = True
    figures: list[Figure] = []
    for tokens in TOKENS:
        for top_k in TOP_K:
            case = _measure(tokens, top_k, paths, slab, layout, seconds)
            _add_case(table, case)
            figures += case
    console.print(table)
    if json_file is not None:
        shape = {"hidden": hidden, "intermediate": intermediate, "bits": bits, "group_size": group_size}
        written = {
            "environment": about,
            "shape": {**shape, "slots": slots},
            "figures": list(map(asdict, figures)),
        }
        write_report(json_file, written)
    return figures


def _add_case(table: Table, case: list[Figure]) -> None:
    memory = next(f for f in case if f.path == MEMORY)
    baseline = next(f for f in case if f.path == BASELINE)
    for f in case:
        unit, size = _unit(f.seconds)
        table.add_row(
            *(map(str, (f.tokens, f.top_k)) if f is case[0] else ("", "")),
            f.path,
            f"{_digits(f.seconds / size)} {unit}",
            f"{_digits(f.seconds_p10 / size)}-{_digits(f.seconds_p90 / size)}",
            _digits(f.gb_per_s),
            "" if f is memory else f"{f.gb_per_s / memory.gb_per_s:.0%}",
            "" if f is memory else f"{baseline.seconds / f.seconds:.1f}",
            end_section=f is case[-1],
        )


def _unit(seconds: float) -> tuple[str, float]:
    """The unit to show a time in, and its size in seconds."""
    return next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))


def _digits(number: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{number:.0f}" if number >= 99.5 else f"{number:.3g}"
