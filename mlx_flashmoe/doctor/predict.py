"""The arithmetic: how long a machine takes for a token of an answer, and for a prompt. Pure functions.

A token of an answer takes, one after the other,

    layers x the time of a layer apart from its weights
    + bytes of dense weights, and of the KV cache, / the rate at which products go through weights
    + layers x active experts x bytes of an expert / the same of experts
    + bytes of experts not in the arena / the rate at which they are read, from the page cache or from disk.

Where the arena holds every expert, nothing is read and the router's choice does not come to the host: a layer then
takes its launches instead of the first term's time.

How many are in the arena and in the page cache is an assumption about routing, a ``Curve``: the share of routed
experts found when so large a share of all experts, the most used ones, is kept. Nothing overlaps here, so reading
ahead, and a GPU's work meanwhile, can only make it faster.

A prompt goes through layer by layer. Of every layer the distinct experts of a chunk are read once, while others are
computed: the longer of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Curve = Callable[[float], float]

# What danveloper/flash-moe published of Qwen3.5-397B at 4 bits on an M3 Max with 48 GB, whose GPU reads 400 GB/s and
# whose SSD reads 17.5 GB/s in sequence: 6 GB taken, 35 GB of page cache, in which 71% of a token's experts were found;
# 4.28 ms a layer with 4 experts, of which 1.22 + 0.55 the GPU and 2.41 reading.
_EXPERT = 7_077_888
PUBLISHED_SHARE, PUBLISHED_HITS = 35e9 / (60 * 512 * _EXPERT), 0.71
PUBLISHED_LAYER = 1.22e-3 + 0.55e-3 - (5.5e9 / 60 + 4 * _EXPERT) / 400e9  # 1.47 ms: without the weights' time
# That program streams: it reads and waits in every layer, so the constant is no measure of a model that fits in memory.
# There, ours: each further layer of that shape took 0.42 ms with all experts in an NVIDIA H200's memory, of 4.8 TB/s
# (docs/performance.md). The host's launches bound it; of a Mac's nothing was measured.
RESIDENT_LAYER = 0.42e-3 - (5.5e9 / 60 + 10 * _EXPERT) / 4.8e12
# How the 2.41 ms of reading divide was not published. At what four threads copy out of a page cache elsewhere, disk
# reads were a third as fast as in sequence.
PAGE_CACHE = 20e9
_DISK_SECONDS = 2.41e-3 - 0.71 * 4 * _EXPERT / PAGE_CACHE
SEQUENTIAL_SHARE = 0.29 * 4 * _EXPERT / _DISK_SECONDS / 17.5e9
SYSTEM_SHARE = (48 - 6 - 35) / 48  # of memory: neither the model's nor the page cache's
# Operations for each byte that memory delivers meanwhile: half of what Apple's GPUs are built for.
OPERATIONS_A_BYTE = 32


def uniform(share: float) -> float:
    """Every expert is as likely as any other: no cache of that size finds fewer."""
    return share


def skewed(share: float) -> float:
    """Few experts do most of the work: the power of the share that goes through the one published point."""
    return share ** (math.log(PUBLISHED_HITS) / math.log(PUBLISHED_SHARE)) if share > 0 else 0.0


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second with a model's layers.

    Attributes:
        disk, page_cache: bytes of experts read, as many at a time as a token needs of a layer.
        dense, experts: bytes of weights that products with one token go through.
        dense_flops, expert_flops: additions and multiplications of products with many tokens.
        layer: seconds of a layer for one token, apart from its weights, when experts may be missing.
        resident_layer: the same when none can be.
        prompt_token: seconds of a layer for each token of a prompt, apart from its products.
    """

    disk: float
    page_cache: float
    dense: float
    experts: float
    dense_flops: float
    expert_flops: float
    layer: float
    resident_layer: float
    prompt_token: float


def simulated(disk: float, bandwidth: float) -> Rates:
    """A Mac's, from two figures of its data sheet, bytes per second; the rest is assumed, as said above.

    Args:
        disk: of sequential reads.
    """
    return Rates(
        disk=SEQUENTIAL_SHARE * disk,
        page_cache=PAGE_CACHE,
        dense=bandwidth,
        experts=bandwidth,
        dense_flops=OPERATIONS_A_BYTE * bandwidth,
        expert_flops=OPERATIONS_A_BYTE * bandwidth,
        layer=PUBLISHED_LAYER,
        resident_layer=RESIDENT_LAYER,
        prompt_token=0.0,
    )


@dataclass(frozen=True)
class Work:
    """What a model has to do.

    Attributes:
        layers, experts, active: layers, experts in each, and of these how many a token uses.
        expert_bytes, expert_parameters: of one expert.
        dense_bytes, dense_parameters: of what every token goes through.
        kv_bytes: of the caches at the context's full length, read for every token.
        chunk: tokens of a prompt that go through a layer at once.
    """

    layers: int
    experts: int
    active: int
    expert_bytes: int
    expert_parameters: int
    dense_bytes: int
    dense_parameters: int
    kv_bytes: int
    chunk: int


@dataclass(frozen=True)
class Found:
    """Where a token's experts are: shares that sum to 1."""

    arena: float
    page_cache: float
    disk: float

    @property
    def resident(self) -> bool:
        """Every expert of the model is in the arena."""
        return self.arena == 1.0


def found(work: Work, slots: int, page_cache_bytes: float, curve: Curve) -> Found:
    """The arena keeps the most used experts, the page cache the next.

    Args:
        slots: experts in the arena.
        page_cache_bytes: memory that is left to the page cache.
    """
    total = work.layers * work.experts
    arena = min(1.0, slots / total)
    both = min(1.0, arena + max(0.0, page_cache_bytes) / (total * work.expert_bytes))
    return Found(curve(arena), curve(both) - curve(arena), 1 - curve(both))


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one token of an answer."""

    layers: float
    dense: float
    experts: float
    page_cache: float
    disk: float

    @property
    def seconds(self) -> float:
        return self.layers + self.dense + self.experts + self.page_cache + self.disk


def token_time(rates: Rates, work: Work, where: Found) -> TokenTime:
    routed = work.layers * work.active * work.expert_bytes
    return TokenTime(
        layers=work.layers * (rates.resident_layer if where.resident else rates.layer),
        dense=(work.dense_bytes + work.kv_bytes) / rates.dense,
        experts=routed / rates.experts,
        page_cache=routed * where.page_cache / rates.page_cache,
        disk=routed * where.disk / rates.disk,
    )


def prompt_seconds(rates: Rates, work: Work, tokens: int, resident: bool = False) -> float:
    """Seconds until the first token of an answer, when nothing of the experts is in memory yet.

    Args:
        resident: all of them are, since the model was loaded.
    """
    seconds = 0.0
    layer = rates.resident_layer if resident else rates.layer
    for start in range(0, tokens - 1, work.chunk):
        chunk = min(work.chunk, tokens - 1 - start)
        distinct = work.experts * (1 - (1 - work.active / work.experts) ** chunk)
        reading = 0.0 if resident else distinct * work.expert_bytes / rates.disk
        computing = 2 * chunk * work.active * work.expert_parameters / rates.expert_flops
        dense = 2 * chunk * work.dense_parameters / rates.dense_flops
        other = work.layers * max(layer, chunk * rates.prompt_token)
        seconds += dense + other + work.layers * max(reading, computing)
    # The last token goes through by itself; its experts have mostly just been read.
    return seconds + token_time(rates, work, Found(1, 0, 0) if resident else Found(0, 1, 0)).seconds
