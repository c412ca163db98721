"""A store as a list of blocks, its units of reading, for the loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.store.arrays import TOKEN_DTYPES
from clt.capture.store.quantise import Standardiser
from clt.errors import StoreError
from clt.records import TokenTable

#: Stores up to this number of tokens keep their token columns, about 20 bytes per token, in memory once read: with
#: small rows, reading eight columns block by block costs a quarter as much as reading the activations.
_KEPT_TOKENS = 8_000_000


class BlockSource(Protocol):
    """Blocks of rows; every method may be called by several threads at once.

    Attributes:
        rows: [blocks] int64, number of rows of each block that pass the filter.
        chunk_tokens: C, rows of a block in memory.
        n_sites: S.
        width: D.
        dtype: stored type: torch.bfloat16, torch.float32 or torch.int8.
        standardiser: moments [S,D] to restore int8 values; None for the other types.
    """

    rows: NDArray[np.int64]
    chunk_tokens: int
    n_sites: int
    width: int
    dtype: torch.dtype
    standardiser: Standardiser | None

    def kept(self, block: int) -> NDArray[np.int64] | None:
        """Ascending numbers of the rows of a block that pass the filter; None for the first `rows[block]` rows."""

    def read_into(self, block: int, acts: NDArray[Any], scales: NDArray[np.float32] | None) -> None:
        """Reads a block.

        Args:
            block: number of the block.
            acts: [S,C,D] stored bits, bfloat16 as uint16, written; each [C,D] is contiguous.
            scales: [S,C] for int8, written; else None.

        Raises:
            StoreError: a shard is missing, truncated or damaged.
        """

    def tokens(self, block: int) -> Mapping[str, NDArray[Any]]:
        """Columns of all rows of a block, named as the fields of `TokenTable`."""


class StoreBlocks:
    """Blocks of a store, of chunk_tokens rows each except the last of a unit; a `BlockSource`.

    Args:
        store: the store.
        x_sites: first sites on the site axis.
        y_sites: sites that follow them; may be of another group of the same width.
        where: token filter; evaluated here once and kept as one bit per token.

    Attributes:
        kept_bytes: bytes of the token columns kept in memory; 0 if they are not kept.

    Raises:
        StoreError: a site is not stored, the widths differ, or a token array cannot be read.
    """

    def __init__(
        self, store: ActivationStore, x_sites: Sequence[str], y_sites: Sequence[str], where: TokenFilter
    ) -> None:
        self._store = store
        self._parts = _place(store, x_sites, y_sites)
        self.chunk_tokens = store.spec.chunk_tokens
        self.n_sites = len(x_sites) + len(y_sites)
        self.width = _width(store, self._parts)
        self.dtype = store.stored_dtype
        self.standardiser = _standardiser(store, self._parts) if self.dtype == torch.int8 else None
        columns = sum(np.dtype(TOKEN_DTYPES[field.name]).itemsize for field in fields(TokenTable))
        self.kept_bytes = store.num_tokens * columns if store.num_tokens <= _KEPT_TOKENS else 0
        self._columns: dict[int, dict[str, NDArray[Any]]] = {}
        self._bits: dict[int, NDArray[np.uint8] | None] = {}
        rows = [self._plan(unit.unit, unit.n_tokens, where) for unit in store.units]
        self._first_block = np.cumsum([0, *map(len, rows)])
        self.rows: NDArray[np.int64] = np.concatenate(rows)

    def kept(self, block: int) -> NDArray[np.int64] | None:
        """Implements `BlockSource.kept`."""
        unit, within = self._place_of(block)
        bits = self._bits[unit]
        return None if bits is None else np.flatnonzero(np.unpackbits(bits[within], count=self.chunk_tokens))

    def read_into(self, block: int, acts: NDArray[Any], scales: NDArray[np.float32] | None) -> None:
        """Implements `BlockSource.read_into`."""
        unit, within = self._place_of(block)
        for group, sites, mine in self._parts:
            self._store.read_block_into(unit, within, group, sites, acts[mine])
            if scales is not None:
                scales[mine] = self._read_scales(unit, within, group)[:, sites].T

    def tokens(self, block: int) -> Mapping[str, NDArray[Any]]:
        """Implements `BlockSource.tokens`."""
        unit, within = self._place_of(block)
        if not self.kept_bytes:
            return self._store.token_block(unit, within)
        columns = self._columns.get(unit)
        if columns is None:
            table = self._store.tokens(unit)
            columns = self._columns[unit] = {f.name: getattr(table, f.name).numpy() for f in fields(table)}
        rows = slice(within * self.chunk_tokens, (within + 1) * self.chunk_tokens)
        return {name: column[rows] for name, column in columns.items()}

    def _plan(self, unit: int, n_tokens: int, where: TokenFilter) -> NDArray[np.int64]:
        """Number of rows of each block of a unit that pass the filter."""
        n_blocks = -(-n_tokens // self.chunk_tokens)
        keep = where.keep(self._store, unit)
        mask = np.zeros(n_blocks * self.chunk_tokens, dtype=np.bool_)
        mask[:n_tokens] = True if keep is None else keep
        by_block = mask.reshape(n_blocks, self.chunk_tokens)
        self._bits[unit] = None if keep is None else np.packbits(by_block, axis=1)
        return by_block.sum(axis=1, dtype=np.int64)

    def _place_of(self, block: int) -> tuple[int, int]:
        """Unit of a block, and the block's number within it."""
        position = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return self._store.units[position].unit, block - int(self._first_block[position])

    def _read_scales(self, unit: int, block: int, group: str) -> NDArray[np.float32]:
        n_sites = next(len(g.sites) for g in self._store.spec.groups if g.name == group)
        scales = np.empty((self.chunk_tokens, n_sites), dtype=np.float32)
        self._store.read_scales_into(unit, block, group, scales)
        return scales


#: Group, positions on its site axis, and the destination of these sites on the site axis of the block.
_Part = tuple[str, list[int], slice]


def _place(store: ActivationStore, x_sites: Sequence[str], y_sites: Sequence[str]) -> list[_Part]:
    """The groups that hold some sites; a single part, read in one piece, if all sites are of one group."""
    parts: list[_Part] = []
    for sites in filter(None, (x_sites, y_sites)):
        group, numbers = store.place(sites)
        start = parts[-1][2].stop if parts else 0
        if parts and parts[-1][0] == group:
            group, before, where = parts.pop()
            numbers, start = before + numbers, where.start
        parts.append((group, numbers, slice(start, start + len(numbers))))
    return parts


def _width(store: ActivationStore, parts: Sequence[_Part]) -> int:
    widths = {group.name: group.width for group in store.spec.groups}
    found = {widths[group] for group, _, _ in parts}
    if len(found) != 1:
        raise StoreError(
            f"{store.location}: sites of groups {' and '.join(group for group, _, _ in parts) or '(none)'} have no "
            f"common width; read them with loaders of their own"
        )
    return found.pop()


def _standardiser(store: ActivationStore, parts: Sequence[_Part]) -> Standardiser:
    moments = [(store.standardiser(group), sites) for group, sites, _ in parts]
    return Standardiser(
        mean=torch.cat([fixed.mean[sites] for fixed, sites in moments]),
        std=torch.cat([fixed.std[sites] for fixed, sites in moments]),
    )
