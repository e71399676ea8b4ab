"""The journal: what of a conversion is on the disk for good, so that a killed one resumes.

A file of lines, each a crc32 and a JSON object:

    begun    what was asked, what the source is, and how many of the following lines belong to it
    shard    one file of the source: its size, what tells a change of it, and its header
    done     one unit of the plan (units.py): its name, and the crc32 of every span it wrote
    moving   all units are done: the model's files are about to get their places

A line is appended only after what it says is true even if power fails: a unit's data is flushed first, then its
line. A line that was cut short, and whatever follows it, counts as not there.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flashmoe import system
from mlx_flashmoe.convert.destination import writing
from mlx_flashmoe.convert.safetensors import Header


@dataclass(frozen=True)
class Shard:
    """A file of the source as it was when the conversion began. ``stamp`` differs if its content does."""

    header: Header
    stamp: str


@dataclass(frozen=True)
class Beginning:
    """What a conversion began with.

    Attributes:
        asked: source and options, to be compared with those of a later run.
        source: what else identifies the source: its commit, its config.json's hash.
        plan: a hash of everything that is to be written, and where.
        units: how many units each file consists of.
    """

    asked: dict[str, Any]
    source: dict[str, Any]
    plan: str
    units: dict[str, int]
    shards: dict[str, Shard]


class Journal:
    """The journal at ``path``, made if there is none.

    Attributes:
        beginning: None if the conversion has not begun: then nothing of it is there.
        done: unit name -> crc32 of each of its spans.
        moving: files may have their places already.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.beginning: Beginning | None = None
        self.done: dict[str, list[int]] = {}
        self.moving = False
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = self._read()

    def begin(self, beginning: Beginning) -> None:
        """Forgets everything, and begins."""
        first = {
            "begun": {
                "asked": beginning.asked,
                "source": beginning.source,
                "plan": beginning.plan,
                "units": beginning.units,
                "shards": len(beginning.shards),
            }
        }
        lines = [first] + [
            {
                "shard": name,
                "size": shard.header.file_size,
                "stamp": shard.stamp,
                "header": shard.header.text.decode(),
            }
            for name, shard in beginning.shards.items()
        ]
        self._end = 0
        self.done = {}
        self._append(*lines)
        self.beginning = beginning

    def finish(self, unit: str, crcs: list[int]) -> None:
        """``unit`` is on the disk for good."""
        self._append({"done": unit, "crc": crcs})
        self.done[unit] = crcs

    def move(self) -> None:
        """The model's files will be moved from now on."""
        self._append({"moving": True})
        self.moving = True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, *records: dict[str, Any]) -> None:
        data = memoryview(b"".join(map(record_line, records)))
        end = self._end
        with writing(self._path):
            # What a torn line left behind must not follow this one.
            os.ftruncate(self._fd, end)
            while data:
                n = os.pwrite(self._fd, data, end)
                data, end = data[n:], end + n
            system.flush(self._fd)
        self._end = end

    def _read(self) -> int:
        """Takes in what is valid; returns where it ends."""
        with writing(self._path), open(self._fd, "rb", closefd=False) as f:
            data = f.read()
        begun: dict[str, Any] | None = None
        shards: dict[str, Shard] = {}
        end = 0
        for line in data.splitlines(keepends=True):
            record = read_record(line)
            if record is None:
                break
            end += len(line)
            if "begun" in record:
                begun = record["begun"]
            elif "shard" in record:
                header = Header(record["header"].encode(), record["size"])
                shards[record["shard"]] = Shard(header, record["stamp"])
            elif "done" in record:
                self.done[record["done"]] = record["crc"]
            else:
                self.moving = True
        if begun is None or begun.pop("shards") != len(shards):
            return 0
        self.beginning = Beginning(**begun, shards=shards)
        return end


def record_line(record: dict[str, Any]) -> bytes:
    """The line that holds a record."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def read_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None unless the line is whole."""
    crc, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record
