"""crc32c of buffers, and of a file from the checksums of its pieces.

A shard carries a checksum behind every chunk. The checksum of the whole file follows from those by arithmetic, so that
no byte is read twice while a shard is written.
"""

from __future__ import annotations

from functools import lru_cache

from crc32c import crc32c as _crc32c
from typing_extensions import Buffer

#: The polynomial of crc32c (Castagnoli), bits reflected: the highest bit is the coefficient of x^0.
_POLYNOMIAL = 0x82F63B78


def crc32c(data: Buffer, before: int = 0) -> int:
    """Checksum of bytes that follow others.

    Args:
        data: contiguous bytes.
        before: checksum of what comes before them.

    Returns:
        crc32c of both together.
    """
    return _crc32c(data, before)


def crc32c_joined(first: int, second: int, second_bytes: int) -> int:
    """Checksum of two pieces laid end to end, from the checksums of each.

    Args:
        first: checksum of the first piece.
        second: checksum of the second piece.
        second_bytes: length of the second piece.

    Returns:
        crc32c of both together: the first checksum, as a polynomial, times x^(8 second_bytes), plus the second.
    """
    return _product(_power(second_bytes), first) ^ second


def _product(a: int, b: int) -> int:
    """Product of two polynomials modulo that of crc32c."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _power(n_bytes: int) -> int:
    """x^(8 n_bytes) modulo the polynomial, by squaring."""
    result, square = 0x80000000, 0x00800000  # x^0 and x^8
    while n_bytes:
        if n_bytes & 1:
            result = _product(result, square)
        square = _product(square, square)
        n_bytes >>= 1
    return result
