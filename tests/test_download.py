"""Downloads: several ranges at once, from servers that fail in every way, killed and resumed, bit for bit."""

from __future__ import annotations

import email.utils
import errno
import multiprocessing
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from hub_server import TROUBLES, Hub, serve

from mlx_flashmoe.convert import download, hub
from mlx_flashmoe.convert.download import Connections, Download
from mlx_flashmoe.convert.hub import Repository
from mlx_flashmoe.convert.part import PartFile, Span
from mlx_flashmoe.errors import ConversionError, SourceError

NAME = "model.safetensors"
SIZE = 3_000_001
RANGE = 100_000

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["faults", "mlx_flashmoe.convert", "huggingface_hub"])


def point_at(url: str) -> None:
    """Has the hub's client ask this server, and ranges be small."""
    from huggingface_hub import constants

    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    hub.PAUSE = 0.01
    download.RANGE, download.LEAST_RANGE = RANGE, RANGE // 8


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    for owner, names in (
        (constants, ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE")),
        (hub, ("PAUSE", "ATTEMPTS", "TIMEOUT")),
        (download, ("RANGE", "LEAST_RANGE", "CONNECTIONS")),
    ):
        for name in names:  # so that they are as before, afterwards
            monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = tmp_path / "served"
    folder.mkdir()
    for name, seed in ((NAME, 0), ("other.safetensors", 1)):
        (folder / name).write_bytes(random.Random(seed).randbytes(SIZE))
    with serve(folder) as served:
        point_at(served.url)
        yield served


def start(
    repository: Repository, path: Path, name: str = NAME, connections: Connections | None = None
) -> Download:
    return Download(repository, repository.files[name], path, connections or Connections())


def bring(server: Hub, path: Path) -> None:
    """Downloads the file, and checks that it is there and nothing else."""
    assert start(Repository(server.name, None), path).wait(60)
    complete(server, path)


def complete(server: Hub, path: Path) -> None:
    assert path.read_bytes() == (server.folder / NAME).read_bytes()
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def ranges(server: Hub) -> list[Span]:
    found = []
    for method, path, span in server.requests:
        if method == "GET" and path.endswith(NAME) and span:
            first, last = span.removeprefix("bytes=").split("-")
            found.append((int(first), int(last) + 1))
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / NAME


@pytest.mark.parametrize("connections", [1, 8])
def test_several_ranges_come_at_once(server: Hub, out: Path, connections: int) -> None:
    """examples/download_speed.py measures how much faster that is."""
    server.delay, server.rate = 0.02, 2e6
    download.CONNECTIONS = connections
    bring(server, out)
    assert server.busiest == 1 if connections == 1 else 4 <= server.busiest <= 8


def test_every_byte_is_asked_for_once(server: Hub, out: Path) -> None:
    bring(server, out)
    end = 0
    for start_, stop in sorted(ranges(server)):
        assert start_ == end and stop - start_ <= RANGE
        end = stop
    assert end == SIZE
    assert {NAME} == {path.rsplit("/", 1)[1] for _, path, _ in server.requests if "/resolve/" in path}


def test_two_files_share_the_connections(server: Hub, tmp_path: Path) -> None:
    """The second begins when the first has nothing left to ask for, before that is complete."""
    server.rate = 2e6
    repository, connections = Repository(server.name, None), Connections()
    first = start(repository, tmp_path / "one", NAME, connections)
    second = start(repository, tmp_path / "two", "other.safetensors", connections)
    assert first.wait(60)
    assert second.received > 0
    assert second.wait(60)
    assert 4 <= server.busiest <= download.CONNECTIONS
    for name, path in ((NAME, "one"), ("other.safetensors", "two")):
        assert (tmp_path / path).read_bytes() == (server.folder / name).read_bytes()
    connections.close()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_server_does(server: Hub, out: Path, seed: int) -> None:
    """Connections that break, answers too short and too long, of other ranges or of all, refusals, expired links."""
    rng = random.Random(seed)
    server.troubles = rng.choices(TROUBLES, k=rng.randint(5, 40))
    server.link_uses = rng.choice([0, 1, 3, 1000])
    server.ranges = rng.random() < 0.8
    hub.ATTEMPTS = 50
    bring(server, out)
    assert not server.leaked


def test_a_link_is_used_until_it_expires(server: Hub, out: Path) -> None:
    """The hub is asked where a file is once per link, and its token goes nowhere else."""
    download.CONNECTIONS = 1
    server.link_uses = 4
    bring(server, out)
    asked = [path for method, path, _ in server.requests if "/resolve/" in path]
    there = [path for method, path, _ in server.requests if path.startswith("/link/")]
    assert len(there) > 30
    assert len(asked) == -(-(len(there) - len(asked) + 1) // 4)
    assert not server.leaked


@pytest.mark.parametrize("broken", [False, True])
def test_a_server_that_ignores_ranges_sends_the_file_once(server: Hub, out: Path, broken: bool) -> None:
    server.ranges = False
    if broken:
        server.troubles = ["cut"]
    bring(server, out)
    assert server.busiest == 1
    assert len(ranges(server)) == 1 + broken


def test_files_of_any_size(server: Hub, tmp_path: Path) -> None:
    for size in (0, 1, RANGE // 8, RANGE - 1, RANGE, RANGE + 1, 17 * RANGE + 3):
        (server.folder / NAME).write_bytes(random.Random(size).randbytes(size))
        folder = tmp_path / str(size)
        folder.mkdir()
        bring(server, folder / NAME)


@pytest.mark.parametrize("status", [401, 403, 404, 416])
def test_a_refusal_ends_it_at_once(server: Hub, out: Path, status: int) -> None:
    repository = Repository(server.name, None)
    server.refuse = {NAME: status}
    began = time.perf_counter()
    with pytest.raises(SourceError, match=f"{NAME}: .*({status}|refuses access)"):
        start(repository, out).wait(60)
    assert time.perf_counter() - began < 5
    assert len(ranges(server)) == 1


@pytest.mark.parametrize("status", ["429", "503"])
def test_the_server_says_how_long_to_wait(server: Hub, out: Path, status: str) -> None:
    server.troubles, server.pause = [status], "1"
    began = time.perf_counter()
    bring(server, out)
    assert time.perf_counter() - began > 1


def test_pauses_in_the_words_of_servers() -> None:
    soon = email.utils.formatdate(time.time() + 40, usegmt=True)
    for headers, low, high in (
        ({}, 0, 0),
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": soon}, 37, 41),
        ({"Retry-After": email.utils.formatdate(0)}, 0, 0),
        ({"Retry-After": "86400"}, hub.LONGEST_PAUSE, hub.LONGEST_PAUSE),
        ({"Retry-After": "later"}, 0, 0),
        ({"Retry-After": "-5"}, 0, 0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55, 55),
        ({"RateLimit": '"resolvers"; r=12; t=55'}, 0, 0),
    ):
        assert low <= hub._asked_pause(headers) <= high, headers


def test_wrong_bytes_are_not_kept(server: Hub, out: Path) -> None:
    server.wrong = {NAME}
    with pytest.raises(SourceError, match="downloaded twice, and twice it was not the file"):
        start(Repository(server.name, None), out).wait(60)
    assert not list(out.parent.iterdir())
    server.wrong = set()
    bring(server, out)


@pytest.mark.parametrize("stalled", [False, True])
def test_stopping_waits_for_no_server(server: Hub, out: Path, stalled: bool) -> None:
    """It returns at once, nothing is written afterwards, and what came is not asked for again."""
    server.rate = 60_000  # some ten seconds for all of it
    going = start(Repository(server.name, None), out)
    while going.received < 8 * 10_000:
        assert not going.wait(0.01)
    if stalled:
        server.rate = 1000
        time.sleep(0.3)
    began = time.perf_counter()
    going.stop()
    assert time.perf_counter() - began < 5
    before = (out.parent / f"{NAME}.part").read_bytes()
    time.sleep(0.2)
    assert (out.parent / f"{NAME}.part").read_bytes() == before
    received, server.rate = going.received, 0.0
    server.requests.clear()
    bring(server, out)
    assert sum(b - a for a, b in ranges(server)) == SIZE - received


def test_stopping_ends_a_long_pause(server: Hub, out: Path) -> None:
    server.troubles, server.pause = ["429"], "200"
    going = start(Repository(server.name, None), out)
    while not server.requests or server.troubles:
        assert not going.wait(0.01)
    going.wait(0.1)
    began = time.perf_counter()
    going.stop()
    assert time.perf_counter() - began < 5


def test_a_full_disk(server: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.pwrite, [SIZE // 2]

    def pwrite(fd: int, data: Any, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0 and len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ConversionError, match="no space left on the disk"):
        start(Repository(server.name, None), out).wait(60)
    left[0] = 10 * SIZE
    server.requests.clear()
    bring(server, out)
    assert sum(b - a for a, b in ranges(server)) < SIZE * 0.7


def test_another_file_of_that_name_is_not_continued(server: Hub, out: Path) -> None:
    """The record belongs to a content; a part without one, as an earlier release left it, counts as nothing."""
    server.rate = 1e6
    going = start(Repository(server.name, None), out)
    while going.received < SIZE // 3:
        assert not going.wait(0.01)
    going.stop()
    server.rate = 0.0
    (server.folder / NAME).write_bytes(random.Random(9).randbytes(SIZE))
    bring(server, out)
    out.rename(out.with_name(NAME + ".part"))
    bring(server, out)


# Killed


def fetch(url: str, path: str, cut: faults.Cut | None, started: Any, peak: Any) -> None:
    point_at(url)
    repository = Repository("org/model", None)
    if cut is not None:
        faults._install(cut)
    started.set()
    if peak is not None:
        tracemalloc.start()
    done = start(repository, Path(path)).wait(60)
    if peak is not None:
        peak.value = tracemalloc.get_traced_memory()[1]
    os._exit(0 if done else 1)


def fetching(server: Hub, path: Path, cut: faults.Cut | None = None, peak: Any = None) -> Any:
    started = _context.Event()
    process = _context.Process(target=fetch, args=(server.url, str(path), cut, started, peak))
    process.start()
    assert started.wait(60)
    return process


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_some_instant(server: Hub, out: Path, seed: int) -> None:
    """All that comes again is what was under way: ranges not complete, and those not flushed yet."""
    rng = random.Random(seed)
    server.rate = 400_000
    kills = 0
    for _ in range(2):
        process = fetching(server, out)
        process.join(rng.uniform(0.1, 0.6))
        process.kill()
        if faults.finished(process):
            break
        kills += 1
    assert kills
    server.rate = 0.0
    time.sleep(0.1)
    if not out.exists():
        bring(server, out)
    assert out.read_bytes() == (server.folder / NAME).read_bytes()
    assert server.sent <= SIZE + kills * 2 * download.CONNECTIONS * RANGE


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_some_change_to_the_disk(server: Hub, out: Path, seed: int) -> None:
    """Half of them as if by a power cut. The file was never wrong: nothing comes a second time for its hash."""
    rng = random.Random(seed)
    for _ in range(2):
        cut = faults.Cut(rng.randint(1, 200), power=rng.random() < 0.5, seed=rng.randint(0, 1 << 30))
        if faults.finished(fetching(server, out, cut)):
            break
    server.requests.clear()
    if not out.exists():
        assert start(Repository(server.name, None), out).wait(60)
    assert out.read_bytes() == (server.folder / NAME).read_bytes()
    assert sum(b - a for a, b in ranges(server)) <= SIZE


def test_memory_is_bounded(server: Hub, out: Path) -> None:
    (server.folder / NAME).write_bytes(bytes(60_000_000))
    peak = _context.Value("q", 0)
    assert faults.finished(fetching(server, out, peak=peak))
    complete(server, out)
    assert 0 < peak.value < 12 << 20


# The file in the making


@pytest.mark.parametrize("seed", range(20))
def test_a_part_file_knows_what_is_there(tmp_path: Path, seed: int) -> None:
    """Random pieces, reopened now and then, with a record that was cut short or damaged."""
    rng = random.Random(seed)
    size = rng.randint(1, 60)
    there: list[set[int]] = [set()]  # after each line of the record
    part = PartFile(tmp_path / "x", size, "stamp")
    for _ in range(30):
        if rng.random() < 0.2:
            part.close()
            if rng.random() < 0.5:
                record = tmp_path / "x.ranges"
                lines = record.read_bytes().splitlines(keepends=True)
                kept = rng.randint(1, len(lines))
                torn = lines[kept][: rng.randint(0, len(lines[kept]) - 1)] if kept < len(lines) else b""
                record.write_bytes(b"".join(lines[:kept]) + torn)
                del there[kept:]
            part = PartFile(tmp_path / "x", size, "stamp")
        else:
            a, b = sorted((rng.randint(0, size), rng.randint(0, size)))
            part.write_at(a, bytes(range(a, b)))
            part.keep([(a, b)])
            there.append(there[-1] | set(range(a, b)))
        missing = {i for a, b in part.missing for i in range(a, b)}
        assert missing == set(range(size)) - there[-1]
        assert all(a < b for a, b in part.missing)
        assert part.whole_until == min(missing, default=size)
    part.close()


def test_no_threads_are_left(server: Hub, out: Path) -> None:
    before = set(threading.enumerate())
    connections = Connections()
    assert start(Repository(server.name, None), out, NAME, connections).wait(60)
    connections.close()
    until = time.monotonic() + 5
    while any(t.name in ("connection", "download") for t in set(threading.enumerate()) - before):
        assert time.monotonic() < until
        time.sleep(0.01)
