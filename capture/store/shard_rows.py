"""Reading and writing a unit's rows as one shard, and the conversion between stored bits and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.storage.base import Storage
from clt.capture.store.arrays import ArraySpec
from clt.capture.store.file_records import FileRecord
from clt.capture.store.schema import StoreDtype
from clt.capture.store.shard import ShardReader, ShardWriter

#: torch types of the stored types.
TORCH_DTYPES: dict[StoreDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}


def write_rows(
    storage: Storage, array: ArraySpec, unit: int, rows: NDArray[Any], order: NDArray[Any] | None = None
) -> FileRecord | None:
    """Writes one shard, with one block of rows in memory at a time.

    Args:
        storage: the store's files.
        array: the array.
        unit: number of the unit.
        rows: [n, ...] in the stored type, n <= rows_per_unit.
        order: [n] stored row i is `rows[order[i]]`; default: as given.

    Returns:
        Size and checksum of the file; None if its name was taken.
    """
    size = array.chunk_rows
    with ShardWriter(storage, array, unit) as shard:
        for start in range(0, len(rows), size):
            block = rows[start : start + size] if order is None else rows[order[start : start + size]]
            if len(block) < size:
                block = np.concatenate([block, np.zeros((size - len(block), *block.shape[1:]), block.dtype)])
            # A chunk of activations holds one site, a chunk of any other array all columns.
            parts = np.split(block, array.chunks_per_row, axis=1) if array.chunks_per_row > 1 else [block]
            for part in parts:
                shard.append(np.ascontiguousarray(part))
        return shard.publish()


def read_rows(reader: ShardReader, array: ArraySpec, n_rows: int) -> NDArray[Any]:
    """Reads the first rows of a shard.

    Args:
        reader: of the shard.
        array: its array.
        n_rows: number of rows.

    Returns:
        [n_rows, ...] in the stored order and type.

    Raises:
        StoreError: the shard is missing, truncated or damaged.
    """
    size, per_row = array.chunk_rows, array.chunks_per_row
    rows = np.empty((n_rows, *array.shape), array.dtype)
    chunks = np.empty((per_row, *array.chunk), array.dtype)
    for block in range(-(-n_rows // size)):
        reader.read_into(block * per_row, list(chunks))
        part = rows[block * size : (block + 1) * size]
        part[...] = (np.concatenate(list(chunks), axis=1) if per_row > 1 else chunks[0])[: len(part)]
    return rows


def bits_of(values: Tensor) -> NDArray[Any]:
    """Values as the stored array; bfloat16 as uint16."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def values_of(bits: NDArray[Any], store_dtype: StoreDtype) -> Tensor:
    """Stored bits as a tensor of their logical type that shares their memory."""
    stored = torch.from_numpy(bits)
    return stored.view(torch.bfloat16) if store_dtype == "bfloat16" else stored
