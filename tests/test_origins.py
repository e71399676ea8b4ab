"""Where a model's arrays come from: what is a tensor of the checkpoint is known, what was changed is not."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashmoe.convert.origins import IN_PLACE, Origin, watched


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = str(tmp_path / "a.safetensors")
    mx.save_safetensors(path, {name: mx.arange(1, 9, dtype=mx.uint32).reshape(2, 4) for name in "ab"})
    return path


def whole(name: str) -> Origin:
    return Origin(name, mx.uint32, (2, 4))


def test_loaded_viewed_and_stacked_arrays_are_known(file: str) -> None:
    with watched() as origins:
        loaded = mx.load(file)
        halves = loaded["a"].view(mx.uint16)
        stacked, of_views = mx.stack([loaded["a"], loaded["b"]]), mx.stack([halves, halves])
        others = [
            loaded["a"] + 0,
            mx.stack([loaded["a"], loaded["b"] + 0]),
            mx.stack([halves, halves], axis=1),
        ]
    assert origins.known[id(loaded["b"])] == whole("b")
    assert origins.known[id(halves)] == Origin("a", mx.uint16, (2, 8))
    assert origins.stacked[id(stacked)] == [whole("a"), whole("b")]
    assert origins.stacked[id(of_views)] == [Origin("a", mx.uint16, (2, 8))] * 2
    assert not {id(one) for one in others} & (origins.known.keys() | origins.stacked.keys())


CHANGES: dict[str, Callable[[mx.array], object]] = {
    **{
        name: lambda a, name=name: getattr(operator, name)(a, 1) for name in IN_PLACE if name != "__setitem__"
    },
    "__setitem__": lambda a: operator.setitem(a, 0, 7),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_what_is_changed_in_place_is_not_what_was_loaded(file: str, change: str) -> None:
    with watched() as origins:
        loaded = mx.load(file)
        if change == "__itruediv__":
            loaded = {name: a.astype(mx.float32) for name, a in loaded.items()}
            origins.loaded(loaded)
        before = mx.stack([loaded["a"], loaded["b"]])
        CHANGES[change](loaded["a"])
        after = mx.stack([loaded["a"], loaded["b"]])
    assert id(loaded["a"]) not in origins.known and id(loaded["b"]) in origins.known
    assert id(before) in origins.stacked and id(after) not in origins.stacked
    np.testing.assert_array_equal(
        before[0], np.arange(1, 9).reshape(2, 4)
    )  # as they were when they were stacked


def test_mlx_is_as_it_was_afterwards() -> None:
    def functions() -> list[object]:
        return [mx.load, mx.stack, mx.array.view, *(getattr(mx.array, name) for name in IN_PLACE)]

    before = functions()
    with pytest.raises(ZeroDivisionError), watched():
        assert functions() != before
        raise ZeroDivisionError
    assert functions() == before


def test_dtypes_that_mlx_does_not_know_are_read_and_the_file_is_not_written(tmp_path: Path) -> None:
    data = np.arange(64, dtype=np.uint8)
    header = {
        "scale": {"dtype": "F8_E8M0", "shape": [4, 8], "data_offsets": [0, 32]},
        "weight": {"dtype": "I8", "shape": [4, 8], "data_offsets": [32, 64]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.tobytes())
    path.chmod(0o444)
    before = path.read_bytes(), path.stat().st_mtime_ns
    with watched() as origins:
        loaded = mx.load(str(path))
        np.testing.assert_array_equal(loaded["scale"], data[:32].reshape(4, 8))
        np.testing.assert_array_equal(loaded["weight"], data[32:].reshape(4, 8))
        with pytest.raises(RuntimeError):
            mx.load(str(tmp_path / "missing.safetensors"))
    assert origins.known[id(loaded["scale"])].name == "scale"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
