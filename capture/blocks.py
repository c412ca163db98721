"""A store as a list of blocks, the pieces that are read together; used by the loader."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.shard import TOKEN_DTYPES
from clt.capture.store import ActivationStore
from clt.records import Modality, TokenTable

#: Tokens whose tables are kept in memory, about 20 bytes each.
_CACHED_TOKENS = 8_000_000
#: Activations [rows, sites, D] in the stored type, and the fields of `TokenTable` as columns [rows, 7] int64.
Part = tuple[Tensor, Tensor]
_TOKEN_FIELDS = tuple(field.name for field in fields(TokenTable))


class BlockReader:
    """A store as a list of blocks of at most chunk_tokens rows.

    Args:
        store: the store.
        x_sites: sites that come first on the site axis.
        y_sites: sites that come after them.
        drop_bos: leave out beginning-of-sequence tokens.

    Attributes:
        rows: [blocks] int64, rows of each block that are kept.

    Raises:
        StoreError: a site is not stored, or a token array cannot be read.
    """

    def __init__(self, store: ActivationStore, x_sites: Sequence[str], y_sites: Sequence[str], drop_bos: bool) -> None:
        self._store, self._sites = store, (*x_sites, *y_sites)
        store.site_index(self._sites)
        self._cache: OrderedDict[int, TokenTable] = OrderedDict()
        chunk = store.spec.chunk_tokens
        self._place: list[tuple[int, int]] = []
        self._keep: list[NDArray[np.bool_] | None] = []
        rows = []
        for unit in store.units:
            keep = (store.modality(unit.unit) != Modality.BOS).numpy() if drop_bos else None
            for start in range(0, unit.n_tokens, chunk):
                stop = min(start + chunk, unit.n_tokens)
                self._place.append((unit.unit, start))
                self._keep.append(None if keep is None else keep[start:stop])
                rows.append(stop - start if keep is None else int(keep[start:stop].sum()))
        self.rows: NDArray[np.int64] = np.array(rows, dtype=np.int64)

    def read(self, block: int, start: int, stop: int) -> Part:
        """Rows [start, stop) of a block, start < stop, counted among those kept.

        Raises:
            StoreError: a shard is missing, truncated or damaged.
        """
        unit, base = self._place[block]
        keep = self._keep[block]
        rows = np.arange(start, stop) if keep is None else np.flatnonzero(keep)[start:stop]
        first, last = int(rows[0]), int(rows[-1]) + 1
        acts = self._store.read(unit, base + first, base + last, self._sites)
        table = self._tokens(unit)
        columns = [getattr(table, name)[base + first : base + last].long() for name in _TOKEN_FIELDS]
        tokens = torch.stack(columns, dim=1)
        if len(rows) == last - first:
            return acts, tokens
        index = torch.from_numpy(rows - first)
        return acts.index_select(0, index), tokens.index_select(0, index)

    def _tokens(self, unit: int) -> TokenTable:
        """Token table of a unit; the most recently used ones stay in memory."""
        if unit in self._cache:
            self._cache.move_to_end(unit)
        else:
            self._cache[unit] = self._store.tokens(unit)
            while sum(len(table.sample) for table in self._cache.values()) > _CACHED_TOKENS and len(self._cache) > 1:
                self._cache.popitem(last=False)
        return self._cache[unit]


def join(parts: Sequence[Part]) -> Part:
    """Parts laid end to end."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([acts for acts, _ in parts]), torch.cat([tokens for _, tokens in parts])


def unpack_tokens(columns: Tensor) -> TokenTable:
    """The table whose fields are the columns [rows, 7] of a `Part`."""
    return TokenTable(
        **{name: columns[:, i].to(getattr(torch, TOKEN_DTYPES[name])) for i, name in enumerate(_TOKEN_FIELDS)}
    )
