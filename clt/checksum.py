"""crc32c of buffers, and of a file from the checksums of its pieces; the one door to the library that computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from awscrt import checksums

if TYPE_CHECKING:
    from typing_extensions import Buffer


def crc32c(data: Buffer, before: int = 0) -> int:
    """Checksum of bytes that follow others.

    Args:
        data: contiguous bytes.
        before: checksum of what comes before them.

    Returns:
        crc32c of both together.
    """
    checksum: int = checksums.crc32c(data, before)
    return checksum


def crc32c_joined(first: int, second: int, second_bytes: int) -> int:
    """Checksum of two pieces laid end to end.

    Args:
        first: checksum of the first piece.
        second: checksum of the second piece.
        second_bytes: length of the second piece.

    Returns:
        crc32c of both together, without reading either again.
    """
    checksum: int = checksums.combine_crc32c(first, second, second_bytes)
    return checksum
