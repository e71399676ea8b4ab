"""What a conversion will take, before it begins: disk space at its worst moment, and time at measured rates."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flashmoe import system
from mlx_flashmoe.convert.destination import Destination, writing
from mlx_flashmoe.convert.download import CONNECTIONS
from mlx_flashmoe.convert.side_by_side import side_by_side
from mlx_flashmoe.convert.source import Checkpoint, HubShards
from mlx_flashmoe.convert.units import FLUSHING, Unit
from mlx_flashmoe.sizes import show_duration, show_size

WORTH_MEASURING = 10**8  # bytes; fewer are converted, or downloaded, before an estimate is read
PROBE = 64 << 20  # bytes read, and written, to measure a rate, at most
DOWNLOAD_PROBE = 16 << 20


@dataclass(frozen=True)
class Needs:
    """Bytes that a conversion reads, writes, and needs free on DST's disk at its worst moment."""

    read: int
    written: int
    peak: int


def disk_needs(todo: Sequence[Unit], checkpoint: Checkpoint, other_files: int) -> Needs:
    """Plays the units through: what they write comes, shards are downloaded, or removed, as they are done with.

    Args:
        todo: units still to be done, in order.
        other_files: bytes of other files that are written.
    """
    storage = checkpoint.storage
    size = {name: file.header.file_size for name, file in checkpoint.shards.items()}
    last = {name: i for i, unit in enumerate(todo) for name in unit.shards}
    order = list(dict.fromkeys(name for unit in todo for name in unit.shards))
    used = peak = other_files
    coming = 0  # shards of ``order`` that have begun to come
    for i, unit in enumerate(todo):
        # The shard after this unit's is downloaded meanwhile.
        ahead = max((order.index(n) for n in unit.shards), default=-1) + 2
        for name in order[coming:ahead] if storage.temporary else ():
            used += size[name] if storage.may_drop(name) else 0
        coming = max(coming, ahead)
        used += unit.nbytes
        peak = max(peak, used)
        if i >= FLUSHING:  # units written later may come before a shard of this one goes
            for name in todo[i - FLUSHING].shards:
                used -= size[name] if last[name] == i - FLUSHING and storage.may_drop(name) else 0
    return Needs(sum(u.source_bytes for u in todo), sum(u.nbytes for u in todo), peak)


def expected_time(
    needs: Needs, todo: Sequence[Unit], quantized: bool, checkpoint: Checkpoint, destination: Destination
) -> str:
    """One line: how long it takes at the rates of this machine, these disks and the hub, measured in seconds.

    Args:
        todo: units still to be done.
        quantized: whether experts are more than copied.
    """
    seconds, rates = _converting_time(needs, quantized, checkpoint, destination)
    lacking = {n for unit in todo for n in unit.shards if _to_download(checkpoint, n)}
    nbytes = sum(checkpoint.shards[n].header.file_size for n in lacking)
    download = ""
    if nbytes > WORTH_MEASURING:
        largest = max(lacking, key=lambda n: checkpoint.shards[n].header.file_size)
        rate = _downloading_rate(checkpoint, largest)
        rates.insert(0, f"{show_size(rate)}/s of downloading")
        seconds = max(seconds, nbytes / rate)
    elif nbytes:
        download = f" and the download of {show_size(nbytes)}"
    if not rates:
        return f"it takes less than a minute{download}"
    return f"it takes about {show_duration(max(seconds, 1))}{download}, at {', '.join(rates)} measured now"


def _converting_time(
    needs: Needs, quantized: bool, checkpoint: Checkpoint, destination: Destination
) -> tuple[float, list[str]]:
    """Seconds, and the rates they follow from; no rates if there is too little to do to measure any."""
    if max(needs.read, needs.written) <= WORTH_MEASURING:
        return 0.0, []
    probe = min(PROBE, needs.written // 8)
    writing_rate = _writing_rate(destination.state / "probe", probe)
    rates = [f"{show_size(writing_rate)}/s of writing"]
    seconds = needs.written / writing_rate
    if not checkpoint.storage.temporary:
        shard = max(checkpoint.present, key=lambda n: checkpoint.shards[n].header.file_size)
        path = checkpoint.folder / shard
        reading_rate = _reading_rate(path, probe)
        rates.insert(0, f"{show_size(reading_rate)}/s of reading")
        reading = needs.read / reading_rate
        same_disk = path.stat().st_dev == destination.folder.stat().st_dev
        seconds = reading + seconds if same_disk else max(reading, seconds)
    if quantized:
        rate = _quantizing_rate()
        rates.append(f"{show_size(rate)}/s of quantizing")
        seconds = max(seconds, needs.read / rate)
    return seconds, rates


def _to_download(checkpoint: Checkpoint, shard: str) -> bool:
    storage = checkpoint.storage
    return storage.temporary and storage.may_drop(shard) and not checkpoint.shards[shard].path.exists()


def _downloading_rate(checkpoint: Checkpoint, shard: str) -> float:
    assert isinstance(checkpoint.storage, HubShards)
    read = checkpoint.storage.reader(shard)
    assert read is not None
    middle = checkpoint.shards[shard].header.file_size // 2
    nbytes = min(DOWNLOAD_PROBE, middle)
    # Over as many connections as the download will have.
    piece = -(-nbytes // CONNECTIONS)
    starts = range(middle, middle + nbytes, piece)
    started = time.perf_counter()
    side_by_side(lambda start: read(start, min(start + piece, middle + nbytes)), starts, CONNECTIONS)
    return nbytes / (time.perf_counter() - started)


def _writing_rate(path: Path, nbytes: int) -> float:
    data = np.random.default_rng(0).bytes(nbytes)
    started = time.perf_counter()
    try:
        with writing(path), open(path, "wb", buffering=0) as f:
            f.write(data)
            system.flush(f.fileno())
    finally:
        path.unlink(missing_ok=True)
    return nbytes / (time.perf_counter() - started)


def _reading_rate(path: Path, nbytes: int) -> float:
    # From its middle: the beginning has just been read for the header.
    with open(path, "rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        system.forget_pages(f.fileno())
        started = time.perf_counter()
        n = len(os.pread(f.fileno(), nbytes, max(0, size // 2 - nbytes // 2)))
        return n / (time.perf_counter() - started)


def _quantizing_rate() -> float:
    """Bytes of bfloat16 a second, by one thread, times the processors that do it side by side."""
    values = mx.random.normal((1024, 4096)).astype(mx.bfloat16)
    mx.eval(values)
    mx.eval(mx.quantize(values, 64, 4))
    started = time.perf_counter()
    mx.eval(mx.quantize(values, 64, 4))
    workers = 1 if mx.default_device().type == mx.DeviceType.gpu else os.cpu_count() or 1
    return workers * values.nbytes / (time.perf_counter() - started)
