"""How fast a repack is beside `cp` of the same bytes, and what it takes of memory, at the 397B's layer shapes.

    python examples/convert_speed.py --layers 1             quantized already: byte for byte
    python examples/convert_speed.py --layers 1 --layout fused --q-bits 4      quantizing from bfloat16

Each is done --runs times, in turn, from a cold page cache to flushed files, on the disk of --work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from true_shapes import make_checkpoint, measure_conversion

from mlx_flashmoe import system
from mlx_flashmoe.convert import verify


def forget(folder: Path) -> None:
    """Writes out what is not on the disk yet, and has the page cache forget the files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                system.forget_pages(f.fileno())


def copy(source: Path, destination: Path) -> float:
    """Seconds of cp, with flushing; never a reflink."""
    reflink = ["--reflink=never"] if system.LINUX else []
    started = time.perf_counter()
    subprocess.run(["cp", "-r", *reflink, str(source), str(destination)], check=True)
    for path in destination.iterdir():
        with open(path, "rb") as f:
            system.flush(f.fileno())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--layout", choices=["mlx4", "fused"], default="mlx4")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--q-bits", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for a few tens of GB; default: a temporary one")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-speed-", dir=args.work))
    source, made = work / "source", work / "made"
    try:
        size = make_checkpoint(source, args.layers, args.layout, args.vocabulary)
        copied, converted, peaks = [], [], []
        for run in range(args.runs):
            if made.exists():
                shutil.rmtree(made)
            forget(source)
            copied.append(size / copy(source, work / "copy"))
            shutil.rmtree(work / "copy")
            forget(source)
            measured = measure_conversion(source, made, args.q_bits)
            converted.append(size / measured["seconds"])
            peaks.append(measured["peak"])
            print(
                f"run {run + 1}: cp {copied[-1] / 1e6:.0f} MB/s, convert {converted[-1] / 1e6:.0f} MB/s "
                f"({converted[-1] / copied[-1]:.2f}), peak memory {peaks[-1] / 1e9:.2f} GB",
                flush=True,
            )
        started = time.perf_counter()
        read = verify(made)
        rate = read / (time.perf_counter() - started)
        print(
            f"{size / 1e9:.2f} GB, medians: cp {statistics.median(copied) / 1e6:.0f} MB/s, convert "
            f"{statistics.median(converted) / 1e6:.0f} MB/s "
            f"({statistics.median(c / p for c, p in zip(converted, copied)):.2f} of cp), "
            f"peak memory {max(peaks) / 1e9:.2f} GB; verify {rate / 1e6:.0f} MB/s"
        )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
