"""Checksums: the published test value, and combination of parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clt.checksum import crc32c, crc32c_joined


def test_check_value_of_the_algorithm() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4, and every catalogue of CRCs


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_pieces_add_up(first: bytes, second: bytes) -> None:
    whole = crc32c(first + second)
    assert crc32c(second, crc32c(first)) == whole
    assert crc32c_joined(crc32c(first), crc32c(second), len(second)) == whole


@given(st.binary(max_size=300))
def test_checksum_of_data_and_its_checksum_is_constant(data: bytes) -> None:
    """Reason why a shard's record omits the checksums of its chunks."""
    assert crc32c(data + crc32c(data).to_bytes(4, "little")) == 0x48674BC7
