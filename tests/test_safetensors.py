"""The safetensors reader: right about good files, a named error for every other, never anything else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Array, save_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe.convert.safetensors import (
    DTYPE_BITS,
    SafetensorsFile,
    build_header,
    parse_header,
    read_tensors,
)
from mlx_flashmoe.errors import SourceError


def header_of(entries: dict) -> bytes:
    return json.dumps(entries).encode()


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "U8", "shape": [0, 7], "data_offsets": [32, 32]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])  # the second as mx.save_safetensors writes it
def test_good_header(metadata: dict[str, str] | None) -> None:
    found = parse_header(header_of({"__metadata__": metadata, **GOOD}), 40, "f")
    assert found == {
        "a": ("F32", (2, 3), 0),
        "b": ("BF16", (4,), 24),
        "none": ("U8", (0, 7), 32),
        "scalar": ("I64", (), 32),
    }


def altered(name: str, **changes: object) -> dict:
    return {**GOOD, name: {**GOOD[name], **changes}}


@pytest.mark.parametrize(
    ("header", "size", "says"),
    [
        (b"{", 40, "not JSON"),
        (b"\xff\xfe", 40, "not JSON"),
        (b"[" * 100_000, 40, "not JSON"),
        (b"[]", 40, "not a JSON object"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 40, "'a' twice"),
        (header_of({"__metadata__": {"n": 1}}), 0, "__metadata__"),
        (header_of({"a": [1]}), 40, "'a'.*dtype, shape and data_offsets"),
        (header_of({"a": {"dtype": "U8", "shape": [1]}}), 1, "'a'.*dtype, shape and data_offsets"),
        (header_of(altered("a", dtype="F33")), 40, "'a': unknown dtype 'F33'"),
        (header_of(altered("a", dtype=["F32"])), 40, "'a': unknown dtype"),
        (header_of(altered("a", shape=[2, -3])), 40, "'a': malformed shape"),
        (header_of(altered("a", shape=[2, 3.0])), 40, "'a': malformed shape"),
        (header_of(altered("a", shape=[True, 6])), 40, "'a': malformed shape"),
        (header_of(altered("a", shape=[1 << 62] * 30)), 40, "'a': data_offsets span 24 bytes"),
        (header_of(altered("a", shape=[1 << 62] * 500)), 40, "'a': malformed shape"),
        (header_of(altered("a", shape=[2, 4])), 40, "'a': data_offsets span 24 bytes"),
        (header_of(altered("a", data_offsets=[24, 0])), 40, "'a': malformed data_offsets"),
        (header_of(altered("a", data_offsets=[0, 24, 48])), 40, "'a': malformed data_offsets"),
        (header_of(altered("b", data_offsets=[20, 28])), 40, "'b'.*overlaps"),
        (header_of(altered("scalar", data_offsets=[48, 56])), 56, "'scalar'.*hole of 16"),
        (
            header_of(altered("scalar", data_offsets=[33, 41])),
            40,
            "'scalar'.*only 40 bytes of data; truncated",
        ),
        (header_of(GOOD), 39, "truncated"),
        (header_of(GOOD), 41, "1 bytes of the file belong to no tensor"),
        (header_of({}), 1, "belong to no tensor"),
    ],
)
def test_bad_header(header: bytes, size: int, says: str) -> None:
    with pytest.raises(SourceError, match=f"^some/file: .*{says}") as e:
        parse_header(header, size, "some/file")
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes are too few"),
        (b"\x01\x00\x00", "3 bytes are too few"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "200000000 bytes"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((3).to_bytes(8, "little") + b"{}", "only 10; truncated"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=f"x.safetensors.*{says}"):
        SafetensorsFile(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"x\.safetensors is missing"):
        SafetensorsFile(tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="is not a file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is not a file"):
        SafetensorsFile(tmp_path / "pipe")


@pytest.fixture
def stacked(tmp_path: Path) -> tuple[np.ndarray, SafetensorsFile]:
    values = np.arange(5 * 7 * 3, dtype=np.float32).reshape(5, 7, 3)
    other = Array("U8", (3,), b"abc")  # what follows is aligned to nothing
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"first": other, "t": Array("F32", (5, 7, 3), values.tobytes()), "last": other})
    return values, SafetensorsFile(path)


def test_slices(stacked: tuple[np.ndarray, SafetensorsFile]) -> None:
    values, file = stacked
    t = file.tensors["t"]
    assert t.read().tobytes() == values.tobytes()
    assert t.at(3).shape == (7, 3) and t.at(3).read().tobytes() == values[3].tobytes()
    assert t.rows(1, 4).shape == (3, 7, 3) and t.rows(1, 4).read().tobytes() == values[1:4].tobytes()
    assert t.at(4).rows(2, 5).read().tobytes() == values[4, 2:5].tobytes()
    assert file.tensors["last"].read().tobytes() == b"abc"


def test_only_the_slice_is_read(stacked, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = stacked
    sizes = []
    real = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(b) for b in buffers))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    file.tensors["t"].at(2).rows(1, 3).read()
    assert sizes == [2 * 3 * 4]


@pytest.mark.parametrize("most", [1, 5, 100])
def test_short_reads_are_continued(stacked, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    values, file = stacked
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        left, some = most, []
        for b in buffers:
            some.append(b[:left])
            left -= len(some[-1])
        return real(fd, [b for b in some if len(b)], offset)

    monkeypatch.setattr(os, "preadv", short)
    t = file.tensors["t"]
    room = [bytearray(t.at(i).nbytes) for i in range(5)]
    read_tensors((t.at(i), memoryview(room[i])) for i in (3, 1, 2, 4, 0))
    assert b"".join(room) == values.tobytes()


def test_neighbours_become_one_read(stacked, monkeypatch: pytest.MonkeyPatch) -> None:
    values, file = stacked
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: calls.append(len(b)) or real(fd, b, at))
    t = file.tensors["t"]
    room = {i: bytearray(t.at(i).nbytes) for i in (4, 0, 1)}
    read_tensors((t.at(i), memoryview(room[i])) for i in room)
    assert calls == [2, 1]
    assert all(bytes(room[i]) == values[i].tobytes() for i in room)


def test_more_slices_than_one_call_takes(tmp_path: Path) -> None:
    data = os.urandom(3000)
    save_safetensors(tmp_path / "x.safetensors", {"t": Array("U8", (1500, 2), data)})
    t = SafetensorsFile(tmp_path / "x.safetensors").tensors["t"]
    room = bytearray(3000)
    view = memoryview(room)
    read_tensors((t.at(i), view[2 * i : 2 * i + 2]) for i in range(1500))
    assert bytes(room) == data


def test_file_cut_after_opening(stacked) -> None:
    _, file = stacked
    t = file.tensors["t"]
    os.truncate(file.path, t.offset + 10)
    with pytest.raises(SourceError, match="truncated"):
        t.read()


def test_written_header_is_read_back_and_by_mlx(tmp_path: Path) -> None:
    entries = [("model.a", "F32", (3, 2)), ("b", "BF16", (5,)), ("c", "U32", (1, 1))]
    data = os.urandom(24) + bytes(10) + b"\1\0\0\0"
    (tmp_path / "m.safetensors").write_bytes(build_header(entries) + data)
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert [(t.name, t.dtype, t.shape) for t in file.tensors.values()] == entries
    assert file.tensors["model.a"].offset % 8 == 0
    loaded = mx.load(str(tmp_path / "m.safetensors"))
    assert np.array(loaded["model.a"]).tobytes() == data[:24]
    assert loaded["b"].dtype == mx.bfloat16 and loaded["c"].item() == 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(list(DTYPE_BITS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def check_consistent(found: dict[str, tuple[str, tuple[int, ...], int]], size: int) -> None:
    """What the parser accepted covers the data exactly once."""
    covered = np.zeros(size, dtype=np.int64)
    for dtype, shape, begin in found.values():
        n = math.prod(shape) * DTYPE_BITS[dtype]
        assert n % 8 == 0 and begin + n // 8 <= size
        covered[begin : begin + n // 8] += 1
    assert (covered == 1).all()


@given(json_values, st.integers(0, 60))
def test_any_json_is_an_error_or_consistent(value: object, size: int) -> None:
    try:
        found = parse_header(json.dumps(value).encode(), size, "f")
    except SourceError:
        return
    check_consistent(found, size)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(GOOD)),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    json_values | st.lists(st.integers(-2, 50), max_size=3),
    st.integers(30, 50),
)
def test_any_value_in_an_entry_is_an_error_or_consistent(
    name: str, key: str, value: object, size: int
) -> None:
    try:
        found = parse_header(header_of(altered(name, **{key: value})), size, "f")
    except SourceError:
        return
    check_consistent(found, size)


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_are_an_error_or_consistent(tmp_path_factory, data: st.DataObject) -> None:
    """Flips, cuts and insertions anywhere in a file: it is refused, or every tensor it lists can be read."""
    text = header_of(GOOD)
    content = bytearray(len(text).to_bytes(8, "little") + text + bytes(range(40)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["flip", "cut", "insert", "end"]))
        if change == "flip":
            content[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del content[at : at + data.draw(st.integers(1, 4))]
        elif change == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            del content[at:]
        if not content:
            break
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except SourceError as e:
        assert "damaged.safetensors" in str(e) and "\n" not in str(e)
        return
    try:
        assert all(len(t.read()) == t.nbytes for t in file.tensors.values())
        assert sum(t.nbytes for t in file.tensors.values()) < len(content)
    finally:
        file.close()


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(
            st.sampled_from(["U8", "F16", "BF16", "F32", "I64"]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=6,
    )
)
def test_any_file_round_trips(tmp_path_factory, tensors: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {
        name: Array(dtype, tuple(shape), os.urandom(math.prod(shape) * DTYPE_BITS[dtype] // 8))
        for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_safetensors(path, arrays)
    file = SafetensorsFile(path)
    try:
        read = {n: Array(t.dtype, t.shape, t.read().tobytes()) for n, t in file.tensors.items()}
        assert read == arrays
    finally:
        file.close()
