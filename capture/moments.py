"""Count, mean and centred second moment of activations, in float64, mergeable (Chan, Golub and LeVeque 1979).

Each unit of a store keeps its own moments, over all its tokens and over those that are not BOS, so that the statistics
of any choice of sites and of units are exact without reading activations again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from clt.records import SiteStats


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of S sites over the same tokens.

    Attributes:
        count: number of tokens.
        mean: [S,D] float64.
        m2: [S,D] float64, sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Moments of values [tokens, S, D]; one site at a time, so that the float64 copy stays small."""
        n, n_sites, width = values.shape
        mean, m2 = torch.zeros(n_sites, width, dtype=torch.float64), torch.zeros(n_sites, width, dtype=torch.float64)
        for site in range(n_sites if n else 0):
            wide = values[:, site].double()
            mean[site] = wide.mean(0)
            m2[site] = (wide - mean[site]).square().sum(0)
        return cls(count=n, mean=mean, m2=m2)

    def merge(self, other: Moments) -> Moments:
        """Moments over the tokens of both."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta.square() * (self.count * other.count / count),
        )

    def select(self, sites: Sequence[int]) -> Moments:
        """Moments of some of the sites."""
        return Moments(count=self.count, mean=self.mean[list(sites)], m2=self.m2[list(sites)])

    def summary(self) -> SiteStats:
        """Mean per channel, and the root of the variance averaged over channels."""
        rms = (self.m2.sum(1) / max(self.count * self.m2.shape[1], 1)).sqrt()
        return SiteStats(count=self.count, mean=self.mean, rms=rms)

    @staticmethod
    def pack(everything: Moments, without_bos: Moments) -> bytes:
        """The contents of a unit's statistics file."""
        tensors: dict[str, Tensor] = {}
        for name, part in (("all", everything), ("without_bos", without_bos)):
            tensors |= {f"{name}.count": torch.tensor([part.count]), f"{name}.mean": part.mean, f"{name}.m2": part.m2}
        return save(tensors)

    @classmethod
    def load(cls, path: Path, drop_bos: bool) -> Moments:
        """Moments from a unit's statistics file."""
        name = "without_bos" if drop_bos else "all"
        with safe_open(path, framework="pt") as file:
            count, mean, m2 = (file.get_tensor(f"{name}.{part}") for part in ("count", "mean", "m2"))
        return cls(count=int(count), mean=mean, m2=m2)
