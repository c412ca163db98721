"""Reading and writing of shards: files of a Zarr v3 array with the `sharding_indexed` codec.

A shard is streamed chunk by chunk with the index last, so that one chunk is in memory at a time and a truncated file
has no index. It is read with one scatter read per run of chunks, directly into the caller's arrays. Checksums are
always verified. zarr-python, zarrs and tensorstore read the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clt.capture.storage.base import Storage, missing
from clt.capture.store.arrays import ZSTD_LEVEL, ArraySpec
from clt.capture.store.file_records import FileRecord
from clt.checksum import crc32c, crc32c_joined
from clt.errors import StoreError

_MISSING = 2**64 - 1
_TRAILER = 4


class ShardWriter:
    """Writes one shard; a published shard is complete, durable and never replaced.

    Args:
        storage: the store's files.
        array: the array.
        unit: number of the unit.
    """

    def __init__(self, storage: Storage, array: ArraySpec, unit: int) -> None:
        self._array, self._key = array, array.shard(unit)
        self._index = np.full((array.chunks, 2), _MISSING, dtype="<u8")
        self._next = self._size = self._crc = 0
        self._upload = storage.create(self._key)

    def append(self, chunk: NDArray[Any]) -> None:
        """Writes the next chunk, in lexicographic order; chunks never written are missing and read as zeros.

        Args:
            chunk: C-contiguous, of the array's chunk shape and type.
        """
        array = self._array
        assert chunk.shape == array.chunk and chunk.dtype == array.dtype and chunk.flags.c_contiguous
        payload = _zstd().encode(chunk) if array.compression == "zstd" else chunk.data.cast("B")
        checksum = crc32c(payload)
        self._upload.write([payload, checksum.to_bytes(_TRAILER, "little")])
        size = len(payload) + _TRAILER
        self._index[self._next] = self._size, size
        self._crc = crc32c_joined(self._crc, checksum, len(payload))
        self._next, self._size = self._next + 1, self._size + size

    def publish(self) -> FileRecord | None:
        """Writes the index and gives the shard its name.

        Returns:
            Size and checksum of the file; None if the name is taken, whose file is left unchanged.
        """
        index = self._index.tobytes()
        self._upload.write([index, crc32c(index).to_bytes(_TRAILER, "little")])
        if not self._upload.publish():
            return None
        return FileRecord(path=self._key, bytes=self._size + len(index) + _TRAILER, crc32c=crc32c(index, self._crc))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._upload.abort()


class ShardReader:
    """Reads one shard.

    Args:
        storage: the store's files.
        array: the array.
        unit: number of the unit.
        n_bytes: size of the file.
    """

    __slots__ = ("__dict__", "_array", "_key", "_n_bytes", "_storage")

    def __init__(self, storage: Storage, array: ArraySpec, unit: int, n_bytes: int) -> None:
        self._storage, self._array, self._key, self._n_bytes = storage, array, array.shard(unit), n_bytes

    def read_into(self, first: int, outs: Sequence[NDArray[Any]]) -> None:
        """Reads consecutive chunks and verifies their checksums.

        Args:
            first: number of the first chunk.
            outs: one C-contiguous array of the chunk's shape and type per chunk; missing chunks become zeros.

        Raises:
            StoreError: the shard is missing, truncated or damaged.
        """
        present = max(0, min(len(outs), self._present - first))
        for out in outs[present:]:
            out[...] = 0
        if present == 0:
            return
        if self._array.compression == "zstd":
            self._read_compressed(first, outs[:present])
        else:
            self._read_raw(first, outs[:present])

    def record(self) -> FileRecord:
        """Size and checksum of the existing shard; reads every byte once.

        Raises:
            StoreError: the shard is missing, truncated or damaged; names the file, and the damaged chunk.
        """
        present, checksum, start = self._present, 0, 0
        index = bytearray(self._array.chunks * 16)
        self._storage.read_into(self._key, self._n_bytes - len(index) - _TRAILER, [index])
        buffer = memoryview(bytearray())
        for chunk, size in enumerate(np.frombuffer(index, "<u8")[1 : 2 * present : 2].tolist()):
            if len(buffer) < size:
                buffer = memoryview(bytearray(size))
            payload, trailer = buffer[: size - _TRAILER], buffer[size - _TRAILER : size]
            self._storage.read_into(self._key, start, [payload, trailer])
            self._check(chunk, payload, trailer)
            checksum = crc32c_joined(checksum, int.from_bytes(trailer, "little"), len(payload))
            start += size
        return FileRecord(path=self._key, bytes=self._n_bytes, crc32c=crc32c(index, checksum))

    def check_index(self) -> int:
        """Number of chunks in the shard; raises StoreError if the index is damaged or does not match the file."""
        return self._present

    @property
    def _chunk_bytes(self) -> int:
        return int(np.prod(self._array.chunk)) * np.dtype(self._array.dtype).itemsize + _TRAILER

    @cached_property
    def _ends(self) -> NDArray[np.uint64] | int:
        """End offsets of the chunks; for uncompressed chunks, which have equal size, only their number."""
        size = self._array.chunks * 16 + _TRAILER
        raw = bytearray(size)
        name = self._storage.name(self._key)
        if self._n_bytes < size:
            raise StoreError(f"{name}: too short for its index; the file is damaged, run 'clt store repair'")
        self._storage.read_into(self._key, self._n_bytes - size, [raw])
        if crc32c(memoryview(raw)[:-_TRAILER]).to_bytes(_TRAILER, "little") != raw[-_TRAILER:]:
            raise StoreError(f"{name}: index does not match its checksum; run 'clt store repair'")
        index = np.frombuffer(raw[:-_TRAILER], dtype="<u8").reshape(-1, 2)
        present = int((index[:, 0] != _MISSING).sum())
        ends = np.cumsum(index[:present, 1])
        starts = ends - index[:present, 1]
        total = int(ends[-1]) if present else 0
        in_order = (index[present:] == _MISSING).all() and (index[:present, 0] == starts).all()
        if not in_order or total + size != self._n_bytes:
            raise StoreError(f"{name}: index does not match the file size; run 'clt store repair'")
        if self._array.compression == "zstd":
            return ends
        if total != present * self._chunk_bytes:
            raise StoreError(f"{name}: chunk sizes differ from the array's; run 'clt store repair'")
        return present

    @property
    def _present(self) -> int:
        ends = self._ends
        return ends if isinstance(ends, int) else len(ends)

    def _read_raw(self, first: int, outs: Sequence[NDArray[Any]]) -> None:
        trailers = memoryview(bytearray(_TRAILER * len(outs)))
        parts = [(out.data.cast("B"), trailers[_TRAILER * i : _TRAILER * (i + 1)]) for i, out in enumerate(outs)]
        self._storage.read_into(self._key, first * self._chunk_bytes, [buffer for part in parts for buffer in part])
        for i, (payload, trailer) in enumerate(parts, first):
            self._check(i, payload, trailer)

    def _read_compressed(self, first: int, outs: Sequence[NDArray[Any]]) -> None:
        ends = self._ends
        assert not isinstance(ends, int)
        start = int(ends[first - 1]) if first else 0
        raw = memoryview(bytearray(int(ends[first + len(outs) - 1]) - start))
        self._storage.read_into(self._key, start, [raw])
        begin = 0
        for i, out in enumerate(outs):
            end = int(ends[first + i]) - start
            payload = raw[begin : end - _TRAILER]
            self._check(first + i, payload, raw[end - _TRAILER : end])
            _zstd().decode(payload, out=out)
            begin = end

    def _check(self, chunk: int, payload: memoryview, trailer: memoryview) -> None:
        if crc32c(payload) != int.from_bytes(trailer, "little"):
            raise StoreError(
                f"{self._storage.name(self._key)}: chunk {chunk} does not match its checksum; the file is damaged, "
                f"run 'clt store repair'"
            )


def standing_shard(storage: Storage, array: ArraySpec, unit: int) -> ShardReader:
    """Reader of an existing shard that has no record yet.

    Args:
        storage: the store's files.
        array: the array.
        unit: number of the unit.

    Raises:
        StoreError: it is missing.
    """
    key = array.shard(unit)
    size = storage.size(key)
    if size is None:
        raise missing(storage.name(key))
    return ShardReader(storage, array, unit, size)


def _zstd() -> Any:
    from numcodecs import Zstd

    return Zstd(level=ZSTD_LEVEL)
