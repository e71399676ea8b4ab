"""How fast a file comes from the hub: over one connection, over several, and by the hub's own client; then killed.

    python examples/download_speed.py                  from a stand-in of the hub on this machine

The stand-in answers each request after --delay milliseconds, and gives each connection --rate MB per second, as a far
server does. Each way is taken --runs times, in turn. Then a download is killed --kills times, and resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hub_server import serve

from mlx_flashmoe import system
from mlx_flashmoe.convert import download
from mlx_flashmoe.convert.hub import Repository

NAME = "model.safetensors"


def ask(url: str) -> None:
    """Has the hub's client ask the stand-in."""
    from huggingface_hub import constants

    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_DISABLE_PROGRESS_BARS = True


def ours(connections: int, folder: Path) -> Path:
    download.CONNECTIONS = connections
    repository = Repository("org/model", None)
    line = download.Connections()
    going = download.Download(repository, repository.files[NAME], folder / NAME, line)
    while not going.wait(1):
        pass
    line.close()
    return folder / NAME


def theirs(folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download("org/model", NAME, revision="a" * 40, cache_dir=folder))


def child(url: str, folder: str, peak: Any) -> None:
    ask(url)
    before = system.peak_memory()
    ours(download.CONNECTIONS, Path(folder))
    peak.value = system.peak_memory() - before


def measure(way: Callable[[Path], Path], digest: str) -> float:
    """Seconds from nothing to a file on the disk that is bit for bit the served one."""
    with tempfile.TemporaryDirectory(prefix="download-speed-") as folder:
        began = time.perf_counter()
        path = way(Path(folder))
        seconds = time.perf_counter() - began
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=float, default=200, help="of the file, in MB (default: 200)")
    parser.add_argument("--rate", type=float, default=5, help="MB per second and connection (default: 5)")
    parser.add_argument("--delay", type=float, default=20, help="milliseconds per request (default: 20)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="download-served-") as served, serve(Path(served)) as hub:
        size, rng = int(args.size * 1e6), random.Random(0)
        data = rng.randbytes(size)
        (Path(served) / NAME).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        ask(hub.url)
        Repository("org/model", None)  # the stand-in hashes the file before its first answer
        hub.rate, hub.delay = args.rate * 1e6, args.delay / 1000
        several = download.CONNECTIONS
        ways: dict[str, Callable[[Path], Path]] = {
            "the hub's own client": theirs,
            "one connection": lambda folder: ours(1, folder),
            f"{several} connections": lambda folder: ours(several, folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(args.runs):
            for name, way in ways.items():
                seconds[name].append(measure(way, digest))
                print(f"run {run + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
        print(
            f"\n{args.size:g} MB, {args.delay:g} ms per request, {args.rate:g} MB/s per connection, medians:"
        )
        first = statistics.median(seconds["one connection"])
        for name, each in seconds.items():
            median = statistics.median(each)
            print(
                f"{name:22} {median:7.1f} s  {args.size / median:6.1f} MB/s  {first / median:5.2f} times one"
            )

        download.CONNECTIONS = several
        context, before, kills = multiprocessing.get_context("spawn"), hub.sent, 0
        with tempfile.TemporaryDirectory(prefix="download-killed-") as folder:
            peak = context.Value("q", 0)
            while True:
                process = context.Process(target=child, args=(hub.url, folder, peak))
                process.start()
                process.join(rng.uniform(2, 4) if kills < args.kills else None)
                if process.exitcode is not None:
                    break
                process.kill()
                process.join()
                kills += 1
            made = hashlib.sha256((Path(folder) / NAME).read_bytes()).hexdigest()
            assert made == digest and os.listdir(folder) == [NAME]
        extra = (hub.sent - before - size) / 1e6
        print(f"killed {kills} times and resumed: bit for bit the same; {extra:.0f} MB came a second time")
        print(f"memory of the last process while it downloaded: {peak.value / 1e6:.0f} MB more than before")


if __name__ == "__main__":
    main()
