"""Which files are read where an index is stale or missing, in folders and on the hub, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import Spec, save_safetensors, write_checkpoint
from hub_server import serve

from mlx_flashmoe.convert import convert
from mlx_flashmoe.convert.weights import INDEX, SINGLE, choose
from mlx_flashmoe.doctor.examine import examine
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import Manifest

Change = Callable[[Path], object]
SPEC = Spec(extras=False, experts=2)


def shard(number: int, total: int = 3, stem: str = "model") -> str:
    return f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def without(*names: str) -> Change:
    return lambda s: [(s / name).unlink() for name in names]


def joined(s: Path) -> None:
    """One file in place of the shards; the index stays behind."""
    without(*(shard(n) for n in (1, 2, 3)))(s)
    save_safetensors(s / SINGLE, SPEC.published("fused"))


def renamed(stem: str, index: bool) -> Change:
    def change(s: Path) -> None:
        for n in (1, 2, 3):
            (s / shard(n)).rename(s / shard(n, stem=stem))
        if not index:
            (s / INDEX).unlink()

    return change


def both(*changes: Change) -> Change:
    return lambda s: [change(s) for change in changes]


def named_too(name: str) -> Change:
    """The index names one more file."""

    def change(s: Path) -> None:
        index = json.loads((s / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = name
        (s / INDEX).write_text(json.dumps(index))

    return change


def written(name: str) -> Change:
    return lambda s: save_safetensors(s / name, SPEC.published("fused"))


# What is done to a checkpoint of three shards and an index; what is said of it, None if nothing.
READ: list[tuple[Change, str | None]] = [
    (lambda s: None, None),
    (written(SINGLE), None),
    (both(joined, without(INDEX)), None),
    (joined, f"{shard(3)} are missing, though {INDEX} names them; {SINGLE} is read instead"),
    (
        both(written(SINGLE), without(shard(2))),
        f"{shard(2)} is missing, though {INDEX} names it; {SINGLE} is read instead",
    ),
    (without(INDEX), f"{INDEX} is missing; {shard(1)} and the other 2 of its set are read without it"),
    (
        renamed("model.safetensors", False),
        f"{INDEX} is missing; model.safetensors-00001-of-00003.safetensors",
    ),
    (renamed("other", True), f"{shard(1, stem='other')} and the other 2 of its set are read instead"),
    # What is left of another set does not count.
    (both(without(INDEX), written(shard(1, 2))), f"{INDEX} is missing; {shard(1)} and the other 2"),
    (both(without(INDEX, *map(shard, (1, 2, 3))), written(shard(1, 1))), f"{shard(1, 1)} is read without it"),
]


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(("change", "says"), READ)
def test_what_is_complete_is_read(
    tmp_path: Path, change: Change, says: str | None, hub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", SPEC, shards=3)
    change(source)
    ideal = convert(write_checkpoint(tmp_path / "whole", SPEC), tmp_path / "ideal")
    notes: list[str] = []
    if hub:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        with serve(source) as server:
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            convert("org/model", tmp_path / "out", note=notes.append)
            seen = examine("org/model", mx.float32).notes
    else:
        convert(source, tmp_path / "out", note=notes.append)
        seen = examine(str(source), mx.float32).notes
    made = Manifest.load(tmp_path / "out")
    assert {**vars(made), "source": 0} == {**vars(ideal), "source": 0}
    for entry in (*ideal.dense, *ideal.layers):
        assert (tmp_path / "out" / entry.file).read_bytes() == (tmp_path / "ideal" / entry.file).read_bytes()
    said = [line for line in notes if INDEX in line]
    assert list(seen) == said and len(said) == (says is not None)
    assert says is None or says in said[0]


REFUSED: list[tuple[Change, str]] = [
    (without(shard(2)), rf"{shard(2)} is missing, but {INDEX} names it; download"),
    (without(shard(1), shard(3)), rf"{shard(1)} and {shard(3)} are missing, but {INDEX} names them"),
    (without(INDEX, shard(2)), rf"{shard(2)} is missing: 2 of 3 shards are there, and no {INDEX}; download"),
    (without(INDEX, shard(1), shard(2)), rf"{shard(1)} and {shard(2)} are missing: 1 of 3 shards"),
    (both(without(INDEX), *(written(shard(n, 2)) for n in (1, 2))), r"each begin a complete set of shards"),
    (
        both(without(INDEX, shard(2)), lambda s: (s / shard(2)).write_bytes((s / shard(1)).read_bytes())),
        rf"{shard(2)}: tensor '.*' is in {shard(1)} too, and no {INDEX} says which one counts",
    ),
    # The one file is no substitute for shards if the index counts on both.
    (both(written(SINGLE), named_too(SINGLE), without(shard(2))), rf"{shard(2)} is missing, but {INDEX}"),
    (named_too("model-extra.safetensors"), rf"model-extra\.safetensors is missing, but {INDEX} names it"),
    (both(joined, lambda s: (s / SINGLE).write_bytes((s / SINGLE).read_bytes()[:-1])), "truncated"),
    (both(joined, without(SINGLE)), rf"{shard(1)}, {shard(2)} and {shard(3)} are missing"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_what_is_incomplete_is_refused_by_name(tmp_path: Path, change: Change, says: str) -> None:
    source = write_checkpoint(tmp_path / "source", SPEC, shards=3)
    change(source)
    for attempt in (lambda: convert(source, tmp_path / "out"), lambda: examine(str(source), mx.float32)):
        with pytest.raises(SourceError, match=says) as e:
            attempt()
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert not (tmp_path / "out").exists()


def test_many_missing_shards_are_counted_not_listed() -> None:
    there = {shard(n, 94) for n in range(1, 95) if n % 2}
    with pytest.raises(SourceError) as e:
        choose(there, None, "here", "download them")
    assert str(e.value) == (
        f"here: {shard(2, 94)}, {shard(4, 94)} and 45 more are missing: 47 of 94 shards are there, and no {INDEX}; "
        "download them"
    )
    with pytest.raises(SourceError, match="and 999999996 more are missing: 1 of 999999999 shards"):
        choose({"model-000000001-of-999999999.safetensors"}, None, "here", "download them")


@pytest.mark.parametrize("change", [without(INDEX), joined])
def test_a_conversion_resumes_whose_files_are_removed_on_the_way(tmp_path: Path, change: Change) -> None:
    source = write_checkpoint(tmp_path / "source", SPEC, shards=3)
    change(source)
    ideal = convert(write_checkpoint(tmp_path / "whole", SPEC), tmp_path / "ideal")
    files = set(choose({p.name for p in source.iterdir()}, _index(source), "", "").files)

    def stop(done: int, total: int, what: str) -> None:
        # One file is removed at the very end.
        if any(not (source / name).exists() for name in files) or (len(files) == 1 and 2 * done > total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", delete_source=True, progress=stop)
    made = convert(source, tmp_path / "out", delete_source=True)
    assert {**vars(made), "source": 0} == {**vars(ideal), "source": 0}
    assert not any((source / name).exists() for name in files)


def _index(source: Path) -> Path | None:
    return source / INDEX if (source / INDEX).exists() else None
