"""A snapshot in the hub's cache is enough for convert, verify and doctor; offline, nothing asks the network."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import Spec, write_checkpoint
from hub_server import serve

from mlx_flashmoe.convert import convert, verify
from mlx_flashmoe.doctor.examine import examine
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import Manifest

SPEC = Spec(extras=False, experts=2)
COMMIT = "c" * 40
THIRD = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def fill(
    cache: Path, source: Path, commit: str = COMMIT, links: bool = True, ref: str | None = "main"
) -> Path:
    """A cache with that commit of org/model, as the hub's client leaves it; returns the snapshot."""
    repository = cache / "models--org--model"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        digest = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        if links:
            blob = repository / "blobs" / digest.hexdigest()
            blob.write_bytes(data)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        else:
            (snapshot / path.name).write_bytes(data)
    if ref is not None:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cache") / "source", SPEC, shards=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    def refuse(*_: object) -> None:
        pytest.fail("asks the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return cache


def same(out: Path, ideal: Path) -> None:
    for path in ideal.rglob("*"):
        if path.is_file() and path.name != "flashmoe.json":
            assert (out / path.relative_to(ideal)).read_bytes() == path.read_bytes(), path


FOUND: list[tuple[dict[str, object], str | None]] = [
    ({}, None),
    ({}, "main"),
    ({}, COMMIT),
    ({"links": False}, None),
    ({"ref": None}, None),
    ({"ref": None}, COMMIT),
    ({"ref": "v2"}, "v2"),
    ({"ref": "refs/pr/1"}, "refs/pr/1"),
]


@pytest.mark.parametrize(("how", "revision"), FOUND)
def test_a_cached_snapshot_is_enough(
    tmp_path: Path, source: Path, offline: Path, how: dict[str, object], revision: str | None
) -> None:
    convert(source, tmp_path / "ideal")
    snapshot = fill(offline, source, **how)  # type: ignore[arg-type]
    before = sorted(offline.rglob("*"))
    made = convert("org/model", tmp_path / "out", revision=revision)
    same(tmp_path / "out", tmp_path / "ideal")
    assert made.source["revision"] == COMMIT
    assert verify(tmp_path / "out", "org/model") == made.expert_bytes + made.dense_bytes
    if revision is None:
        needs = examine("org/model", mx.float32)
        assert needs == examine(str(source), mx.float32) == examine(str(snapshot), mx.float32)
    assert sorted(offline.rglob("*")) == before  # what is the hub's client's stays


def test_the_branch_says_which_of_two_commits_counts(tmp_path: Path, source: Path, offline: Path) -> None:
    fill(offline, write_checkpoint(tmp_path / "old", Spec(extras=False, experts=2, seed=1)), "0" * 40)
    fill(offline, source)
    assert convert("org/model", tmp_path / "out").source["revision"] == COMMIT
    (offline / "models--org--model/refs/main").unlink()
    with pytest.raises(
        SourceError, match=f"revision main is not in the hub's cache .* has {'0' * 40}, {COMMIT};"
    ):
        convert("org/model", tmp_path / "out2")


def damage(name: str) -> Callable[[Path], object]:
    def change(snapshot: Path) -> None:
        data = bytearray((snapshot / name).read_bytes())
        data[-2] ^= 1
        (snapshot / name).resolve().write_bytes(data)

    return change


def without(*names: str) -> Callable[[Path], object]:
    return lambda snapshot: [(snapshot / name).unlink() for name in names]


MISSING: list[tuple[Callable[[Path], object], str]] = [
    (without(THIRD), f"{THIRD} is missing, but {INDEX} names it; HF_HUB_OFFLINE is set: unset it"),
    (without(THIRD, INDEX), f"{THIRD} is missing: 2 of 3 shards are there, .*; HF_HUB_OFFLINE is set"),
    (without("config.json"), "config.json is missing; .*; HF_HUB_OFFLINE is set"),
    (lambda s: [p.unlink() for p in s.glob("*.safetensors")], "none of its weights; HF_HUB_OFFLINE is set"),
    # A link whose blob is gone, as an interrupted cleaning leaves it.
    (lambda s: (s / THIRD).resolve().unlink(), f"{THIRD} is missing, but {INDEX} names it; HF_HUB_OFFLINE"),
    (lambda s: (s.parents[1] / "snapshots").rename(s.parents[1] / "x"), "not in the hub's cache .*OFFLINE"),
    (lambda s: s.rename(s.with_name("d" * 40)), f"revision main is not in the hub's cache .* has {'d' * 40}"),
    (damage("config.json"), "config.json is not the file that the hub has"),
    (damage(THIRD), f"{THIRD} is not the file that the hub has"),
]


@pytest.mark.parametrize(("change", "says"), MISSING)
def test_what_the_cache_lacks_is_one_clear_line(
    tmp_path: Path, source: Path, offline: Path, change: Callable[[Path], object], says: str
) -> None:
    change(fill(offline, source))
    with pytest.raises(SourceError, match=says) as e:
        convert("org/model", tmp_path / "out")
    line = str(e.value)
    assert "\n" not in line and len(line) < 500
    if "not the file" not in says:
        with pytest.raises(SourceError) as e:
            examine("org/model", mx.float32)
        assert str(e.value) == line


def test_a_revision_or_repository_that_is_not_cached(tmp_path: Path, source: Path, offline: Path) -> None:
    with pytest.raises(SourceError, match=r"org/model: it is not in the hub's cache .*unset it to download"):
        convert("org/model", tmp_path / "out")
    fill(offline, source)
    for revision in ("v2", "e" * 40, "../main", "../../../../etc/hostname"):
        with pytest.raises(SourceError, match=f"revision {revision} is not in the hub's cache"):
            convert("org/model", tmp_path / "out", revision=revision)


def test_without_a_tokenizer_in_the_cache_that_is_said(tmp_path: Path, source: Path, offline: Path) -> None:
    without("tokenizer.json")(fill(offline, source))
    notes: list[str] = []
    convert("org/model", tmp_path / "out", note=notes.append)
    assert any("tokenizer.json is not in the hub's cache" in line for line in notes)


def test_online_what_is_in_the_cache_is_not_downloaded_again(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a header of it; what is missing is. A conversion begun online resumes offline."""
    from huggingface_hub import constants

    convert(source, tmp_path / "ideal")
    with serve(source) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        snapshot = fill(cache, source, hub.commit)
        examine("org/model", mx.float32)
        convert("org/model", tmp_path / "out")
        assert not [path for _, path, _ in hub.requests if "/resolve/" in path]
        same(tmp_path / "out", tmp_path / "ideal")
        (snapshot / THIRD).unlink()
        convert("org/model", tmp_path / "out2")
        assert {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path} == {THIRD}
        same(tmp_path / "out2", tmp_path / "ideal")

        def stop(done: int, total: int, what: str) -> None:
            if 2 * done > total:
                raise KeyboardInterrupt

        (snapshot / THIRD).symlink_to(
            f"../../blobs/{hashlib.sha256((source / THIRD).read_bytes()).hexdigest()}"
        )
        with pytest.raises(KeyboardInterrupt):
            convert("org/model", tmp_path / "out3", progress=stop)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("org/model", tmp_path / "out3")
    same(tmp_path / "out3", tmp_path / "ideal")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_commands(tmp_path: Path, source: Path, variable: str) -> None:
    """As a user runs them: the cache's place and being offline are said by the environment."""
    fill(tmp_path / "home" / ("hub" if variable == "HF_HOME" else ""), source)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {variable: str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mlx_flashmoe"]
    simulated = ["--sim-memory", "48GB", "--sim-disk", "17.5GB/s", "--sim-bandwidth", "400GB/s"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)

    made = run("convert", "--hf-path", "org/model", "--mlx-path", str(tmp_path / "out"))
    assert made.returncode == 0, made.stderr
    assert Manifest.load(tmp_path / "out").source["revision"] == COMMIT
    seen = run("doctor", "org/model", *simulated)
    assert seen.returncode == 0 and not seen.stderr, seen.stderr
    for arguments in (
        ("convert", "--hf-path", "org/other", "--mlx-path", str(tmp_path / "x")),
        ("doctor", "org/other"),
    ):
        absent = run(*arguments)
        assert absent.returncode == 2 and absent.stderr.count("\n") == 1
        assert "org/other: it is not in the hub's cache" in absent.stderr
