"""Token filter: selects tokens of a store by class and norm, without reading activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.store.moments import Moments, measure
from clt.capture.store.schema import TOKEN_CLASSES
from clt.errors import ConfigError

if TYPE_CHECKING:
    from clt.capture.reading.activation_store import ActivationStore

TokenClass = Literal["text", "image", "image_special", "bos"]


@dataclass(frozen=True, kw_only=True)
class TokenFilter:
    """Selection of tokens; by default all tokens pass.

    Attributes:
        modalities: token classes that pass; default: all.
        drop_bos: drop beginning-of-sequence tokens.
        norm_cap: drop a token whose norm at any stored site exceeds `norm_cap` times the site's mean norm over all
            tokens except beginning-of-sequence tokens; default: no cap.
    """

    modalities: tuple[TokenClass, ...] | None = None
    drop_bos: bool = False
    norm_cap: float | None = None

    def __post_init__(self) -> None:
        for name in self.modalities or ():
            if name not in TOKEN_CLASSES:
                raise ConfigError(f"modalities: '{name}' is not a token class; use some of {', '.join(TOKEN_CLASSES)}")
        if not self.classes:
            raise ConfigError("modalities: no token passes with 'bos' alone and drop_bos=true; add a token class")
        if self.norm_cap is not None and not self.norm_cap > 0:
            raise ConfigError(f"norm_cap={self.norm_cap}: no token passes; use a number above 1, or remove the key")

    @property
    def classes(self) -> tuple[int, ...]:
        """Indices in `TOKEN_CLASSES` of the classes that pass, before the norm cap."""
        chosen = TOKEN_CLASSES if self.modalities is None else self.modalities
        return tuple(
            number
            for number, name in enumerate(TOKEN_CLASSES)
            if name in chosen and not (self.drop_bos and name == "bos")
        )

    def keep(self, store: ActivationStore, unit: int) -> NDArray[np.bool_] | None:
        """Mask of the tokens of a unit that pass.

        Args:
            store: the store.
            unit: number of the unit.

        Returns:
            [n_tokens] bool in the stored order, or None if all pass.

        Raises:
            StoreError: a shard is missing, truncated or damaged.
        """
        passes = np.ones(store.n_tokens(unit), dtype=np.bool_)
        if len(self.classes) < len(TOKEN_CLASSES):
            passes &= np.isin(store.modality(unit).numpy(), self.classes)
        if self.norm_cap is not None:
            for group in store.spec.groups:
                cap = self.norm_cap * store.mean_norms(group.name).numpy()
                passes &= ~(store.norms(unit, group.name).numpy() > cap).any(axis=1)
        return None if passes.all() else passes

    def counts(self, moments: Moments) -> Tensor:
        """[c] int64: tokens of each class that pass, before the norm cap."""
        passing = torch.zeros_like(moments.count)
        passing[list(self.classes)] = moments.count[list(self.classes)]
        return passing

    def __str__(self) -> str:
        classes = ",".join(TOKEN_CLASSES[number] for number in self.classes)
        return classes if self.norm_cap is None else f"{classes} norm_cap={self.norm_cap!r}"


#: All tokens pass.
ALL_TOKENS = TokenFilter()


def token_counts(store: ActivationStore, where: TokenFilter) -> Tensor:
    """Number of tokens that pass a filter, by class; with a norm cap, reads the norms of all tokens.

    Args:
        store: the store.
        where: token filter.

    Returns:
        [c] int64, in the order of `TOKEN_CLASSES`.

    Raises:
        StoreError: a file is missing or damaged.
    """
    if where.norm_cap is None:
        return where.counts(store.moments(store.spec.groups[0].name))
    counts = torch.zeros(len(TOKEN_CLASSES), dtype=torch.int64)
    for unit in store.units:
        keep, modality = where.keep(store, unit.unit), store.modality(unit.unit)
        passing = modality if keep is None else modality[torch.from_numpy(keep)]
        counts += torch.bincount(passing.long(), minlength=len(TOKEN_CLASSES))
    return counts


def filtered_moments(store: ActivationStore, sites: Sequence[str], where: TokenFilter) -> Moments:
    """Moments of sites over the tokens that pass a filter; reads the store once.

    Args:
        store: the store.
        sites: names, of one group.
        where: token filter.

    Returns:
        The moments, with all tokens counted as the first class.

    Raises:
        StoreError: a site is not stored, or a file is missing or damaged.
    """
    total: Moments | None = None
    size = store.spec.chunk_tokens
    for unit in store.units:
        keep = where.keep(store, unit.unit)
        for start in range(0, unit.n_tokens, size):
            stop = min(start + size, unit.n_tokens)
            values = store.read(unit.unit, start, stop, sites)
            part = _moments_of(values if keep is None else values[torch.from_numpy(keep[start:stop])])
            total = part if total is None else total.merge(part)
    assert total is not None, "a store has at least one unit"
    return total


def _moments_of(rows: Tensor) -> Moments:
    one_class = torch.zeros(len(rows), dtype=torch.uint8)
    return measure(rows.shape, one_class, lambda site, some: (rows[some, site], None))[0]
