"""Hit rates of the arena's replacement policies on a recorded routing trace, for several arena sizes.

    python examples/compare_policies.py examples/small_moe/routing.npz --sizes 0.1 0.2 0.3 0.5

A trace holds ``experts``, integer [tokens, layers, active]. Every layer of a token asks for its experts in turn, as in
decoding; what is missing takes the slots least worth keeping. "most used" keeps, from the start to the end, the experts
that the whole trace uses most: what no policy can know.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe.experts.policy import LRFU, LRU, Policy

HALF_LIVES = (4, 8, 16, 64)  # tokens


def hit_rate(trace: np.ndarray, experts: int, slots: int, policy: Policy) -> float:
    """The share of routed experts that are found among ``slots`` kept ones.

    Args:
        trace: integer [tokens, layers, active].
        experts: in a layer.
    """
    layers, active = trace.shape[1:]
    resident = np.zeros((layers, experts), dtype=bool)
    hits = held = 0
    for token in trace:
        for layer, routed in enumerate(token):
            policy.touch(layer, routed)
            missing = routed[~resident[layer, routed]]
            hits += active - len(missing)
            resident[layer, missing] = True
            held += len(missing)
            if held > slots:
                worth = np.where(resident, policy.priority, np.inf)
                worth[layer, routed] = np.inf  # at work
                leaving = np.argpartition(worth, held - slots - 1, axis=None)[: held - slots]
                resident.reshape(-1)[leaving] = False
                held = slots
    return hits / trace.size


def most_used(trace: np.ndarray, experts: int, slots: int) -> float:
    """Of the experts used most in the whole trace, kept all along."""
    layer = np.arange(trace.shape[1])[None, :, None]
    counts = np.bincount((layer * experts + trace).ravel(), minlength=trace.shape[1] * experts)
    return float(np.sort(counts)[::-1][:slots].sum() / trace.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares of all experts"
    )
    parser.add_argument("--tokens", type=int, default=4000, help="of the trace, from its start")
    args = parser.parse_args()
    trace = np.load(args.trace)["experts"][: args.tokens].astype(np.int64)
    layers, experts = trace.shape[1], int(trace.max()) + 1
    policies: dict[str, Callable[[], Policy]] = {"LRU": lambda: LRU(layers, experts)}
    for half_life in HALF_LIVES:
        policies[f"LRFU, half-life {half_life}"] = lambda h=half_life: LRFU(layers, experts, h)
    table = Table("", *(f"{size:.0%} in memory" for size in args.sizes), box=None)
    slots = [int(size * layers * experts) for size in args.sizes]
    for name, make in policies.items():
        table.add_row(name, *(f"{hit_rate(trace, experts, n, make()):.1%}" for n in slots))
    table.add_row("most used", *(f"{most_used(trace, experts, n):.1%}" for n in slots))
    Console().print(table)


if __name__ == "__main__":
    main()
