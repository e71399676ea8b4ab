"""Which expert leaves the arena when room is needed.

A policy gives every expert a priority from its uses alone; the arena evicts the lowest. Time is counted in
uses of layers, so that an expert's age does not depend on the machine's speed.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Policy(Protocol):
    """Priorities of all experts of the model, [layers, experts]: the lowest is evicted first."""

    priority: np.ndarray

    def touch(self, layer: int, experts: np.ndarray) -> None:
        """The router of ``layer`` (row of ``priority``) picked these experts, now."""


class LRU:
    """Least recently used."""

    def __init__(self, layers: int, experts: int):
        self.priority = np.zeros((layers, experts))
        self._now = 0

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self._now += 1
        self.priority[layer, experts] = self._now


class LRFU:
    """Recency and frequency together (Lee et al., "LRFU", IEEE Transactions on Computers 2001).

    An expert's worth is the sum over its uses of 2^(-age / half_life): LFU for an infinite half-life, LRU for
    a very short one. Multiplying every worth by 2^(now / half_life) keeps the order and makes it a sum that
    only changes at a use; its logarithm is kept, so nothing overflows. Uses are remembered after eviction.

    Args:
        half_life: in tokens.
    """

    def __init__(self, layers: int, experts: int, half_life: float = 8.0):
        self.priority = np.full((layers, experts), -np.inf)
        self._step = 1.0 / (half_life * layers)
        self._now = 0

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self._now += 1
        self.priority[layer, experts] = np.logaddexp2(self.priority[layer, experts], self._now * self._step)


POLICIES: dict[str, type[LRU] | type[LRFU]] = {"lru": LRU, "lrfu": LRFU}
