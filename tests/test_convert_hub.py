"""Checkpoints from the hub: shard by shard, pinned, checked, and going on where a download broke off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import Spec, write_checkpoint
from hub_server import Hub, serve

from mlx_flashmoe.convert import convert, estimate, hub, verify
from mlx_flashmoe.convert.source import open_checkpoint
from mlx_flashmoe.errors import ConversionError, SourceError
from mlx_flashmoe.layout import Manifest
from mlx_flashmoe.sizes import show_size

SHARDS = 6
THIRD = "model-00003-of-00006.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    write_checkpoint(tmp_path / "served", Spec(extras=False, layers=3), shards=SHARDS)
    with serve(tmp_path / "served") as hub_:
        monkeypatch.setattr(constants, "ENDPOINT", hub_.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "PAUSE", 0.01)
        yield hub_


def same(out: Path, expected: Path) -> None:
    for path in expected.rglob("*"):
        if path.is_file() and path.name != "flashmoe.json":
            assert (out / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
    assert {**vars(Manifest.load(out)), "source": 0} == {**vars(Manifest.load(expected)), "source": 0}
    assert not (out / ".conversion").exists()


def downloaded(server: Hub) -> list[str]:
    """The shards asked for in full, in order."""
    return [
        path.rsplit("/", 1)[1]
        for method, path, span in server.requests
        if method == "GET" and path.endswith(".safetensors") and span != f"bytes=0-{hub.FIRST_READ - 1}"
    ]


def test_one_after_the_other(tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than two shards at once, none left behind, and the same model as from a folder."""
    monkeypatch.setattr(hub, "FIRST_READ", 4000)
    convert(server.folder, tmp_path / "ideal")
    most = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal most
        shards = tmp_path / "out/.conversion/shards"
        most = max(most, len(list(shards.iterdir())) if shards.exists() else 0)

    m = convert("org/model", tmp_path / "out", revision="main", progress=progress)
    same(tmp_path / "out", tmp_path / "ideal")
    assert 1 <= most <= 2
    assert m.source == {
        "path": "org/model",
        "revision": server.commit,
        "asked": {"revision": "main", "recipe": {}},
        "files": Manifest.load(tmp_path / "ideal").source["files"],
    }
    assert any(path.endswith("/revision/main") for _, path, _ in server.requests)
    assert verify(tmp_path / "out", "org/model") == m.expert_bytes + m.dense_bytes


