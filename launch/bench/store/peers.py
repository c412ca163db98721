"""Other formats and libraries of the store benchmark, each through the fastest of its calls that we found.

All of them read blocks [S,C,d], C tokens at S sites, into arrays of the caller. Zarr libraries read the store's own
files; the others keep the blocks contiguous and in reading order, as the store does.

zarr-python is measured by plain indexing and with its `out` argument. Slower calls, left out (November 2026):
zarr-python and zarrs one site at a time; tensorstore's `read` and a copy; torch.load without mmap; safetensors'
`get_slice` with torch tensors. zarrs without `out` and `h5py.Dataset.__getitem__` were slower for one layout and faster
for the other, by little.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from clt.launch.bench.store.data import Bits, Layout, ReadBlock

_BATCHED = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_ZARRS = "zarrs.ZarrsCodecPipeline"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another format or library.

    Attributes:
        name: row of the tables.
        module: module that must be importable; None if it is one of our requirements.
        checksums: whether reading verifies checksums.
        writes: whether its writes are compared; not where another peer writes the same way.
        reads_store: whether it reads the store's own files, [T,S,d]; others read copies in blocks, [T/C,S,C,d].
        write: writes an array of either shape to a new path, without fsync.
        open: returns the function that reads a block of a copy or of the store's array.
    """

    name: str
    module: str | None = None
    checksums: bool = False
    writes: bool = True
    reads_store: bool = False
    write: Callable[[Path, Bits, Layout], None]
    open: Callable[[Path, Layout], AbstractContextManager[ReadBlock]]

    @property
    def installed(self) -> bool:
        """True if it can be measured here."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


def sync_tree(path: Path) -> None:
    """Syncs a file, or all files and folders below a folder, and the parent folder to disk."""
    places = [path, path.parent]
    if path.is_dir():
        places += [Path(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files)]
    for place in places:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_zarr(path: Path, array: Bits, layout: Layout, pipeline: str) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec

    shard = (layout.shard_tokens, *array.shape[1:])
    chunk = (layout.chunk_tokens, 1, layout.width)
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        target = zarr.create_array(
            path,
            shape=array.shape,
            shards=shard,
            chunks=chunk,
            dtype="uint16",
            compressors=[Crc32cCodec()],
            # Otherwise every chunk is compared with the fill value, which doubles the time.
            config={"write_empty_chunks": True},
        )
        # Shard by shard, as in a capture; the whole array at once was not consistently faster.
        for start in range(0, layout.tokens, layout.shard_tokens):
            target[start : start + layout.shard_tokens] = array[start : start + layout.shard_tokens]


def _zarr_array(path: Path, pipeline: str) -> Any:
    import zarr

    with zarr.config.set({"codec_pipeline.path": pipeline}):
        return zarr.open_array(path, mode="r")


def _zarr_buffer(array: Bits) -> Any:
    from zarr.core.buffer.cpu import NDBuffer

    return NDBuffer(cast(Any, array))


@contextmanager
def _open_zarr(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    source, size = _zarr_array(path, _BATCHED), layout.chunk_tokens
    yield lambda block, out: np.copyto(out, source[block * size : (block + 1) * size].transpose(1, 0, 2))


@contextmanager
def _open_zarr_out(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    source, size = _zarr_array(path, _BATCHED), layout.chunk_tokens

    def read(block: int, out: Bits) -> None:
        # Filling a view with swapped axes is as fast as one in its own order.
        rows = slice(block * size, (block + 1) * size)
        source.get_basic_selection((rows,), out=_zarr_buffer(out.transpose(1, 0, 2)))

    yield read


@contextmanager
def _open_zarrs(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    source, size = _zarr_array(path, _ZARRS), layout.chunk_tokens

    def read(block: int, out: Bits) -> None:
        rows = slice(block * size, (block + 1) * size)
        if layout.sites == 1:
            source.get_basic_selection((rows,), out=_zarr_buffer(out.reshape(size, 1, layout.width)))
            return
        # zarrs fills contiguous arrays only.
        tokens_first = np.empty((size, layout.sites, layout.width), np.uint16)
        source.get_basic_selection((rows,), out=_zarr_buffer(tokens_first))
        np.copyto(out, tokens_first.transpose(1, 0, 2))

    yield read


def _tensorstore_spec(path: Path) -> dict[str, Any]:
    # Its own fsync is off; `sync_tree` follows where durable writes are compared.
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}},
    }


def _write_tensorstore(path: Path, array: Bits, layout: Layout) -> None:
    import tensorstore

    inner = {
        "chunk_shape": [layout.chunk_tokens, 1, layout.width],
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    metadata = {
        "shape": list(array.shape),
        "data_type": "uint16",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.shard_tokens, layout.sites, layout.width]},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    target = tensorstore.open(_tensorstore_spec(path) | {"metadata": metadata}, create=True).result()
    for start in range(0, layout.tokens, layout.shard_tokens):
        stop = start + layout.shard_tokens
        target[start:stop].write(array[start:stop]).result()


@contextmanager
def _open_tensorstore(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    import tensorstore

    source = tensorstore.open(_tensorstore_spec(path), open=True, read=True).result().transpose([1, 0, 2])
    size = layout.chunk_tokens

    def read(block: int, out: Bits) -> None:
        part = source[:, block * size : (block + 1) * size][tensorstore.d[:].translate_to[0]]
        tensorstore.array(out, copy=False).write(part).result()

    yield read


def _write_h5(path: Path, array: Bits, layout: Layout, chunked: bool) -> None:
    import h5py

    chunk = (layout.chunk_tokens, layout.width)
    in_chunks = (1, 1, *chunk) if array.ndim == 4 else (chunk[0], 1, chunk[1])
    with h5py.File(path, "w") as file:
        file.create_dataset("acts", data=array, chunks=in_chunks if chunked else None)


@contextmanager
def _open_h5(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    import h5py

    with h5py.File(path, "r") as file:
        source = file["acts"]
        yield lambda block, out: source.read_direct(out, np.s_[block])


def _write_raw(path: Path, array: Bits, layout: Layout) -> None:
    array.tofile(path)


@contextmanager
def _open_memmap(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    source = np.memmap(path, np.uint16, "r", shape=(layout.blocks, *layout.block_shape))
    yield lambda block, out: np.copyto(out, source[block])


@contextmanager
def _open_preadv(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    descriptor = os.open(path, os.O_RDONLY)

    def read(block: int, out: Bits) -> None:
        done = os.preadv(descriptor, [out.data], block * out.nbytes)
        assert done == out.nbytes, f"{path}: read {done} of {out.nbytes} bytes"

    try:
        yield read
    finally:
        os.close(descriptor)


def _write_torch(path: Path, array: Bits, layout: Layout) -> None:
    torch.save(torch.from_numpy(array), path)


@contextmanager
def _open_torch(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    source = torch.load(path, mmap=True)

    def read(block: int, out: Bits) -> None:
        torch.from_numpy(out).copy_(source[block])

    yield read


def _write_safetensors(path: Path, array: Bits, layout: Layout) -> None:
    from safetensors.numpy import save_file

    save_file({"acts": array}, path)


@contextmanager
def _open_safetensors(path: Path, layout: Layout) -> Iterator[ReadBlock]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        source = file.get_slice("acts")
        yield lambda block, out: np.copyto(out, source[block])


_write_zarr_python = partial(_write_zarr, pipeline=_BATCHED)
ZARR_PYTHON, ZARR_OUT, MEMMAP = "zarr-python", "zarr-python, out=", "np.memmap (tofile)"
_OF_STORE: dict[str, Any] = {"checksums": True, "reads_store": True}
PEERS = (
    Peer(name=ZARR_PYTHON, module="zarr", write=_write_zarr_python, open=_open_zarr, **_OF_STORE),
    Peer(name=ZARR_OUT, module="zarr", write=_write_zarr_python, open=_open_zarr_out, writes=False, **_OF_STORE),
    Peer(name="zarrs", module="zarrs", write=partial(_write_zarr, pipeline=_ZARRS), open=_open_zarrs, **_OF_STORE),
    Peer(name="tensorstore", module="tensorstore", write=_write_tensorstore, open=_open_tensorstore, **_OF_STORE),
    Peer(name="h5py, contiguous", module="h5py", write=partial(_write_h5, chunked=False), open=_open_h5),
    Peer(name="h5py, chunked", module="h5py", write=partial(_write_h5, chunked=True), open=_open_h5),
    Peer(name=MEMMAP, write=_write_raw, open=_open_memmap),
    Peer(name="torch.save", write=_write_torch, open=_open_torch),
    Peer(name="safetensors", write=_write_safetensors, open=_open_safetensors),
    Peer(name="bare preadv", write=_write_raw, open=_open_preadv, writes=False),
)
