"""Read access to a store: blocks for the loader; samples, tokens and statistics for analysis."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.reading.token_filter import filtered_moments
from clt.capture.storage.base import Storage
from clt.capture.storage.local import LocalStorage
from clt.capture.store.arrays import DATA, TOKEN_DTYPES, ArraySpec
from clt.capture.store.committed_units import merged_moments, stored_moments
from clt.capture.store.file_records import FileRecord, check_contents, read_checked
from clt.capture.store.json_files import unsealed
from clt.capture.store.layout import StoreArrays, commit_path
from clt.capture.store.moments import Moments
from clt.capture.store.quantise import Standardiser, unpack_standardisers
from clt.capture.store.schema import QUANTISATION, TOKEN_CLASSES, Manifest, SiteGroup, UnitRecord
from clt.capture.store.shard import ShardReader
from clt.capture.store.shard_rows import TORCH_DTYPES, read_rows, values_of
from clt.errors import StoreError
from clt.records import ModelIdentity, SiteStats, TokenTable

if TYPE_CHECKING:
    import zarr

    from clt.capture.reading.token_filter import TokenFilter


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """Activations of one sample, its tokens in the order of the prompt.

    Attributes:
        sample: number of the sample.
        example_id: its id in the source.
        acts: [s,T,D] at the requested sites; float32 for int8 stores, else the stored type.
        tokens: [T] origin of each token.
        answer_tokens: number of answer tokens at its end; 0 in stores of schema 2.0, which do not record it.
    """

    sample: int
    example_id: str
    acts: Tensor
    tokens: TokenTable
    answer_tokens: int


class ActivationStore:
    """A store opened for reading by `open_store`; can be shared by threads, forked and pickled.

    Attributes:
        location: folder or URL.
        storage: its files.
        id: hash of its contents.
        manifest: every file of the store.
        spec: contents of the store.
        units: its units, ascending; those of `open_committed` need not start at 0 or be consecutive.
    """

    def __init__(self, storage: Storage, store_id: str, manifest: Manifest) -> None:
        self.storage, self.id, self.manifest = storage, store_id, manifest
        self.location, self.spec, self.units = storage.url, manifest.spec, manifest.units
        self._arrays = StoreArrays(manifest.spec, len(manifest.units))
        self._acts = {group.name: self._arrays.acts(group) for group in self.spec.groups}
        self._tokens = {name: self._arrays.token(name) for name in TOKEN_DTYPES}
        self._files: dict[str, FileRecord] = {record.path: record for record in manifest.all_files}
        self._n_tokens = {entry.unit: entry.n_tokens for entry in self.units}
        self._readers: dict[str, ShardReader] = {}
        self._moments: dict[str, Moments] = {}

    def __repr__(self) -> str:
        return (
            f"ActivationStore(id={self.id[:12]}, model={self.model.name!r}, tokens={self.num_tokens}, "
            f"sites={len(self.sites)}, dtype={self.spec.store_dtype}, location={self.location!r})"
        )

    @property
    def model(self) -> ModelIdentity:
        """Model whose activations are stored."""
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
        """Width of the model's residual stream."""
        return self.spec.model.d_model

    @property
    def stored_dtype(self) -> torch.dtype:
        """Type of the stored values."""
        return TORCH_DTYPES[self.spec.store_dtype]

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in the store; padding is never stored."""
        return sum(unit.n_tokens for unit in self.units)

    def n_tokens(self, unit: int) -> int:
        """Number of rows of a unit."""
        return self._n_tokens[unit]

    def place(self, sites: Sequence[str]) -> tuple[str, list[int]]:
        """The array that holds some sites.

        Args:
            sites: names, all of the same group.

        Returns:
            Name of the group, and the positions on its site axis.

        Raises:
            StoreError: a site is not stored, or the sites are of different groups.
        """
        missing = [site for site in sites if site not in self.sites]
        if missing:
            raise StoreError(f"{self.location}: site '{missing[0]}' is not stored; it holds {', '.join(self.sites)}")
        homes = {site: group for group in self.spec.groups for site in group.sites}
        groups = {homes[site].name: homes[site] for site in sites} or {g.name: g for g in self.spec.groups[:1]}
        if len(groups) > 1:
            raise StoreError(
                f"{self.location}: sites of groups {' and '.join(groups)} differ in width; read them apart"
            )
        ((name, group),) = groups.items()
        return name, [group.sites.index(site) for site in sites]

    def read_block_into(self, unit: int, block: int, group: str, sites: Sequence[int], out: NDArray[Any]) -> None:
        """Reads C = chunk_tokens rows of some sites and verifies checksums; adjacent sites are one read.

        Args:
            unit: number of the unit.
            block: selects rows [block C, (block + 1) C) of the unit, in the stored order.
            group: name of the site group.
            sites: positions on its site axis, in output order.
            out: [len(sites), C, width] stored bits, bfloat16 as uint16; rows past the unit's last become zero.

        Raises:
            StoreError: the shard is missing, truncated or damaged.
        """
        array = self._acts[group]
        reader = self._reader(array, unit)
        begin = 0
        for end in range(1, len(sites) + 1):
            if end == len(sites) or sites[end] != sites[end - 1] + 1:
                first = block * array.chunks_per_row + sites[begin]
                reader.read_into(first, [out[i, :, None] for i in range(begin, end)])
                begin = end

    def read_scales_into(self, unit: int, block: int, group: str, out: NDArray[Any]) -> None:
        """Reads the scales of a block of an int8 store.

        Args:
            unit: number of the unit.
            block: as for `read_block_into`.
            group: name of the site group.
            out: [C, S] float32, written.

        Raises:
            StoreError: the shard is missing, truncated or damaged.
        """
        self._reader(self._arrays.scales(self._group(group)), unit).read_into(block, [out])

    def standardiser(self, group: str) -> Standardiser:
        """Fixed moments of a site group of an int8 store."""
        return self._standardisers[group]

    def read(self, unit: int, start: int, stop: int, sites: Sequence[str]) -> Tensor:
        """Activations of consecutive rows of a unit.

        Args:
            unit: number of the unit.
            start: first row within the unit, in the stored order.
            stop: one past the last row.
            sites: names, of one group.

        Returns:
            [stop - start, len(sites), width] float32 for int8 stores, else in the stored type; token first.

        Raises:
            StoreError: a site is not stored, or the shard is missing, truncated or damaged.
        """
        name, index = self.place(sites)
        array, size = self._acts[name], self.spec.chunk_tokens
        blocks = range(start // size, -(-stop // size))
        raw = np.empty((len(blocks), len(index), size, self._group(name).width), array.dtype)
        for i, block in enumerate(blocks):
            self.read_block_into(unit, block, name, index, raw[i])
        window = slice(start - blocks.start * size, stop - blocks.start * size)
        rows = np.moveaxis(raw, 1, 2).reshape(-1, len(index), raw.shape[-1])[window]
        values = values_of(rows, self.spec.store_dtype)
        if self.spec.store_dtype != "int8":
            return values
        scales = np.empty((len(blocks), size, len(self._group(name).sites)), np.float32)
        for i, block in enumerate(blocks):
            self.read_scales_into(unit, block, name, scales[i])
        mine = torch.from_numpy(scales.reshape(-1, scales.shape[-1])[window][:, index])
        return self.standardiser(name).restore(values, mine, index)

    def read_unit(self, unit: int, sites: Sequence[str]) -> Tensor:
        """All rows of a unit [n_tokens, len(sites), width] in natural order: its samples laid end to end."""
        stored = self.read(unit, 0, self._n_tokens[unit], sites)
        return torch.empty_like(stored).index_copy_(0, self.natural_index(unit), stored)

    def token_block(self, unit: int, block: int) -> dict[str, NDArray[Any]]:
        """Token columns, named as in `TOKEN_DTYPES`, of the filled rows of a block."""
        size = self.spec.chunk_tokens
        filled = min(size, self._n_tokens[unit] - block * size)
        columns = {name: np.empty(size, dtype) for name, dtype in TOKEN_DTYPES.items()}
        for name, column in columns.items():
            self._reader(self._tokens[name], unit).read_into(block, [column])
        return {name: column[:filled] for name, column in columns.items()}

    def tokens(self, unit: int) -> TokenTable:
        """Origin of the tokens of a unit, [n_tokens] in the stored order."""
        return TokenTable(**{f.name: torch.from_numpy(self._column(unit, f.name)) for f in fields(TokenTable)})

    def modality(self, unit: int) -> Tensor:
        """[n_tokens] uint8: `Modality` of the tokens of a unit, in the stored order."""
        return torch.from_numpy(self._column(unit, "modality"))

    def natural_index(self, unit: int) -> Tensor:
        """[n_tokens] int64: natural row of each stored token, its row when the unit's samples are laid end to end."""
        return torch.from_numpy(self._column(unit, "natural_index").astype(np.int64))

    def norms(self, unit: int, group: str) -> Tensor:
        """[n_tokens, S] float32: Euclidean norm of each token at each site of a group, in the stored order."""
        array = self._arrays.norms(self._group(group))
        return torch.from_numpy(read_rows(self._reader(array, unit), array, self._n_tokens[unit]))

    def commit(self, unit: int) -> UnitRecord:
        """Commit record of a unit, with the ids and lengths of its samples."""
        path = commit_path(unit)
        return unsealed(UnitRecord, read_checked(self.storage, self._files[path]), self.storage.name(path))[1]

    def samples(self, unit: int, sites: Sequence[str]) -> Iterator[SampleView]:
        """All samples of a unit in order; the unit is read at once.

        Args:
            unit: number of the unit.
            sites: names, of one group.

        Yields:
            One view per sample.

        Raises:
            StoreError: a site is not stored, or a file is missing or damaged.
        """
        record = self.commit(unit)
        acts = self.read_unit(unit, sites)
        tokens = self.tokens(unit).select(torch.argsort(self.natural_index(unit)))
        ends = list(itertools.accumulate(record.sample_tokens))
        for i, (stop, length) in enumerate(zip(ends, record.sample_tokens, strict=True)):
            rows = slice(stop - length, stop)
            yield SampleView(
                sample=record.sample_start + i,
                example_id=record.sample_ids[i],
                acts=acts[rows].transpose(0, 1),
                tokens=tokens.select(rows),
                answer_tokens=record.answer_tokens[i] if record.answer_tokens else 0,
            )

    def sample(self, sample: int | str, sites: Sequence[str]) -> SampleView:
        """One sample; reads its whole unit, because rows are permuted within units.

        Args:
            sample: its number, or its `example_id`, which is searched in the commit records in order.
            sites: names, of one group.

        Raises:
            StoreError: there is no such sample.
        """
        for unit in self.units:
            known = (
                self.commit(unit.unit).sample_ids
                if isinstance(sample, str)
                else range(unit.sample_start, unit.sample_start + unit.n_samples)
            )
            if sample in known:
                views = self.samples(unit.unit, sites)
                return next(view for view in views if sample in (view.sample, view.example_id))
        raise StoreError(f"{self.location}: holds no sample {sample!r}; samples are numbered from 0")

    def moments(self, group: str) -> Moments:
        """Moments of all sites of a group over the whole store, by token class."""
        if group not in self._moments:
            stored = stored_moments(self.storage, self._group(group), self._files)
            if stored is not None:
                self._moments[group] = stored
            else:
                self._moments |= merged_moments(self.storage, self.units, self.spec.groups)
        return self._moments[group]

    def mean_norms(self, group: str) -> Tensor:
        """[S] float64: mean norm at each site over all tokens except beginning-of-sequence tokens."""
        total = self.moments(group).over([c for c, name in enumerate(TOKEN_CLASSES) if name != "bos"])
        return total.norm[0] / total.count.clamp_min(1)

    def stats(self, sites: Sequence[str], where: TokenFilter | None = None) -> SiteStats:
        """Count, mean and rms of sites over the tokens that pass a filter.

        Args:
            sites: names, of one group.
            where: token filter; default: all tokens. A norm cap costs a pass over the store.

        Returns:
            Count, mean [s,D] and rms [s] in float64, merged in unit order and therefore bit-reproducible.

        Raises:
            StoreError: a site is not stored, or a file is missing or damaged.
        """
        name, index = self.place(sites)
        if where is not None and where.norm_cap is not None:
            return filtered_moments(self, sites, where).stats([0])
        classes = range(len(TOKEN_CLASSES)) if where is None else where.classes
        return self.moments(name).select(index).stats(classes)

    @property
    def zarr(self) -> zarr.Group:
        """The store as a read-only group of zarr-python, after checking its metadata files."""
        import zarr

        for record in self.manifest.files:
            if record.path.endswith("zarr.json"):
                check_contents(self.storage, record)
        if isinstance(self.storage, LocalStorage):
            return zarr.open_group(self.storage.name(DATA), mode="r")
        from clt.capture.storage.object_store import ObjectStorage

        assert isinstance(self.storage, ObjectStorage)
        return zarr.open_group(zarr.storage.ObjectStore(self.storage.store, read_only=True), path=DATA, mode="r")

    @cached_property
    def _standardisers(self) -> dict[str, Standardiser]:
        contents = read_checked(self.storage, self._files[QUANTISATION])
        return unpack_standardisers(contents, self.storage.name(QUANTISATION))

    def _column(self, unit: int, name: str) -> NDArray[Any]:
        array = self._tokens[name]
        return read_rows(self._reader(array, unit), array, self._n_tokens[unit])

    def _group(self, name: str) -> SiteGroup:
        return next(group for group in self.spec.groups if group.name == name)

    def _reader(self, array: ArraySpec, unit: int) -> ShardReader:
        key = array.shard(unit)
        reader = self._readers.get(key)
        if reader is None:
            reader = self._readers[key] = ShardReader(self.storage, array, unit, self._files[key].bytes)
        return reader