def test_the_plan_has_the_time_of_the_download(
    tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate measured with a request, of what is not there yet; too little to measure is said, not timed."""
    lines: list[str] = []
    convert("org/model", tmp_path / "out", note=lines.append)
    total = sum(path.stat().st_size for path in server.folder.glob("*.safetensors"))
    assert lines[-1] == f"it takes less than a minute and the download of {show_size(total)}"
    monkeypatch.setattr(estimate, "WORTH_MEASURING", 1000)
    monkeypatch.setattr(estimate, "_downloading_rate", lambda checkpoint, shard: total / 7200)
    convert("org/model", tmp_path / "out2", note=lines.append)
    assert lines[-1].startswith(
        f"it takes about 2 h 0 min, at {show_size(total / 7200)}/s of downloading over one connection, "
    )


def test_the_rate_of_the_download_is_measured(server: Hub, tmp_path: Path) -> None:
    server.delay = 0.05
    with open_checkpoint("org/model", downloads=tmp_path) as checkpoint:
        rate = estimate._downloading_rate(checkpoint, THIRD)
    size = (server.folder / THIRD).stat().st_size // 2
    assert size / 1.0 < rate <= size / 0.05


def test_long_headers_take_a_second_request(
    tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "FIRST_READ", 100)
    convert(server.folder, tmp_path / "ideal")
    convert("org/model", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "ideal")


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_taken_up_again(tmp_path: Path, server: Hub, ranges: bool) -> None:
    convert(server.folder, tmp_path / "ideal")
    server.ranges = ranges
    if ranges:
        server.cut = {THIRD: 10_000}
    convert("org/model", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "ideal")
    spans = [span for _, path, span in server.requests if path.endswith(THIRD)]
    assert not ranges or any(span.startswith("bytes=10000-") for span in spans)


def test_a_download_goes_on_in_a_later_run(tmp_path: Path, server: Hub) -> None:
    convert(server.folder, tmp_path / "ideal")
    size = (server.folder / THIRD).stat().st_size
    started = []

    def progress(done: int, total: int, what: str) -> None:
        if THIRD in {
            path.rsplit("/", 1)[-1] for _, path, span in server.requests if span == f"bytes=0-{size - 1}"
        }:
            started.append(what)

    server.cut = {THIRD: 20_000}
    server.refuse = {}
    original = hub._retried

    def once(received, attempt):  # type: ignore[no-untyped-def]
        attempt()

    hub._retried = once
    try:
        with pytest.raises(
            SourceError,
            match=rf"{THIRD}: downloading from the hub failed.*try again: the same command resumes$",
        ):
            # The header's request, of a whole small file, is cut too: let it through.
            server.cut = {}
            convert("org/model", tmp_path / "out", progress=lambda *a: server.cut.update({THIRD: 20_000}))
    finally:
        hub._retried = original
    part = tmp_path / f"out/.conversion/shards/{THIRD}.part"
    assert part.stat().st_size == 20_000
    server.cut = {}
    server.requests.clear()
    convert("org/model", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "ideal")
    spans = [
        (path.rsplit("/", 1)[1], span) for _, path, span in server.requests if path.endswith(".safetensors")
    ]
    assert (THIRD, f"bytes=20000-{size - 1}") in spans
    assert not any(name == THIRD and span.startswith("bytes=0-") for name, span in spans)
    assert not any(name.startswith("model-00001") for name, _ in spans)


def test_a_branch_that_has_moved_changes_nothing(tmp_path: Path, server: Hub) -> None:
    """A later run goes on with the commit that the first has resolved."""

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("org/model", tmp_path / "out", progress=stop)
    server.requests.clear()
    convert("org/model", tmp_path / "out")
    asked = [path for _, path, _ in server.requests if path.startswith("/api/")]
    assert asked and all(path.endswith(f"/revision/{server.commit}") for path in asked)
    with pytest.raises(
        ConversionError, match="converted model already, of another source or with other options"
    ):
        convert("org/model", tmp_path / "out", revision="v2")


@pytest.mark.parametrize("name", [THIRD, "config.json", "tokenizer.json"])
def test_wrong_bytes(tmp_path: Path, server: Hub, name: str) -> None:
    server.wrong = {name}
    says = (
        "downloaded twice, and twice it was not"
        if name == THIRD
        else r"is not the file that the hub has .git"
    )
    with pytest.raises(SourceError, match=says) as e:
        convert("org/model", tmp_path / "out")
    assert name in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("out/.conversion/shards/*00003*"))
    if name == THIRD:
        server.wrong = set()
        convert("org/model", tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "status", "says"),
    [
        ("/api/", 401, r"the hub refuses access \(401\): misspelt, or private"),
        ("/api/", 404, "org/model"),
        ("/api/", 500, "downloading from the hub failed.*500"),
        (THIRD, 403, rf"{THIRD}: the hub refuses access \(403\)"),
        (THIRD, 503, f"{THIRD}: downloading from the hub failed.*503"),
    ],
)
def test_the_hub_refuses(tmp_path: Path, server: Hub, pattern: str, status: int, says: str) -> None:
    server.refuse = {pattern: status}
    began = time.perf_counter()
    with pytest.raises(SourceError, match=says) as e:
        convert("org/model", tmp_path / "out")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert not (tmp_path / "out").exists() and time.perf_counter() - began < 20


def test_what_is_in_the_cache_is_used_and_stays(tmp_path: Path, server: Hub) -> None:
    from huggingface_hub import hf_hub_download

    convert(server.folder, tmp_path / "ideal")
    path = Path(hf_hub_download("org/model", THIRD, revision=server.commit))
    server.requests.clear()
    convert("org/model", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "ideal")
    size = (server.folder / THIRD).stat().st_size
    assert path.read_bytes() == (server.folder / THIRD).read_bytes()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    assert size == len(data)
    with pytest.raises(SourceError, match=f"{THIRD} is not the file that the hub has"):
        convert("org/model", tmp_path / "out2")


def test_an_index_that_names_what_is_not_there(tmp_path: Path, server: Hub) -> None:
    index = server.folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../../evil.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="which is not the name of a file in this folder"):
        convert("org/model", tmp_path / "out")
    (server.folder / THIRD).unlink()
    data["weight_map"]["lm_head.weight"] = "model-00001-of-00006.safetensors"
    index.write_text(json.dumps(data))
    server.commit = "b" * 40
    with pytest.raises(SourceError, match=f"org/model: {THIRD} is missing"):
        convert("org/model", tmp_path / "out")


def test_a_network_that_fails(tmp_path: Path, server: Hub) -> None:
    """convert resumes, and says so once it has begun; verify begins anew, and does not say that it resumes."""
    server.refuse = {"/api/": 500}
    with pytest.raises(SourceError, match=r"failed.*; try again$"):
        convert("org/model", tmp_path / "out")
    server.refuse = {}

    def refuse(done: int, total: int, what: str) -> None:
        server.refuse = {THIRD: 500}

    with pytest.raises(SourceError, match=f"{THIRD}.*failed.*; try again: the same command resumes$"):
        convert("org/model", tmp_path / "out", progress=refuse)
    server.refuse = {}
    convert("org/model", tmp_path / "out")
    server.refuse = {"/api/": 500}
    with pytest.raises(SourceError, match=r"failed.*; try again$"):
        verify(tmp_path / "out", "org/model")


def test_the_command(tmp_path: Path, server: Hub) -> None:
    """As a user runs it: HF_ENDPOINT in the environment, one line on stderr if it fails."""
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "mlx_flashmoe", "convert", "--hf-path", "org/model"]
    done = subprocess.run(
        [*command, "--mlx-path", str(tmp_path / "out")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    server.refuse = {"/api/": 404}
    done = subprocess.run(
        [*command, "--mlx-path", str(tmp_path / "out2")], env=env, capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: org/model")
    )
