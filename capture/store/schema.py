"""Records of the activation store: what its JSON files say.

A store is described by `StoreSpec` (store.json), `CapturePlan` (plan.json), one `UnitRecord` per committed unit and the
`Manifest` that joins them; `clt.capture.reading.open_store` shows the tree.
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
#: Classes of tokens that have statistics of their own, in the order of `Modality`; padding is never stored.
TOKEN_CLASSES = ("text", "image", "image_special", "bos")


@dataclass(frozen=True, kw_only=True)
class SiteGroup:
    """Sites of equal width, which share an array.

    Attributes:
        name: of the array.
        sites: site names, in the order of the site axis.
        width: channels of every site.
    """

    name: str
    sites: tuple[str, ...]
    width: int


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds, decided before the first unit is captured.

    Attributes:
        schema_version: "major.minor"; readers accept their own major.
        created_by: versions of the software that began the store.
        model: whose activations these are.
        model_dtype: floating-point type the model ran in.
        groups: the sites.
        store_dtype: type of the stored values.
        compression: of the stored values.
        rows_per_unit: rows that a unit owns, a multiple of `chunk_tokens`.
        chunk_tokens: rows of an inner chunk, what is read together.
        batch_size: prompts per forward pass; it decides the last bits of the activations.
        seed: seed of the order of rows within units.
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
    """Which samples each unit holds.

    Attributes:
        sample_starts: first sample of each unit, and the number of samples at the end.
        unit_tokens: tokens of each unit.
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
    """A committed unit.

    Attributes:
        store: `store_digest` of the store it belongs to.
        unit: its number.
        n_tokens: rows it holds.
        sample_start: number of its first sample.
        sample_ids: `example_id` of its samples.
        sample_tokens: tokens of its samples.
        files: its shards and its statistics.
        answer_tokens: of its samples, the number of their last tokens that are an answer; empty before schema 2.1.
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
    """What the manifest says of a unit.

    Attributes:
        unit: its number.
        n_tokens: rows it holds.
        sample_start: number of its first sample.
        n_samples: samples it holds.
        files: its commit record, its shards and its statistics.
    """

    unit: int
    n_tokens: int
    sample_start: int
    n_samples: int
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class QuantisationError:
    """What rounding to the stored type cost at a site, as a fraction of the variance.

    Attributes:
        fvu: squared error over squared deviation from the mean, pooled over channels.
        fvu_p99: the same of single channels, their 99th percentile; pooling hides small channels that are ruined.
    """

    fvu: float
    fvu_p99: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that makes up a complete store.

    Attributes:
        spec: what it holds.
        units: its units in order, all committed.
        files: all files that belong to no unit, but the manifest itself.
        quantisation: error of the stored type by site.
    """

    spec: StoreSpec
    units: tuple[UnitEntry, ...]
    files: tuple[FileRecord, ...]
    quantisation: Mapping[str, QuantisationError]
