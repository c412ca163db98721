"""Moments of activations per token class, in float64, mergeable (Chan, Golub and LeVeque 1979).

Each unit of a store has its own moments, so that statistics over any sites and token classes are exact without reading
activations again; beginning-of-sequence tokens, whose norms are very large, are kept apart from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clt.capture.store.schema import TOKEN_CLASSES
from clt.errors import StoreError
from clt.records import SiteStats

_N = len(TOKEN_CLASSES)
#: Number of values converted to float64 at a time: small enough for a core's cache.
_PIECE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of S sites over the same tokens, by token class c (`TOKEN_CLASSES`).

    Attributes:
        count: [c] int64, number of tokens.
        mean: [c,S,D] float64.
        m2: [c,S,D] float64, sum of squared deviations from the mean.
        absmax: [c,S,D] float32, largest absolute value.
        norm: [c,S] float64, sum of Euclidean norms.
        error: [c,S,D] float64, sum of squared rounding errors of the stored values; zero if nothing was rounded.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    absmax: Tensor
    norm: Tensor
    error: Tensor

    @classmethod
    def zeros(cls, n_sites: int, width: int) -> Moments:
        """Moments of no tokens."""
        wide = torch.zeros(_N, n_sites, width, dtype=torch.float64)
        return cls(
            count=torch.zeros(_N, dtype=torch.int64),
            mean=wide.clone(),
            m2=wide.clone(),
            absmax=wide.float(),
            norm=wide[..., 0].clone(),
            error=wide.clone(),
        )

    def merge(self, other: Moments) -> Moments:
        """Moments over the tokens of both."""
        count = self.count + other.count
        share = (other.count.double() / count.clamp_min(1))[:, None, None]
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta.square() * (share * self.count[:, None, None]),
            absmax=torch.maximum(self.absmax, other.absmax),
            norm=self.norm + other.norm,
            error=self.error + other.error,
        )

    def select(self, sites: Sequence[int]) -> Moments:
        """Moments of some of the sites."""
        chosen = list(sites)
        parts = {f.name: getattr(self, f.name)[:, chosen] for f in fields(self) if f.name != "count"}
        return Moments(count=self.count, **parts)

    def over(self, classes: Sequence[int]) -> Moments:
        """Moments over the tokens of some classes together, as a single class."""
        total: Moments | None = None
        for number in classes:
            part = Moments(**{f.name: getattr(self, f.name)[number : number + 1] for f in fields(self)})
            total = part if total is None else total.merge(part)
        assert total is not None, "at least one class"
        return total

    def stats(self, classes: Sequence[int]) -> SiteStats:
        """Count, mean and rms over the tokens of some classes together."""
        total = self.over(classes)
        count = int(total.count[0])
        rms = (total.m2[0].sum(1) / max(count * total.m2.shape[2], 1)).sqrt()
        return SiteStats(count=count, mean=total.mean[0], rms=rms)

    def pack(self, prefix: str) -> dict[str, Tensor]:
        """Tensors of a moments file, named `prefix.field`."""
        return {f"{prefix}.{f.name}": getattr(self, f.name).contiguous() for f in fields(self)}


def measure(
    shape: Sequence[int], modality: Tensor, values: Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
) -> tuple[Moments, Tensor]:
    """Computes moments and norms of a unit's tokens in pieces, so that the float64 copy stays small.

    Args:
        shape: (n, S, D): rows, sites, channels.
        modality: [n] uint8, token class of each row.
        values: maps a site and rows [r] to the stored values [r,D] and the values before rounding; None if not rounded.

    Returns:
        The moments, and the norms [n,S] float32.
    """
    n_tokens, n_sites, width = shape
    moments = Moments.zeros(n_sites, width)
    norms = torch.zeros(n_tokens, n_sites, dtype=torch.float32)
    classes = [(modality == number).nonzero().flatten() for number in range(_N)]
    moments.count[:] = torch.tensor([len(rows) for rows in classes])
    for site in range(n_sites):
        for number, rows in enumerate(classes):
            place = number, site
            for piece in rows.split(max(1, _PIECE // width)) if len(rows) else ():
                stored, original = values(site, piece)
                wide = stored.double()
                squares = wide.square()
                lengths = squares.sum(1).sqrt_()
                norms[piece, site] = lengths.float()
                moments.norm[place] += lengths.sum()
                moments.mean[place] += wide.sum(0)
                moments.m2[place] += squares.sum(0)
                moments.absmax[place] = torch.maximum(moments.absmax[place], squares.amax(0).sqrt_().float())
                if original is not None:
                    moments.error[place] += wide.sub_(original).square_().sum(0)
    # In float64 the relative error of this difference is (mean / std)^2 * 1e-16.
    count = moments.count.clamp_min(1)[:, None, None]
    moments.mean.div_(count)
    moments.m2.sub_(count * moments.mean.square()).clamp_min_(0)
    return moments, norms


def pack_moments(groups: dict[str, Moments]) -> bytes:
    """Contents of a unit's moments file."""
    return save({name: tensor for key, moments in groups.items() for name, tensor in moments.pack(key).items()})


def unpack_moments(contents: bytes, groups: Sequence[str], name: str) -> dict[str, Moments]:
    """Reads a moments file.

    Args:
        contents: bytes of the file.
        groups: names of the groups.
        name: full name of the file, for the error message.

    Returns:
        Moments by group.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        tensors = load(contents)
        return {key: Moments(**{f.name: tensors[f"{key}.{f.name}"] for f in fields(Moments)}) for key in groups}
    except (SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{name}: not readable ({reason}); restore it or run 'clt store repair'") from None
