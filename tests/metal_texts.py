"""All Metal kernels that the emulation compiles, as text: ``python tests/metal_texts.py FOLDER`` writes them there.

A file holds what MLX generates and hands to Apple's compiler behind its own headers. ``.ci/apple-compiler`` compiles
the files on a Mac.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import test_metal_kernels
import test_row_kernels
from metal_emulator import Launch, record
from metal_emulator.coverage import name_of

from mlx_flashmoe.kernels import metal


def every_launch() -> Iterator[Launch]:
    """The launches of every case of the emulation's tests, traced and not run."""
    for case in (*test_metal_kernels.every_configuration(), *test_metal_kernels.MIXED_AND_UNQUANTIZED):
        yield from test_metal_kernels.launches_of(case)
    for row_case in test_row_kernels.CASES.values():
        yield from record(metal.LANGUAGE, row_case.kernel, *row_case.arrays())


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    distinct = {launch.key: launch for launch in every_launch()}
    for key, launch in distinct.items():
        (folder / f"{name_of(launch)}_{key}.metal").write_text(launch.text, encoding="utf-8")
    print(f"{len(distinct)} kernels written to {folder}")


if __name__ == "__main__":
    main()
