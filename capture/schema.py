"""Records of the activation store: what its JSON files say, and how they are read and written.

A store is described by `StoreSpec` (store.json), `CapturePlan` (plan.json), one `UnitRecord` per committed unit and the
`Manifest` that joins them; `clt.capture.store` shows the tree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from clt.capture.arrays import DATA, TOKEN_DTYPES, TOKENS, ArraySpec, Compression
from clt.capture.files import FileRecord
from clt.capture.storage_base import Storage
from clt.errors import StoreError
from clt.records import ModelIdentity

T = TypeVar("T")

StoreDtype = Literal["bfloat16", "float32", "int8"]

SCHEMA_VERSION = "2.0"
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
    """

    store: str
    unit: int
    n_tokens: int
    sample_start: int
    sample_ids: tuple[str, ...]
    sample_tokens: tuple[int, ...]
    files: tuple[FileRecord, ...]


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


@dataclass(frozen=True)
class StoreArrays:
    """The arrays of a store, from its spec."""

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
        """What is known about each token, one of `TOKEN_DTYPES`."""
        return self._array(f"{TOKENS}/{name}", TOKEN_DTYPES[name], (), ())

    def per_unit(self) -> tuple[ArraySpec, ...]:
        """All arrays of which every unit owns a shard, in the order in which they are published."""
        groups = self.spec.groups
        scales = [self.scales(group) for group in groups] if self.spec.store_dtype == "int8" else []
        acts = [array for group in groups for array in (self.acts(group), self.norms(group))]
        return (*scales, *acts, *(self.token(name) for name in TOKEN_DTYPES))

    def folders(self) -> tuple[str, ...]:
        """Keys of the Zarr groups."""
        arrays = sorted({array.key.rpartition("/")[0] for array in self.per_unit()} | {f"{DATA}/stats"})
        return (DATA, *arrays, *(f"{DATA}/stats/{group.name}" for group in self.spec.groups))

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
    """Commit record of a unit."""
    return f"units/commits/{unit:06d}.json"


def stats_path(unit: int) -> str:
    """Moments of a unit."""
    return f"units/stats/{unit:06d}.safetensors"


def to_json(record: Any) -> bytes:
    """A record as JSON text, the same text for the same record."""
    return json.dumps(asdict(record), indent=1).encode()


def store_digest(spec: StoreSpec, plan: CapturePlan) -> str:
    """Hash of what a store is to hold; every commit record carries it, so that none strays into another store."""
    return hashlib.sha256(to_json(spec) + to_json(plan)).hexdigest()


def manifest_text(manifest: Manifest) -> tuple[str, bytes]:
    """Id of a store and contents of its manifest file: the id is the hash of the rest of the file, byte for byte."""
    body = json.dumps(asdict(manifest), separators=(",", ":"))
    store_id = hashlib.sha256(body.encode()).hexdigest()
    return store_id, (_HEAD % store_id + body + _TAIL).encode()


def read_manifest(storage: Storage) -> tuple[str, Manifest]:
    """Id and manifest of a complete store.

    Raises:
        StoreError: the file is missing or damaged, or of another major version.
    """
    name = storage.name(MANIFEST)
    contents = storage.read(MANIFEST)
    head, tail = len(_HEAD % ("0" * 64)), len(_TAIL)
    body = contents[head:-tail]
    store_id = hashlib.sha256(body).hexdigest()
    if contents != (_HEAD % store_id).encode() + body + _TAIL.encode():
        _check_version(contents, name)
        raise StoreError(f"{name}: contents do not match their hash; restore it or run 'clt store repair'")
    return store_id, parse(Manifest, body, name)


_HEAD, _TAIL = '{"id": "%s", "manifest": ', "}\n"


def parse(cls: type[T], contents: bytes, name: str) -> T:
    """A record from a JSON file; unknown keys are ignored.

    Args:
        cls: dataclass of the record.
        contents: of the file.
        name: of the file, for error messages.

    Returns:
        The record.

    Raises:
        StoreError: the file is damaged, or its schema has another major version.
    """
    _check_version(contents, name)
    try:
        return _adapter(cls).validate_json(contents)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        message = " ".join(str(first["msg"]).split())
        raise StoreError(f"{name}: damaged at '{key}' ({message}); restore it or run 'clt store repair'") from None


def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _check_version(contents: bytes, name: str) -> None:
    """Says plainly that a file is of another major version, before its missing keys are called damage."""
    try:
        tree = json.loads(contents)
    except ValueError:
        return
    for key in ("manifest", "spec"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    version = str(tree.get("schema_version", SCHEMA_VERSION)) if isinstance(tree, dict) else SCHEMA_VERSION
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise StoreError(f"{name}: store schema '{version}', this program reads {SCHEMA_VERSION}; capture again")
