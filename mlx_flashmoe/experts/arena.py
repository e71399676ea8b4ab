"""SlotArena: a fixed pool of slots in MLX memory, shared by all layers; which expert is where; what leaves.

The slab is one uint32 array [slots, words]. MLX does not know that its contents change, so one rule keeps
this exact, and it is kept here, in ``SlotArena._claim``, and nowhere else:

    A slot is written, and its place in the table given to another expert, only after every computation that
    was built on its old contents has been evaluated.

For this, whoever builds a computation on slots tells the arena its output (``used``). Nothing else may write
to the slab; the slab is never rebound, never captured by mx.compile, never the target of an in-place
operation. Residency is a matter of speed alone: a slot holds its expert's exact bytes or belongs to nobody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashmoe.errors import MemoryPlanError, ReadError
from mlx_flashmoe.experts.leaving import Leaving
from mlx_flashmoe.experts.policy import LRFU, Policy
from mlx_flashmoe.experts.slab import make_slab
from mlx_flashmoe.experts.store import ExpertStore, PendingReads, ReadRequest
from mlx_flashmoe.experts.table import make_table

# Outputs remembered at most; older ones are evaluated (nearly always long since done) and forgotten.
MAX_PENDING = 64

# Bytes of experts that load_all reads at once: enough to keep all disks busy, few enough to show how it gets on.
LOAD_BYTES = 1 << 28


@dataclass(eq=False)
class Fetch:
    """Experts on their way into slots. ``wait`` before building a computation on them."""

    arena: SlotArena
    row: int
    experts: np.ndarray
    slots: np.ndarray
    reads: PendingReads | None

    def wait(self) -> None:
        """Returns when the experts are in place; if a read fails none of them is, and ReadError is raised."""
        if self.reads is None:
            return
        if self.arena._unsure:  # an interrupt on the way out, maybe of this very function
            self.arena._repair()
            self.reads = None
            return
        started = time.perf_counter()
        try:
            whole = np.array(self.reads.wait())
        except ReadError:
            self._end(np.zeros(len(self.slots), dtype=bool))
            raise
        except BaseException:
            self.arena._unsure = True
            raise
        finally:
            self.arena.reading_seconds += time.perf_counter() - started
        self._end(whole)

    def _end(self, whole: np.ndarray) -> None:
        """The reads are over: those that were read ``whole`` are in place, the slots of the others free."""
        arena = self.arena
        arena._unsure = True
        # An expert that arrived by another way in the meantime keeps its place.
        new = whole & (arena.slot_of[self.row, self.experts] < 0)
        arena.slot_of[self.row, self.experts[new]] = self.slots[new]
        arena._held[self.slots[new]] = True
        arena._free(self.slots[~new])
        arena._in_flight.remove(self)
        self.reads = None
        arena._unsure = False

    def cut_short(self) -> None:
        """Like ``wait``, but reads that have not begun are given up; and a failed one is no error."""
        if self.reads is not None:
            self.reads.cancel()
            with contextlib.suppress(ReadError):
                self.wait()


class SlotArena:
    """``slots`` slots for the experts of every layer of ``store``.

    Attributes:
        slot_of: int32 [layer rows, experts], -1 where an expert is not resident.
        table: the same, where the device can look slots up.
        resident: every expert of the model is in its slot, for good (``load_all``).
        hits, misses: routed experts found resident and not, since the start.
        routing_seconds, reading_seconds: spent waiting for routers' choices and for reads, since the start.
    """

    def __init__(self, store: ExpertStore, slots: int, policy: Policy | None = None):
        if slots < 1:
            raise MemoryPlanError(f"[SlotArena] at least one slot is needed but got {slots}")
        self.store = store
        self.row_of = {layer: row for row, layer in enumerate(store.layers)}
        experts = max(store.num_experts(layer) for layer in store.layers)
        rows = len(store.layers)
        total = sum(store.num_experts(layer) for layer in store.layers)
        self.capacity = min(slots, total)
        self.resident = False
        self.policy = policy or LRFU(rows, experts)
        self.slot_bytes = store.slot_bytes
        self._slab = make_slab(self.capacity, self.slot_bytes)
        self.table = make_table(rows, experts)
        self.slot_of = self.table.host
        # Of each slot: the expert it was last claimed for, as a flat index into slot_of, and whether it holds that.
        self._owner = np.zeros(self.capacity, dtype=np.int64)
        self._held = np.zeros(self.capacity, dtype=bool)
        self._free_slots = list(range(self.capacity - 1, -1, -1))
        self._leaving = Leaving(self.policy, self._owner, self._held)
        self._used_by = np.full(self.capacity, -1, dtype=np.int64)
        self._pending: dict[int, mx.array] = {}
        self._next_use = 0
        self._in_flight: list[Fetch] = []
        self._unsure = False  # what tells whose a slot is may be half changed: an interrupt came
        self.hits = 0
        self.misses = 0
        self.routing_seconds = 0.0
        self.reading_seconds = 0.0

    @property
    def slab(self) -> mx.array:
        """uint32 [slots, words], the memory kernels read."""
        return self._slab.array

    def fetch(self, layer: int, experts: np.ndarray, keep: np.ndarray | None = None) -> Fetch:
        """Starts reading those of ``experts`` (distinct) that are not resident.

        Args:
            layer: the layer number.
            experts: int [n], distinct; at most as many as there are slots.
            keep: slots that must not be given up besides those of ``experts`` themselves.
        """
        if self._unsure:
            self._repair()
        row = self.row_of[layer]
        slots = self.slot_of[row, experts]
        missing = experts[slots < 0]
        if not len(missing):
            return Fetch(self, row, missing, missing, None)
        busy = {slot for slot in slots.tolist() if slot >= 0}
        if keep is not None:
            busy.update(keep.tolist())
        claimed = self._claim(len(missing), busy)
        self._owner[claimed] = row * self.slot_of.shape[1] + missing
        requests = [
            ReadRequest(layer, expert, slot) for expert, slot in zip(missing.tolist(), claimed.tolist())
        ]
        reads = self.store.prepare(requests, self._slab)
        fetch = Fetch(self, row, missing, claimed, reads)
        self._in_flight.append(fetch)
        self._unsure = False
        reads.begin()
        if len(self._free_slots) < len(missing):
            self._leaving.choose_ahead(len(missing), busy)  # now, while the disks are busy
        return fetch

    def touch(self, layer: int, experts: np.ndarray) -> None:
        """Counts a routing decision (distinct experts), for the policy and the hit rate, before its reads are over."""
        row = self.row_of[layer]
        missing = int(np.count_nonzero(self.slot_of[row][experts] < 0))
        self.hits += len(experts) - missing
        self.misses += missing
        self.policy.touch(row, experts)

    def used(self, slots: np.ndarray, output: mx.array, before: int | None = None) -> int:
        """``output`` is a lazy array computed from the contents of ``slots``.

        Args:
            before: what an earlier call returned, if ``output`` was computed from that call's output: takes its place.
        """
        use = before
        if use is None:
            use = self._next_use
            self._next_use += 1
        self._pending[use] = output
        self._used_by[slots] = use
        while len(self._pending) > MAX_PENDING:
            self._compute(next(iter(self._pending)))
        return use

    def all_computed(self) -> None:
        """Everything that ``used`` was told of has been evaluated, or is now: none of it is kept any longer."""
        mx.eval(list(self._pending.values()))
        self._pending.clear()

    def settle(self) -> None:
        """Ends reads that nobody waits for any more: those of a call that was interrupted, or read-ahead."""
        if self._unsure:
            self._repair()
        for fetch in list(self._in_flight):
            fetch.cut_short()

    def clear(self) -> None:
        """Forgets every resident expert; what was ever used is no reason to keep one."""
        self.settle()
        self.slot_of[:] = -1
        self._free(np.flatnonzero(self._held))
        self.resident = False

    def load_all(self, progress: Callable[[int], None] | None = None) -> None:
        """Reads every expert of the model in file order; afterwards nothing is ever missing.

        There must be a slot for each.

        Args:
            progress: called with the experts read, now and then.
        """
        step = max(1, LOAD_BYTES // self.slot_bytes)
        done = 0
        for layer in self.store.layers:
            experts = np.arange(self.store.num_experts(layer))
            for start in range(0, len(experts), step):
                self.fetch(layer, experts[start : start + step]).wait()
                done += len(experts[start : start + step])
                if progress is not None:
                    progress(done)
        self.resident = True

    def _claim(self, n: int, busy: set[int]) -> np.ndarray:
        """Takes ``n`` slots for writing: free ones first, then the least worth keeping. THE RULE is here."""
        free = self._free_slots
        victims = self._leaving.choose(n - len(free), busy) if n > len(free) else []
        if len(free) + len(victims) < n and self._in_flight:
            self.settle()
            victims = self._leaving.choose(n - len(free), busy) if n > len(free) else []
        if len(free) + len(victims) < n:
            raise MemoryPlanError(
                f"[SlotArena] {n} experts are needed at once beside {len(busy)} slots in use, "
                f"but there are only {self.capacity} slots; give more --expert-memory"
            )
        self._unsure = True  # until whoever claims has it written down that these slots are being filled
        claimed = np.array([free.pop() for _ in range(min(n, len(free)))] + victims, dtype=np.int32)
        for use in set(self._used_by[claimed].tolist()):
            self._compute(use)
        self._used_by[claimed] = -1
        if victims:
            self.slot_of.reshape(-1)[self._owner[victims]] = -1
            self._held[victims] = False
        return claimed

    def _compute(self, use: int) -> None:
        """Evaluates and forgets what ``used`` was told of, if it is not yet forgotten."""
        if use in self._pending:
            mx.eval(self._pending[use])
            del self._pending[use]  # only now: an interrupt must not make it forgotten

    def _repair(self) -> None:
        """After an interrupt, wherever it came: once nothing is being read, what the table says is so, and all else
        follows from it."""
        for fetch in self._in_flight:
            if fetch.reads is not None:
                fetch.reads.end()
                fetch.reads = None
        self._in_flight.clear()
        rows, experts = np.nonzero(self.slot_of >= 0)
        slots = self.slot_of[rows, experts]
        self._held[:] = False
        self._held[slots] = True
        self._owner[slots] = rows * self.slot_of.shape[1] + experts
        self._free_slots[:] = np.flatnonzero(~self._held).tolist()
        self._unsure = False

    def _free(self, slots: np.ndarray) -> None:
        self._held[slots] = False
        self._free_slots.extend(slots.tolist())
