"""Records which experts a converted model's routers pick on the held-out set: a real trace, to test caches on.

    python -m examples.small_moe.record_routing --model CONVERTED examples/small_moe/routing.npz

``experts`` in the file is uint8 [tokens, layers, active]: the ids of each token, ascending, dialogue after dialogue;
``begins`` are the positions at which a dialogue begins.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flashmoe import load
from mlx_flashmoe.evaluate import record_routing

from .heldout import PATH

TOKENS = 20_000


def record(folder: Path, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """``experts`` and ``begins`` of the first held-out dialogues, prompt and expected answer."""
    model, tokenizer = load(folder)
    picked = record_routing(model)
    dialogues: list[np.ndarray] = []
    for line in PATH.read_text().splitlines():
        r = json.loads(line)
        ids = tokenizer.apply_chat_template(
            [*r["messages"], r["expected"]], tools=r["tools"], add_generation_prompt=False
        )
        model(mx.array([ids]))
        experts = np.stack([np.array(layer.pop())[0] for layer in picked], 1)
        dialogues.append(np.sort(experts, -1).astype(np.uint8))
        if sum(map(len, dialogues)) >= tokens:
            break
    lengths = [len(d) for d in dialogues]
    return np.concatenate(dialogues), np.cumsum([0, *lengths[:-1]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record the routing of a converted model on the held-out set."
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    experts, begins = record(args.model)
    np.savez_compressed(args.path, experts=experts, begins=begins)
    tokens, layers, active = experts.shape
    used = np.stack([np.bincount(experts[:, i].ravel(), minlength=experts.max() + 1) for i in range(layers)])
    print(
        f"{args.path}: {tokens} tokens, {layers} layers, {active} experts each; {args.path.stat().st_size:,} bytes"
    )
    print(
        f"most used expert: {used.max() / tokens:.1%} of a layer's tokens; never used: {(used == 0).mean():.1%}"
    )


if __name__ == "__main__":
    main()
