"""Arrays of a store on disk: the only place that writes and reads Zarr data.

Activations are one Zarr v3 array `[token, site, channel]` with sharding: one shard file per unit, inner chunks
of (chunk_tokens, 1, d_model), no compression, crc32c on every inner chunk and on the shard's index. bfloat16 has no
Zarr data type that every reader knows, so its 16 bits are stored as uint16 with the attribute `logical_dtype`. What is
known about each token lies beside it in one-dimensional arrays. Unit u owns rows [u R, (u+1) R); the rows that it does
not fill are never read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import Crc32cCodec

from clt.capture.files import FileRecord, check_file, sync_folders
from clt.errors import StoreError

StoreDtype = Literal["bfloat16", "float32"]

DATA = "data.zarr"
ACTS = f"{DATA}/acts/lm"
TOKENS = f"{DATA}/tokens"
#: Token arrays and their types; all but `natural_index` are fields of `TokenTable`.
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


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Shapes and types of a store's arrays.

    Attributes:
        sites: site names, in the order of the site axis.
        d_model: channels of every site.
        store_dtype: type of the stored values.
        n_units: units of the plan.
        rows_per_unit: rows that a unit owns, a multiple of `chunk_tokens`.
        chunk_tokens: rows of an inner chunk.
    """

    sites: tuple[str, ...]
    d_model: int
    store_dtype: StoreDtype
    n_units: int
    rows_per_unit: int
    chunk_tokens: int


def to_stored(values: Tensor, store_dtype: StoreDtype) -> Tensor:
    """Rounds values to the type a store keeps, to the nearest, ties to even."""
    return values.to(torch.bfloat16 if store_dtype == "bfloat16" else torch.float32)


def _bits(values: Tensor) -> NDArray[Any]:
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _values(bits: NDArray[Any], store_dtype: StoreDtype) -> Tensor:
    """Stored bits as a tensor of their logical type; the one place that knows about bfloat16 in uint16."""
    stored = torch.from_numpy(bits)
    return stored.view(torch.bfloat16) if store_dtype == "bfloat16" else stored


def create_arrays(root: Path, layout: ArrayLayout) -> None:
    """Writes the metadata of all arrays; those already there are left alone.

    Args:
        root: the store.
        layout: shapes and types.
    """
    rows = layout.n_units * layout.rows_per_unit
    n_sites = len(layout.sites)
    for leftover in (root / DATA).rglob("zarr.*.partial"):
        leftover.unlink()
    for group in ("", "acts", "tokens"):
        if not (root / DATA / group / "zarr.json").is_file():
            zarr.create_group(root / DATA, path=group)
    if not (root / ACTS / "zarr.json").is_file():
        zarr.create_array(
            root / ACTS,
            shape=(rows, n_sites, layout.d_model),
            shards=(layout.rows_per_unit, n_sites, layout.d_model),
            chunks=(layout.chunk_tokens, 1, layout.d_model),
            dtype="uint16" if layout.store_dtype == "bfloat16" else "float32",
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            dimension_names=("token", "site", "channel"),
            attributes={"logical_dtype": layout.store_dtype, "sites": list(layout.sites)},
        )
    for name, dtype in TOKEN_DTYPES.items():
        if not (root / TOKENS / name / "zarr.json").is_file():
            zarr.create_array(
                root / TOKENS / name,
                shape=(rows,),
                shards=(layout.rows_per_unit,),
                chunks=(layout.rows_per_unit,),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                filters=None,
                fill_value=0,
                dimension_names=("token",),
            )
    shards = [root / array / "c" for array in (ACTS, *(f"{TOKENS}/{name}" for name in TOKEN_DTYPES))]
    for folder in shards:
        folder.mkdir(exist_ok=True)
    sync_folders({parent for folder in shards for parent in folder.parents if parent.is_relative_to(root)})


def metadata_files() -> tuple[str, ...]:
    """Paths of the Zarr metadata files, relative to the store."""
    groups = [f"{DATA}/zarr.json", f"{DATA}/acts/zarr.json", f"{TOKENS}/zarr.json"]
    return (*groups, f"{ACTS}/zarr.json", *(f"{TOKENS}/{name}/zarr.json" for name in TOKEN_DTYPES))


