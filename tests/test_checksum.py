"""crc32 put together from parts is zlib's crc32 of the whole."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashmoe.checksum import combine, crc32_of


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_parts(a: bytes, b: bytes) -> None:
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_megabytes_follow() -> None:
    a, b = b"first", bytes(range(256)) * 40_000
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(st.data())
def test_parts_and_gaps(data: st.DataObject) -> None:
    whole, parts = bytearray(), []
    for gap, part in data.draw(
        st.lists(st.tuples(st.integers(0, 70), st.binary(min_size=1, max_size=90)), max_size=6)
    ):
        whole += bytes(gap)
        parts.append((len(whole), len(part), zlib.crc32(part)))
        whole += part
    whole += bytes(data.draw(st.integers(0, 70)))
    shuffled = data.draw(st.permutations(parts))
    assert crc32_of(len(whole), shuffled) == zlib.crc32(whole)


def test_a_long_gap() -> None:
    n = (1 << 20) + 17
    assert crc32_of(n + 1, [(n, 1, zlib.crc32(b"x"))]) == zlib.crc32(bytes(n) + b"x")


@pytest.mark.parametrize("parts", [[(0, 4, 1), (3, 2, 1)], [(0, 9, 1)]])
def test_parts_that_cannot_be(parts: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="before the one that ends at"):
        crc32_of(8, parts)
