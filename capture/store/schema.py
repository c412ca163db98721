"""Contents of a store's JSON files, as dataclasses.

`StoreSpec` is store.json, `CapturePlan` plan.json, `UnitRecord` a unit's commit record and `Manifest` manifest.json;
`docs/store.md` shows the file tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from clt.capture.store.arrays import Compression
from clt.capture.store.file_records import FileRecord
from clt.records import ModelIdentity

T = TypeVar("T")

StoreDtype = Literal["bfloat16", "float32", "int8"]

SCHEMA_VERSION = "2.1"
SPEC, PLAN, MANIFEST, QUANTISATION = "store.json", "plan.json", "manifest.json", "quantisation.safetensors"
#: Token classes with statistics of their own, in the order of `Modality`; padding is never stored.
TOKEN_CLASSES = ("text", "image", "image_special", "bos")


@dataclass(frozen=True, kw_only=True)
class SiteGroup:
    """Sites of equal width, stored in one array.

    Attributes:
        name: name of the array.
        sites: site names, in the order of the site axis.
        width: channels of every site.
    """

    name: str
    sites: tuple[str, ...]
    width: int


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Contents of a store, fixed before the first unit is captured.

    Attributes:
        schema_version: "major.minor"; readers accept their own major version.
        created_by: software versions that created the store.
        model: model whose activations are stored.
        model_dtype: floating-point type in which the model ran.
        groups: the sites, by width.
        store_dtype: type of the stored values.
        compression: codec of the stored values.
        rows_per_unit: rows of a full unit, a multiple of `chunk_tokens`.
        chunk_tokens: rows of an inner chunk, the unit of reading.
        batch_size: prompts per forward pass; affects the last bits of the activations.
        seed: random seed of the row order within units.
        source: hex digest of the examples.
    """

    schema_version: str
    created_by: str
    model: ModelIdentity
    model_dtype: str
    groups: tuple[SiteGroup, ...]
    store_dtype: StoreDtype
    compression: Compression
    rows_per_unit: int
    chunk_tokens: int
    batch_size: int
    seed: int
    source: str

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites, group by group."""
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of stored activations per token, before compression."""
        size = {"bfloat16": 2, "float32": 4, "int8": 1}[self.store_dtype]
        scales = 4 if self.store_dtype == "int8" else 0
        return sum(len(group.sites) * (group.width * size + scales) for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """Assignment of samples to units.

    Attributes:
        sample_starts: first sample of each unit, followed by the number of samples.
        unit_tokens: number of tokens of each unit.
    """

    sample_starts: tuple[int, ...]
    unit_tokens: tuple[int, ...]

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.unit_tokens)

    def samples(self, unit: int) -> range:
        """Samples of a unit."""
        return range(self.sample_starts[unit], self.sample_starts[unit + 1])


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """Commit record of a unit.

    Attributes:
        store: `store_digest` of the store it belongs to.
        unit: number of the unit.
        n_tokens: number of rows.
        sample_start: number of its first sample.
        sample_ids: `example_id` of each sample.
        sample_tokens: number of tokens of each sample.
        files: its shards and its moments.
        answer_tokens: number of answer tokens at the end of each sample; empty before schema 2.1.
    """

    store: str
    unit: int
    n_tokens: int
    sample_start: int
    sample_ids: tuple[str, ...]
    sample_tokens: tuple[int, ...]
    files: tuple[FileRecord, ...]
    answer_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UnitEntry:
    """A unit in the manifest.

    Attributes:
        unit: number of the unit.
        n_tokens: number of rows.
        sample_start: number of its first sample.
        n_samples: number of samples.
        files: its commit record, its shards and its moments.
    """

    unit: int
    n_tokens: int
    sample_start: int
    n_samples: int
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class QuantisationError:
    """Rounding error of the stored type at a site, as fraction of variance unexplained.

    Attributes:
        fvu: squared error over squared deviation from the mean, pooled over channels.
        fvu_p99: 99th percentile of the same per channel; pooling hides large errors of small channels.
    """

    fvu: float
    fvu_p99: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every file of a complete store.

    Attributes:
        spec: contents of the store.
        units: its units in order, all committed.
        files: all files that belong to no unit, except the manifest.
        quantisation: rounding error of the stored type by site.
    """

    spec: StoreSpec
    units: tuple[UnitEntry, ...]
    files: tuple[FileRecord, ...]
    quantisation: Mapping[str, QuantisationError]

    @property
    def all_files(self) -> tuple[FileRecord, ...]:
        """All files of the store except the manifest."""
        return (*self.files, *(file for unit in self.units for file in unit.files))