def unit_files(unit: int) -> tuple[str, ...]:
    """Paths of a unit's shards, relative to the store: activations first."""
    return (f"{ACTS}/c/{unit}/0/0", *(f"{TOKENS}/{name}/c/{unit}" for name in TOKEN_DTYPES))


def write_unit(root: Path, layout: ArrayLayout, unit: int, acts: Tensor, tokens: Mapping[str, NDArray[Any]]) -> None:
    """Writes the shards of one unit.

    Args:
        root: the store.
        layout: its shapes and types.
        unit: number of the unit.
        acts: [n, sites, d_model] from `to_stored`, n <= rows_per_unit, in the order of storage.
        tokens: arrays [n] named as in `TOKEN_DTYPES`.

    Raises:
        StoreError: all activations are zero.
    """
    n = acts.shape[0]
    first = unit * layout.rows_per_unit
    whole = slice(first, first + layout.rows_per_unit)

    def padded(values: NDArray[Any]) -> NDArray[Any]:
        return np.pad(values, [(0, layout.rows_per_unit - n)] + [(0, 0)] * (values.ndim - 1))

    # Whole shards only: writing a part of one would read it back first.
    zarr.open_array(root / ACTS, mode="r+")[whole] = padded(_bits(acts))
    if not (root / unit_files(unit)[0]).is_file():
        raise StoreError(f"{root}: all activations of unit {unit} are zero; check that the model's weights are loaded")
    # A text store's modality is all zero: without this setting its shards would be left out.
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, dtype in TOKEN_DTYPES.items():
            zarr.open_array(root / TOKENS / name, mode="r+")[whole] = padded(tokens[name].astype(dtype))


def discard_unit(root: Path, unit: int) -> None:
    """Removes what an uncommitted unit left behind, half-written files included."""
    shutil.rmtree(root / ACTS / "c" / str(unit), ignore_errors=True)
    for name in TOKEN_DTYPES:
        for path in [root / TOKENS / name / "c" / str(unit), *(root / TOKENS / name / "c").glob(f"{unit}.*")]:
            path.unlink(missing_ok=True)


class ArrayReader:
    """Reads blocks of a store's arrays; checksums are verified on the way.

    Args:
        root: the store.
        layout: its shapes and types.
        files: records of all committed files by path.
    """

    def __init__(self, root: Path, layout: ArrayLayout, files: Mapping[str, FileRecord]) -> None:
        self._root, self._layout, self._files = root, layout, files

    @cached_property
    def _acts(self) -> Any:
        return zarr.open_array(self._root / ACTS, mode="r")

    @cached_property
    def _tokens(self) -> dict[str, Any]:
        return {name: zarr.open_array(self._root / TOKENS / name, mode="r") for name in TOKEN_DTYPES}

    def acts(self, unit: int, start: int, stop: int, sites: Sequence[int]) -> Tensor:
        """Activations of rows [start, stop) of a unit.

        Args:
            unit: a committed unit.
            start: first row within the unit.
            stop: one past the last row.
            sites: numbers on the site axis, in the order wanted.

        Returns:
            [stop - start, len(sites), d_model] in the stored type.

        Raises:
            StoreError: the shard is missing, truncated or damaged; names the file.
        """
        base = unit * self._layout.rows_per_unit
        rows = slice(base + start, base + stop)
        path = unit_files(unit)[0]
        parts = [self._read(path, self._acts, (rows, run)) for run in _runs(sites)]
        return _values(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), self._layout.store_dtype)

    def tokens(self, unit: int, n_rows: int, name: str) -> NDArray[Any]:
        """One token array of the first `n_rows` rows of a unit; raises StoreError as `acts` does."""
        base = unit * self._layout.rows_per_unit
        path = unit_files(unit)[1 + list(TOKEN_DTYPES).index(name)]
        return self._read(path, self._tokens[name], slice(base, base + n_rows))

    def _read(self, path: str, array: Any, selection: Any) -> NDArray[Any]:
        # A missing shard would read as zeros.
        check_file(self._root, self._files[path])
        try:
            return array[selection]
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{self._root / path}: cannot be read ({reason}); restore it or capture again") from error


def _runs(sites: Sequence[int]) -> list[slice]:
    """Ascending runs of neighbouring sites, so that each is read as one slice."""
    runs: list[slice] = []
    for site in sites:
        if runs and runs[-1].stop == site:
            runs[-1] = slice(runs[-1].start, site + 1)
        else:
            runs.append(slice(site, site + 1))
    return runs
