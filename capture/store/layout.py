"""Keys and shapes of a store's Zarr arrays, and keys of the files of its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from clt.capture.store.arrays import DATA, TOKEN_DTYPES, TOKENS, ArraySpec, Compression, group_metadata
from clt.capture.store.moments import Moments
from clt.capture.store.schema import TOKEN_CLASSES, SiteGroup, StoreSpec


@dataclass(frozen=True)
class StoreArrays:
    """Zarr arrays of a store, derived from its spec."""

    spec: StoreSpec
    n_units: int

    def acts(self, group: SiteGroup) -> ArraySpec:
        """Activations [token, site, channel]."""
        dtype = {"bfloat16": "uint16"}.get(self.spec.store_dtype, self.spec.store_dtype)
        return self._array(
            f"{DATA}/acts/{group.name}",
            dtype,
            (len(group.sites), group.width),
            (1, group.width),
            compression=self.spec.compression,
            attributes={"logical_dtype": self.spec.store_dtype, "sites": list(group.sites)},
        )

    def norms(self, group: SiteGroup) -> ArraySpec:
        """Euclidean norms [token, site] float32."""
        return self._array(f"{DATA}/norms/{group.name}", "float32", (len(group.sites),), (len(group.sites),))

    def scales(self, group: SiteGroup) -> ArraySpec:
        """Scales of int8 values [token, site] float32."""
        return self._array(f"{DATA}/scales/{group.name}", "float32", (len(group.sites),), (len(group.sites),))

    def token(self, name: str) -> ArraySpec:
        """A column of the token table [token], one of `TOKEN_DTYPES`."""
        return self._array(f"{TOKENS}/{name}", TOKEN_DTYPES[name], (), ())

    def per_unit(self) -> tuple[ArraySpec, ...]:
        """All arrays with one shard per unit, in the order in which shards are published."""
        groups = self.spec.groups
        scales = [self.scales(group) for group in groups] if self.spec.store_dtype == "int8" else []
        acts = [array for group in groups for array in (self.acts(group), self.norms(group))]
        return (*scales, *acts, *(self.token(name) for name in TOKEN_DTYPES))

    def folders(self) -> tuple[str, ...]:
        """Keys of the Zarr groups."""
        arrays = sorted({array.key.rpartition("/")[0] for array in self.per_unit()} | {f"{DATA}/stats"})
        return (DATA, *arrays, *(f"{DATA}/stats/{group.name}" for group in self.spec.groups))

    def metadata_files(self) -> dict[str, bytes]:
        """Contents of zarr.json of all groups and of all arrays with one shard per unit, by key."""
        files = {f"{folder}/zarr.json": group_metadata() for folder in self.folders()}
        return files | {f"{array.key}/zarr.json": array.metadata() for array in self.per_unit()}

    def _array(
        self,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        chunk_shape: tuple[int, ...],
        compression: Compression = "none",
        attributes: Mapping[str, Any] | None = None,
    ) -> ArraySpec:
        return ArraySpec(
            key=key,
            units=self.n_units,
            rows_per_unit=self.spec.rows_per_unit,
            chunk_rows=self.spec.chunk_tokens,
            shape=shape,
            chunk_shape=chunk_shape,
            dtype=dtype,
            dimensions=("token", "site", "channel")[: 1 + len(shape)],
            compression=compression,
            attributes=attributes or {},
        )


def commit_path(unit: int) -> str:
    """Key of a unit's commit record."""
    return f"units/commits/{unit:06d}.json"


def stats_path(unit: int) -> str:
    """Key of a unit's moments."""
    return f"units/stats/{unit:06d}.safetensors"


def stats_arrays(group: SiteGroup) -> dict[str, ArraySpec]:
    """Arrays of the merged moments of a group, by field of `Moments`."""
    empty = Moments.zeros(len(group.sites), group.width)
    specs = {}
    for name in (f.name for f in fields(Moments)):
        tensor: Tensor = getattr(empty, name)
        specs[name] = ArraySpec(
            key=f"{DATA}/stats/{group.name}/{name}",
            units=1,
            rows_per_unit=len(TOKEN_CLASSES),
            chunk_rows=len(TOKEN_CLASSES),
            shape=tuple(tensor.shape[1:]),
            chunk_shape=tuple(tensor.shape[1:]),
            dtype=str(tensor.dtype).removeprefix("torch."),
            dimensions=("token_class", "site", "channel")[: tensor.ndim],
            attributes={"token_classes": list(TOKEN_CLASSES)},
        )
    return specs
