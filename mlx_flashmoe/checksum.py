"""crc32 of a whole from the crc32 of its parts.

Parts of a blob are read by several threads, and written as the checkpoint's shards come in; none of them ever
holds the whole. A crc is the remainder of the data, as a polynomial over GF(2), by a fixed one; so the data's
first part counts as its own remainder times x^(8 n), n being the bytes that follow.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # zlib's, the coefficient of x^0 in the highest bit and x^32 left out
_ONE, _X = 1 << 31, 1 << 30


def combine(first: int, second: int, nbytes: int) -> int:
    """The crc32 of two parts, of which the second has ``nbytes`` bytes."""
    return _times(_shift(nbytes), first) ^ second


def crc32_of(size: int, parts: Iterable[tuple[int, int, int]]) -> int:
    """The crc32 of ``size`` bytes that are zero but for ``parts``: (offset, bytes, crc32), not overlapping.

    Raises:
        ValueError: parts overlap, or reach beyond ``size``.
    """
    crc = position = 0
    for offset, nbytes, part in [*sorted(parts), (size, 0, 0)]:
        if offset < position:
            raise ValueError(f"[crc32_of] a part begins at {offset}, before the one that ends at {position}")
        crc = combine(combine(crc, _zeros(offset - position), offset - position), part, nbytes)
        position = offset + nbytes
    return crc


def _times(a: int, b: int) -> int:
    """The product of two polynomials, modulo ours."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes), modulo ours."""
    result, square, exponent = _ONE, _X, 8 * nbytes
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result


@lru_cache(maxsize=4096)
def _zeros(nbytes: int) -> int:
    """The crc32 of so many zeros."""
    crc = 0
    while nbytes:
        piece = min(nbytes, 1 << 20)
        crc = zlib.crc32(bytes(piece), crc)
        nbytes -= piece
    return crc
