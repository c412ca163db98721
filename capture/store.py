"""The activation store: what it consists of, and how it is opened.

    <store>/
      store.json                  what is captured: model, sites, types, sizes, seed, source (schema_version first)
      plan.json                   which samples each unit holds; decided once, before the first forward pass
      data.zarr/                  the arrays, see `clt.capture.shard`
      units/stats/000042.safetensors   float64 moments of unit 42
      units/commits/000042.json   unit 42 exists: its samples, and size and crc32c of each of its files; written last
      manifest.json               the store is complete: all of the above in one file; its hash is the store's id

Only a store with a manifest is opened. `clt.capture.writer` makes stores, `clt.capture.loader` reads them for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clt.capture.files import check_file
from clt.capture.moments import Moments
from clt.capture.schema import Manifest, layout_of, parse, read_json, stats_path, store_id
from clt.capture.shard import ArrayReader
from clt.errors import StoreError
from clt.records import ModelIdentity, SiteStats, TokenTable


def open_store(path: str | Path) -> ActivationStore:
    """Opens a complete store for reading.

    Args:
        path: folder that `capture` wrote.

    Returns:
        The store; existence and size of every file are checked, contents are checked when they are read.

    Raises:
        StoreError: there is no store, its capture has not finished, or a file is missing, truncated or damaged.
    """
    root = Path(path)
    if not (root / "store.json").is_file():
        raise StoreError(f"{root}: no activation store here; check the path or run the capture first")
    manifest_file = root / "manifest.json"
    if not manifest_file.is_file():
        raise StoreError(f"{root}: the capture has not finished (no manifest.json); run the same capture again")
    tree = read_json(manifest_file)
    manifest = parse(Manifest, tree, manifest_file)
    if tree.get("id") != store_id(manifest):
        raise StoreError(f"{manifest_file}: contents do not match the store's id; restore it or capture again")
    for record in manifest.metadata:
        check_file(root, record, contents=True)
    for unit in manifest.units:
        for record in unit.files:
            check_file(root, record)
    return ActivationStore(root, manifest)


class ActivationStore:
    """A complete store, read only; made by `open_store`.

    Attributes:
        path: its folder.
        id: hash of its contents.
        spec: what it holds.
        units: its units in order.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.id = store_id(manifest)
        self.spec = manifest.spec
        self.units = manifest.units
        self._files = {record.path: record for unit in manifest.units for record in unit.files}
        self._reader = ArrayReader(path, layout_of(manifest.spec, len(manifest.units)), self._files)

    @property
    def model(self) -> ModelIdentity:
        """Whose activations these are."""
        return self.spec.model

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the stored sites."""
        return self.spec.sites

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return self.spec.model.n_layers

    @property
    def d_model(self) -> int:
        """Channels of every site."""
        return self.spec.model.d_model

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in the store; padding was never stored."""
        return sum(unit.n_tokens for unit in self.units)

    def site_index(self, sites: Sequence[str]) -> list[int]:
        """Positions of sites on the site axis.

        Args:
            sites: names.

        Returns:
            One number per name.

        Raises:
            StoreError: a site is not stored.
        """
        missing = [site for site in sites if site not in self.sites]
        if missing:
            raise StoreError(f"{self.path}: site '{missing[0]}' is not stored; it holds {', '.join(self.sites)}")
        return [self.sites.index(site) for site in sites]

    def read(self, unit: int, start: int, stop: int, sites: Sequence[str]) -> Tensor:
        """Activations of neighbouring rows of a unit.

        Args:
            unit: number of the unit.
            start: first row within the unit, in the order of storage.
            stop: one past the last row.
            sites: names.

        Returns:
            [stop - start, len(sites), d_model] in the stored type; token first, as on disk.

        Raises:
            StoreError: a site is not stored, or the shard is missing, truncated or damaged.
        """
        return self._reader.acts(unit, start, stop, self.site_index(sites))

    def tokens(self, unit: int) -> TokenTable:
        """Where the tokens of a unit come from, [n_tokens] in the order of storage."""
        return TokenTable(**{f.name: self._token_array(unit, f.name) for f in fields(TokenTable)})

    def modality(self, unit: int) -> Tensor:
        """[n_tokens] uint8: what the tokens of a unit are, a `Modality`."""
        return self._token_array(unit, "modality")

    def natural_index(self, unit: int) -> Tensor:
        """[n_tokens] int64: row of each stored token when the unit's samples are laid end to end."""
        return self._token_array(unit, "natural_index").long()

    def _token_array(self, unit: int, name: str) -> Tensor:
        return torch.from_numpy(self._reader.tokens(unit, self.units[unit].n_tokens, name))

    def stats(self, sites: Sequence[str], drop_bos: bool) -> SiteStats:
        """Moments of sites over all tokens of the store.

        Args:
            sites: names.
            drop_bos: leave out the beginning-of-sequence tokens.

        Returns:
            Count, mean and rms; the units' float64 moments merged in unit order, so always the same bits.

        Raises:
            StoreError: a site is not stored, or a statistics file is damaged.
        """
        index = self.site_index(sites)
        total: Moments | None = None
        for unit in self.units:
            record = self._files[stats_path(unit.unit)]
            check_file(self.path, record, contents=True)
            part = Moments.load(self.path / record.path, drop_bos).select(index)
            total = part if total is None else total.merge(part)
        assert total is not None, "a store has at least one unit"
        return total.summary()
