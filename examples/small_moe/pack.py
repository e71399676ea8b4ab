"""Packs a trained checkpoint as mlx-community publishes such models: MLX affine quantization, 4 bits.

    python -m examples.small_moe.pack small-moe examples/small_moe/model

Groups are of 32 weights (experts are 32 wide); routers have 8 bits. The work is mlx-lm's own.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import mlx_lm

from .quantize import BITS, GROUP_SIZE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def pack(source: Path, target: Path) -> None:
    """Writes ``target``, which must not exist."""
    mlx_lm.convert(str(source), str(target), quantize=True, q_bits=BITS, q_group_size=GROUP_SIZE)
    # As they were trained with, not as a library writes them again.
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack a trained checkpoint at 4 bits.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    pack(args.source, args.target)
    files = sorted(args.target.iterdir())
    for file in files:
        print(f"{file.stat().st_size:10,} {file.name}")
    print(f"{sum(f.stat().st_size for f in files):10,} bytes in all")


if __name__ == "__main__":
    main()
