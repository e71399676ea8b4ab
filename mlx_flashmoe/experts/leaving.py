"""Which experts leave the arena next: those worth least, found while the disks are busy.

Looking through all slots takes about as long as handing out the reads that wait for the answer. So the next few to
leave are chosen right after a layer's reads have begun, and the next layer's claim only checks them.
"""

from __future__ import annotations

import numpy as np

from mlx_flashmoe.experts.policy import Policy

SPARE = 8  # chosen ahead beyond what is likely to be needed


class Leaving:
    """The order in which slots are given up.

    Args:
        policy: says what experts are worth.
        owner: of each slot, its expert as a flat index into the policy's priorities.
        held: of each slot, whether it holds that expert, and so may be given up. Both are the arena's.
    """

    def __init__(self, policy: Policy, owner: np.ndarray, held: np.ndarray):
        self._policy = policy
        self._owner = owner
        self._held = held
        self._ahead: list[tuple[int, float]] = []  # slots, worth least first, and what they were worth

    def choose(self, n: int, busy: set[int]) -> list[int]:
        """The ``n`` slots worth least, fewer if there are not so many, without those in ``busy``.

        What was chosen ahead goes first: experts that have come since are left alone if that will do.
        """
        chosen = self._from_ahead(n, busy)
        return chosen if len(chosen) == n else self._worth_least(n, busy)[0].tolist()

    def choose_ahead(self, n: int, busy: set[int]) -> None:
        """Prepares for a ``choose`` of less than ``n``."""
        slots, worth = self._worth_least(n + SPARE, busy)
        order = np.argsort(worth)
        self._ahead = list(zip(slots[order].tolist(), worth[order].tolist(), strict=True))

    def _from_ahead(self, n: int, busy: set[int]) -> list[int]:
        chosen: list[int] = []
        worth = self._policy.priority.reshape(-1)
        for slot, then in self._ahead:
            if len(chosen) >= n:
                break
            # One whose expert has been used since, or is another, may be worth more than those not looked at.
            if slot not in busy and self._held[slot] and worth[self._owner[slot]] == then:
                chosen.append(slot)
        return chosen

    def _worth_least(self, n: int, busy: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """Slots and what they are worth, in no order."""
        free = self._held.copy()
        free[list(busy)] = False
        slots = np.flatnonzero(free)
        worth = self._policy.priority.reshape(-1).take(self._owner.take(slots))
        if n < len(slots):
            least = np.argpartition(worth, n)[:n]
            slots, worth = slots[least], worth[least]
        return slots, worth
