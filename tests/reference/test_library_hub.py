"""Libraries' models from the hub: shard by shard where shards are copied, and refused where they are computed with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is a reference; pip install .[reference]")

import library_models as lib
import mlx.core as mx
from hub_server import Hub, serve

from mlx_flashmoe.convert import convert, hub
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import MANIFEST


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "PAUSE", 0.01)
        yield served


def in_shards(folder: Path, tensors: dict[str, mx.array]) -> None:
    """Writes a checkpoint's tensors as a file for each layer."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    layers: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.partition("layers.")[2].partition(".")[0], {})[name] = tensor
    weight_map = {}
    for i, some in enumerate(layers.values(), 1):
        file = f"model-{i:05d}-of-{len(layers):05d}.safetensors"
        mx.save_safetensors(str(folder / file), some, {"format": "mlx"})
        weight_map.update(dict.fromkeys(some, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(path))
    mx.eval(found)
    return found


def test_what_is_copied_comes_shard_by_shard(server: Hub, tmp_path: Path) -> None:
    lib.make("mlx-lm", lib.config("mlx-lm", "olmoe"), server.folder, 4)
    in_shards(server.folder, tensors_of(server.folder))
    convert(server.folder, tmp_path / "ideal")
    most = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal most
        shards = (tmp_path / "out/.conversion/shards").glob("*")
        most = max(most, len({path.name.partition(".safetensors")[0] for path in shards}))

    notes: list[str] = []
    convert("org/model", tmp_path / "out", progress=progress, note=notes.append)
    for path in (tmp_path / "ideal").rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            assert (tmp_path / "out" / path.relative_to(tmp_path / "ideal")).read_bytes() == path.read_bytes()
    assert len(list(server.folder.glob("*.safetensors"))) > 2 >= most >= 1
    assert any("modules of mlx-lm" in note for note in notes)


def test_what_is_computed_with_must_be_in_a_folder(server: Hub, tmp_path: Path) -> None:
    """GraniteMoE's release has gate and up in one tensor, whose halves mlx-lm takes."""
    lib.make("mlx-lm", lib.config("mlx-lm", "granitemoe"), server.folder, None)
    tensors = tensors_of(server.folder)
    for name in [name for name in tensors if name.endswith("switch_mlp.gate_proj.weight")]:
        at = name.removesuffix("switch_mlp.gate_proj.weight")
        up, down = (tensors.pop(f"{at}switch_mlp.{part}_proj.weight") for part in ("up", "down"))
        tensors[f"{at}input_linear.weight"] = mx.concatenate([tensors.pop(name), up], axis=1)
        tensors[f"{at}output_linear.weight"] = down
    in_shards(server.folder, tensors)
    with pytest.raises(SourceError, match=r"mlx-lm computes .* in a folder .* --hf-path"):
        convert("org/model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(server.folder, tmp_path / "from_a_folder", q_bits=16)
