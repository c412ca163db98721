"""Records of the activation store: what its JSON files say, and how they are read and written.

A store is described by `StoreSpec` (store.json), `CapturePlan` (plan.json), one `UnitRecord` per committed unit and the
`Manifest` that joins them; `clt.capture.store` shows the tree.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from clt.capture.files import FileRecord
from clt.capture.shard import ArrayLayout, StoreDtype
from clt.errors import StoreError
from clt.records import ModelIdentity

T = TypeVar("T")

SCHEMA_VERSION = "1.0"


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds, decided before the first unit is captured.

    Attributes:
        schema_version: "major.minor"; readers accept their own major.
        model: whose activations these are.
        model_dtype: floating-point type the model ran in.
        sites: site names, in the order of the site axis.
        store_dtype: type of the stored values.
        rows_per_unit: rows that a unit owns.
        chunk_tokens: rows of an inner chunk, what is read together.
        batch_size: prompts per forward pass; it decides the last bits of the activations.
        seed: seed of the order of rows within units.
        source: hex digest of the examples.
    """

    schema_version: str
    model: ModelIdentity
    model_dtype: str
    sites: tuple[str, ...]
    store_dtype: StoreDtype
    rows_per_unit: int
    chunk_tokens: int
    batch_size: int
    seed: int
    source: str


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
        unit: its number.
        n_tokens: rows it holds.
        sample_start: number of its first sample.
        sample_ids: `example_id` of its samples.
        sample_tokens: tokens of its samples.
        files: its shards and its statistics.
    """

    unit: int
    n_tokens: int
    sample_start: int
    sample_ids: tuple[str, ...]
    sample_tokens: tuple[int, ...]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that makes up a complete store.

    Attributes:
        spec: what it holds.
        units: its units in order, all committed.
        metadata: the Zarr metadata files.
    """

    spec: StoreSpec
    units: tuple[UnitRecord, ...]
    metadata: tuple[FileRecord, ...]


def layout_of(spec: StoreSpec, n_units: int) -> ArrayLayout:
    """Shapes and types of the arrays of a store."""
    return ArrayLayout(
        sites=spec.sites,
        d_model=spec.model.d_model,
        store_dtype=spec.store_dtype,
        n_units=n_units,
        rows_per_unit=spec.rows_per_unit,
        chunk_tokens=spec.chunk_tokens,
    )


def commit_path(unit: int) -> str:
    """Commit record of a unit, relative to the store."""
    return f"units/commits/{unit:06d}.json"


def stats_path(unit: int) -> str:
    """Moments of a unit, relative to the store."""
    return f"units/stats/{unit:06d}.safetensors"


def to_json(record: Any) -> str:
    """A record as JSON text, the same text for the same record."""
    return json.dumps(asdict(record), indent=1)


def store_id(manifest: Manifest) -> str:
    """Hash of all that a store consists of: the manifest holds the checksum of every file."""
    return hashlib.sha256(to_json(manifest).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a store.

    Args:
        path: the file.

    Returns:
        Its tree, the schema version checked.

    Raises:
        StoreError: the file is missing or damaged, or its schema has another major version.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not readable ({' '.join(str(error).split())}); restore it") from None
    if not isinstance(tree, dict):
        raise StoreError(f"{path}: expected a JSON object; restore it or capture again")
    spec = tree.get("spec", tree)
    version = str(spec.get("schema_version", SCHEMA_VERSION)) if isinstance(spec, dict) else ""
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise StoreError(f"{path}: store schema '{version}', this program reads {SCHEMA_VERSION}; capture again")
    return tree


def parse(cls: type[T], tree: dict[str, Any], path: Path) -> T:
    """A record from the tree of a JSON file; unknown keys are ignored.

    Args:
        cls: dataclass of the record.
        tree: from `read_json`.
        path: for the error message.

    Returns:
        The record.

    Raises:
        StoreError: a key is missing or holds something else.
    """
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise StoreError(f"{path}: damaged at '{key}' ({first['msg']}); restore it or capture again") from None
