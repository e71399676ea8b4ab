"""A converted model on the hub: fetched by its name, checked as it comes, resumed, and then used without the hub."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import Spec, write_checkpoint
from hub_server import TROUBLES, Hub, serve

from mlx_flashmoe import fetch
from mlx_flashmoe.convert import convert, download, hub, verify
from mlx_flashmoe.doctor.examine import examine
from mlx_flashmoe.errors import ConversionError, FormatError, SourceError
from mlx_flashmoe.fetch import find, model_folder
from mlx_flashmoe.layout import MANIFEST
from mlx_flashmoe.loader import load

NAME = "org/model"
LAYER = "experts/layer_001.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fetch")
    source = write_checkpoint(folder / "source", Spec(extras=False))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()  # they are none
    convert(source, folder / "made")
    return folder / "made"


@pytest.fixture
def server(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    shutil.copytree(made, tmp_path / "served")
    with serve(tmp_path / "served") as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub, "PAUSE", 0.01)
        monkeypatch.setattr(download, "RANGE", 20_000)
        monkeypatch.setattr(download, "LEAST_RANGE", 5_000)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield served


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache/mlx-flashmoe/models/org/model"


def same(folder: Path, made: Path) -> None:
    """All files bit for bit, and none besides."""
    files = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == files
    for file in files:
        if file.name == MANIFEST:
            assert json.loads((folder / file).read_text()) == json.loads((made / file).read_text())
        else:
            assert (folder / file).read_bytes() == (made / file).read_bytes(), file


def publish(server: Hub, change: Callable[[Path], object], commit: str = "b" * 40) -> None:
    change(server.folder)
    server.commit = commit


def test_a_name_is_fetched_once_and_used(server: Hub, kept: Path, made: Path) -> None:
    lines: list[str] = []
    seen: list[tuple[int, int]] = []
    assert find(NAME) is None
    folder = model_folder(NAME, lines.append, lambda done, total, what: seen.append((done, total)))
    assert folder == kept == find(NAME)
    same(folder, made)
    assert len(lines) == 1 and str(kept) in lines[0] and "on the hub" in lines[0]
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert seen == sorted(seen) and seen[-1] == (size, size)
    assert verify(folder) > 0
    server.requests.clear()
    load(NAME)
    assert model_folder(NAME, lines.append) == kept
    assert not server.requests and len(lines) == 1


def test_what_is_here_is_used_offline(
    server: Hub, kept: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match=f"{NAME}: no such folder, and not all .* HF_HUB_OFFLINE is set: unset"
    ):
        load(NAME)
    assert not server.requests and not kept.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load(NAME)


def test_a_local_folder_of_that_name_wins(server: Hub, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / NAME)
    load(NAME)
    shutil.rmtree(tmp_path / NAME)
    (tmp_path / NAME).mkdir()
    with pytest.raises(FormatError, match=f"{NAME} is not a converted model"):
        load(NAME)
    assert not server.requests


@pytest.mark.parametrize("path", ["nowhere", "./org/model", "/org/model", "a/b/c", "org/", "../org/model"])
def test_other_paths_ask_nothing(server: Hub, path: str) -> None:
    with pytest.raises(FormatError, match="is not a converted model"):
        load(path)
    assert not server.requests


def drop(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], object]:  # type: ignore[type-arg]
    def write(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data))

    return write


def shorten(folder: Path) -> None:
    os.truncate(folder / LAYER, 16384)


def damage(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return change


UNUSABLE: list[tuple[Callable[[Path], object], str]] = [
    (drop(LAYER), f"{LAYER} is missing, but {MANIFEST} lists it"),
    (drop("config.json"), f"config.json is missing, but {MANIFEST} lists it"),
    (shorten, f"{LAYER} has 16384 bytes, but [0-9]+ by {MANIFEST}"),
    (damage(LAYER), f"{LAYER}: layer 1, expert [0-9]+ differs from its checksum .*the repository is damaged"),
    (damage("config.json"), "config.json differs from its checksum"),
    (
        damage("model.safetensors"),
        "model.safetensors differs from its checksum",
    ),
    (rewrite(lambda data: data.update(format_version=99)), "format version 99"),
    (rewrite(lambda data: data["source"]["files"].update({"../x.json": 1})), "malformed manifest"),
    (rewrite(lambda data: data["dense"][0].update(file="../x.safetensors")), "not the name of a safetensors"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "not valid JSON"),
]


@pytest.mark.parametrize(("change", "says"), UNUSABLE)
def test_a_repository_that_is_not_whole(
    server: Hub, kept: Path, made: Path, change: Callable[[Path], object], says: str
) -> None:
    """Nothing can be loaded of it, and nothing outside the cache is written."""
    publish(server, change)
    for _ in range(2):
        with pytest.raises(FormatError, match=says) as e:
            load(NAME)
        assert "\n" not in str(e.value) and NAME in str(e.value)
        assert find(NAME) is None
    assert not list(kept.parents[1].glob("x*"))
    shutil.rmtree(kept, ignore_errors=True)
    shutil.rmtree(server.folder)
    publish(server, lambda folder: shutil.copytree(made, folder), "c" * 40)
    same(model_folder(NAME), made)


def test_checkpoints_and_other_repositories(server: Hub, kept: Path) -> None:
    publish(server, drop(MANIFEST))
    with pytest.raises(
        FormatError,
        match=r"is a checkpoint on the hub: convert it first, .*--hf-path org/model --mlx-path model-4bit",
    ):
        load(NAME)
    publish(server, drop("config.json"), "c" * 40)
    with pytest.raises(FormatError, match=f"no {MANIFEST} in the repository, and no checkpoint"):
        load(NAME)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("org/nothing", None, "org/nothing: no such folder, and no such repository on the hub"),
        (NAME, 401, "the hub refuses access .401.: misspelt, or private"),
        (NAME, 403, "the hub refuses access .403."),
        (NAME, 500, f"there is no folder {NAME}; {NAME}: downloading from the hub failed"),
    ],
)
def test_what_cannot_be_had(server: Hub, tmp_path: Path, name: str, status: int | None, says: str) -> None:
    if status is not None:
        server.refuse = {"/api/": status}
    with pytest.raises(SourceError, match=says) as e:
        load(name)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "cache").exists()


def test_a_converted_repository_is_not_converted_again(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=f"{NAME} is a converted model already .* --model {NAME} fetches it"
    ):
        convert(NAME, tmp_path / "out")


def test_a_full_disk_is_said_before(server: Hub, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="of disk space are needed, but only 1 kB are free"):
        load(NAME)
    assert not kept.exists() and not any(path.endswith(".bin") for _, path, _ in server.requests)


@pytest.mark.parametrize("seed", range(6))
def test_broken_again_and_again(server: Hub, kept: Path, made: Path, seed: int) -> None:
    """Whatever the server does, and however often it is interrupted: what came is kept, and the model is the same."""
    rng = random.Random(seed)
    server.link_uses = rng.choice([0, 3])
    for _ in range(3):
        server.troubles = rng.choices(TROUBLES, k=30)
        left = rng.randint(0, 4)

        def stop(done: int, total: int, what: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        try:
            model_folder(NAME, progress=stop)
        except (KeyboardInterrupt, SourceError):
            assert not (kept / MANIFEST).exists()
    server.troubles = []
    same(model_folder(NAME), made)
    assert not server.leaked


def test_it_resumes_with_the_commit_it_began(server: Hub, kept: Path, made: Path) -> None:
    """Though the branch has moved; and without the record of the commit, nothing of it is trusted."""

    def stop(done: int, total: int, what: str) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_folder(NAME, progress=stop)
    server.requests.clear()
    server.sent = 0
    seen: list[int] = []
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        model_folder(
            NAME, lines.append, lambda done, total, what: (seen.append(done), stop(done, total, what))
        )
    asked = [path for _, path, _ in server.requests if "/api/" in path]
    assert len(asked) == 1 and asked[0].endswith(f"/revision/{server.commit}")
    assert seen[0] > 0 and "here already" in lines[0]
    (kept / ".conversion/commit").unlink()
    publish(server, lambda folder: (folder / "config.json").write_text("{}"))
    publish(server, rewrite(lambda data: data["source"]["files"].update({"config.json": zlib.crc32(b"{}")})))
    model_folder(NAME)
    assert (kept / "config.json").read_text() == "{}"


def test_two_processes(server: Hub, kept: Path, tmp_path: Path) -> None:
    """The second is told; killed, the first's lock is gone."""
    server.rate = 20_000
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "mlx_flashmoe", "verify", "--model", NAME]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any(kept.rglob("*.part")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    with pytest.raises(
        ConversionError, match=rf"another download is writing there \(process {process.pid}\)"
    ):
        model_folder(NAME)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and "the same command resumes" in said
    server.rate = 0.0
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "here already" in done.stderr and "as they should be" in done.stdout


def run(server: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "mlx_flashmoe", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_generate(server: Hub, tmp_path: Path) -> None:
    """With a name, as a user types it."""
    shutil.rmtree(server.folder)
    convert(Path(__file__).parents[1] / "examples/small_moe/model", server.folder)
    first = run(
        server, tmp_path, "generate", "--model", NAME, "--prompt", "2+2", "--max-tokens", "8", "--temp", "0"
    )
    assert "on the hub" in first.stderr and "fetching experts/" in first.stderr
    again = run(
        server, tmp_path, "generate", "--model", NAME, "--prompt", "2+2", "--max-tokens", "8", "--temp", "0"
    )
    assert "hub" not in again.stderr and again.stdout == first.stdout


def test_bench(server: Hub, kept: Path, tmp_path: Path) -> None:
    run(server, tmp_path, "bench", "--model", NAME, "--prompts", "8", "--tokens", "2")
    assert (kept / MANIFEST).exists()


def test_doctor_fetches_headers_alone(server: Hub, kept: Path, made: Path, tmp_path: Path) -> None:
    """It says of a repository what it says of the folder, and what is to be fetched; then chat, not convert."""
    simulated = ("--sim-memory", "48GB", "--sim-disk", "17.5GB/s", "--sim-bandwidth", "400GB/s")
    there = run(server, tmp_path, "doctor", NAME, *simulated, "--json", "there.json")
    assert not kept.exists() and not any(path.endswith(".bin") for _, path, _ in server.requests)
    assert (
        "Download 22" in there.stdout and f"--model {NAME}" in there.stdout and " convert" not in there.stdout
    )
    model_folder(NAME)
    here = run(server, tmp_path, "doctor", NAME, *simulated, "--json", "here.json")
    assert "Download" not in here.stdout
    figures = [json.loads((tmp_path / name).read_text()) for name in ("there.json", "here.json")]
    for each in figures:
        del each["model"], each["state"]
    assert figures[0] == figures[1]
    with pytest.raises(SourceError, match="no such folder, and no such repository"):
        examine("org/nothing", mx.float32)


def test_the_folder_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.default_directory() == tmp_path / "mlx-flashmoe/models"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.default_directory() == tmp_path / ".cache/mlx-flashmoe/models"
