"""Shape, type and Zarr v3 metadata of one array of a store.

Every array is split along its first axis, the tokens: unit u owns rows [u R, (u+1) R), stored in one shard file with
chunks of C rows in lexicographic order, each followed by its crc32c, then the index (`sharding_indexed`). Metadata is
written here and not by zarr-python, so that a store has the same bytes with every release. bfloat16 values are stored
as uint16 bits with an attribute, because not every Zarr reader has the type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Compression = Literal["none", "zstd"]

DATA = "data.zarr"
TOKENS = f"{DATA}/tokens"
#: Token arrays and their types; all except `natural_index` are fields of `TokenTable`.
TOKEN_DTYPES = {
    "sample": "int64",
    "position": "int32",
    "token_id": "int32",
    "modality": "uint8",
    "patch_row": "int16",
    "patch_col": "int16",
    "image": "int16",
    "natural_index": "uint32",
}
#: zstd at level 1: on bfloat16 neither shuffling nor a higher level gains more than a few percent.
ZSTD_LEVEL = 1


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a store.

    Attributes:
        key: its folder, relative to the store.
        units: number of units of the plan.
        rows_per_unit: R, rows of a shard.
        chunk_rows: C, rows of a chunk, a divisor of R.
        shape: sizes of the axes after the first.
        chunk_shape: sizes of a chunk along these axes.
        dtype: numpy name of the stored type.
        dimensions: names of all axes.
        compression: codec of the chunks.
        attributes: Zarr attributes of the array.
    """

    key: str
    units: int
    rows_per_unit: int
    chunk_rows: int
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    compression: Compression = "none"
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return (self.chunk_rows, *self.chunk_shape)

    @property
    def chunks_per_row(self) -> int:
        """Number of chunks that hold the same rows; they are adjacent in the file."""
        return math.prod(size // part for size, part in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def chunks(self) -> int:
        """Number of chunks of a shard, missing ones included."""
        return self.rows_per_unit // self.chunk_rows * self.chunks_per_row

    def shard(self, unit: int) -> str:
        """Key of a unit's shard."""
        return f"{self.key}/c/{unit}" + "/0" * len(self.shape)

    def metadata(self) -> bytes:
        """Contents of the array's zarr.json."""
        tail = list(self.shape)
        endian = {} if self.dtype in ("uint8", "int8") else {"configuration": {"endian": "little"}}
        zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        codecs = [{"name": "bytes", **endian}, *([zstd] if self.compression == "zstd" else []), {"name": "crc32c"}]
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": [self.rows_per_unit, *tail]}}
        return _json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [self.units * self.rows_per_unit, *tail],
                "data_type": self.dtype,
                "chunk_grid": grid,
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": 0.0 if self.dtype.startswith("float") else 0,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": dict(self.attributes),
                "dimension_names": list(self.dimensions),
                "storage_transformers": [],
            }
        )


def group_metadata() -> bytes:
    """Contents of a group's zarr.json."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": {}})


def _json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode()
