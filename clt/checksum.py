"""CRC-32C checksums of buffers and of concatenated pieces; the only module that imports awscrt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from awscrt import checksums

if TYPE_CHECKING:
    from typing_extensions import Buffer


def crc32c(data: Buffer, before: int = 0) -> int:
    """Checksum of bytes, continued from that of preceding bytes.

    Args:
        data: contiguous bytes.
        before: checksum of the preceding bytes.

    Returns:
        crc32c of both together.
    """
    checksum: int = checksums.crc32c(data, before)
    return checksum


def crc32c_joined(first: int, second: int, second_bytes: int) -> int:
    """Checksum of two concatenated pieces.

    Args:
        first: checksum of the first piece.
        second: checksum of the second piece.
        second_bytes: length of the second piece.

    Returns:
        crc32c of both together, without reading either again.
    """
    checksum: int = checksums.combine_crc32c(first, second, second_bytes)
    return checksum
