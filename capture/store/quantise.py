"""int8 activations: channels standardised by fixed moments, with one scale per token and site.

value = q * scale * std + mean. Dividing by the standard deviation preserves small channels beside outlier channels, the
scale follows the token's norm, and no value is clipped. The moments come from the first samples of the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clt.errors import StoreError

_LARGEST = 127
#: Number of rows converted to float32 at a time.
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Standardiser:
    """Fixed mean and standard deviation of a group of sites.

    Attributes:
        mean: [S,D] float32.
        std: [S,D] float32, > 0.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Standardiser:
        """Moments of values [tokens, S, D]; std is at least 1e-4 of the site's, for channels that do not vary."""
        mean, std = torch.empty(values.shape[1:]), torch.empty(values.shape[1:])
        for site in range(values.shape[1]):
            wide = values[:, site].double()
            spread = wide.std(0, correction=0)
            floor = (spread.square().mean().sqrt() * 1e-4).clamp_min(1e-30)
            mean[site], std[site] = wide.mean(0).float(), torch.maximum(spread, floor).float()
        return cls(mean=mean, std=std)

    def scales(self, values: Tensor) -> Tensor:
        """Scales [tokens, S] float32 of values [tokens, S, D]: the largest absolute standardised value becomes 127."""
        pieces = [self._standard(rows).abs_().amax(-1) / _LARGEST for rows in values.split(_ROWS)]
        largest = torch.cat(pieces)
        return torch.where(largest > 0, largest, 1.0)

    def quantise(self, values: Tensor, scales: Tensor) -> Tensor:
        """Values [tokens, S, D] as int8, with given scales [tokens, S]."""
        quantised = torch.empty(values.shape, dtype=torch.int8)
        for rows, into, scale in zip(values.split(_ROWS), quantised.split(_ROWS), scales.split(_ROWS), strict=True):
            into.copy_(self._standard(rows).div_(scale[..., None]).round_().clamp_(-_LARGEST, _LARGEST))
        return quantised

    def _standard(self, values: Tensor) -> Tensor:
        return (values.float() - self.mean).div_(self.std)

    def restore(self, quantised: Tensor, scales: Tensor, sites: list[int] | slice = slice(None)) -> Tensor:
        """Restores float32 values.

        Args:
            quantised: [tokens, s, D] int8.
            scales: [tokens, s] float32.
            sites: the s positions on the site axis; default: all.

        Returns:
            [tokens, s, D] float32.
        """
        return quantised * scales[..., None] * self.std[sites] + self.mean[sites]


def pack_standardisers(groups: dict[str, Standardiser]) -> bytes:
    """Contents of the store's quantisation file."""
    return save({f"{name}.{part}": getattr(s, part) for name, s in groups.items() for part in ("mean", "std")})


def unpack_standardisers(contents: bytes, name: str) -> dict[str, Standardiser]:
    """Standardisers by group.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        tensors = load(contents)
        groups = {key.rpartition(".")[0] for key in tensors}
        return {g: Standardiser(mean=tensors[f"{g}.mean"], std=tensors[f"{g}.std"]) for g in sorted(groups)}
    except (SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{name}: not readable ({reason}); restore it or capture again") from None
