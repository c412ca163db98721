"""Decoders that stay in their memory-mapped file, so that a transcoder of any size loads with its encoders only.

Reads are on demand: rows of the active features for decoding, single vectors for attribution, one [F,D] matrix for
`CrossLayerTranscoder.decoder`. The operating system caches pages of the file while memory is free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MappedDecoder(nn.Module):
    """The decoders into one target, in place of a parameter W_dec[t]; read only.

    Args:
        file_SFD: [S,F,D] memory-mapped tensor, in the dtype of the file.
        scale: [] factor; reads have its dtype and device, and `to` moves it.
    """

    scale: Tensor

    def __init__(self, file_SFD: Tensor, scale: Tensor) -> None:
        super().__init__()
        # Neither parameter nor buffer: not moved by `to`, not in the state dict.
        self.file_SFD = file_SFD
        self.register_buffer("scale", scale, persistent=False)

    @property
    def shape(self) -> torch.Size:
        """S, F, D."""
        return self.file_SFD.shape

    def __len__(self) -> int:
        return len(self.file_SFD)

    def __getitem__(self, index: Any) -> Tensor:
        """Indexes [S,F,D]; reads only the selected part."""
        places = index if isinstance(index, tuple) else (index,)
        found = self.file_SFD[tuple(place.cpu() if isinstance(place, Tensor) else place for place in places)]
        return found.to(self.scale) * self.scale

    def every(self, step: int) -> Tensor:
        """Every step-th number, [N]."""
        return self.file_SFD.reshape(-1)[::step].to(self.scale) * self.scale

    def scaled(self, factor: Tensor) -> MappedDecoder:
        """The same decoders times a number, without reading them."""
        return MappedDecoder(self.file_SFD, self.scale * factor.to(self.scale))

    def of_active(self, values_SBK: Tensor, indices_SBK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that codes use, as decoders of one source with more slots.

        Args:
            values_SBK: [S,B,K] activations.
            indices_SBK: [S,B,K] int32 feature numbers.

        Returns:
            values [1,B,S*K], indices [1,B,S*K] int32 into the rows, and the R distinct rows [1,R,D].
        """
        F = self.shape[1]
        first_S = torch.arange(len(indices_SBK), device=indices_SBK.device) * F
        used_R, rows_SBK = (indices_SBK + first_S[:, None, None]).unique(return_inverse=True)
        table_RD = self.file_SFD.flatten(0, 1)[used_R.cpu()].to(self.scale) * self.scale
        merged_BN, rows_BN = (tensor.transpose(0, 1).flatten(1) for tensor in (values_SBK, rows_SBK))
        return merged_BN[None], rows_BN[None].int(), table_RD[None]


def put_mapped(decoders: nn.ParameterDict, name: str, decoder: MappedDecoder) -> None:
    """Replaces a parameter by a mapped decoder.

    Args:
        decoders: W_dec of a transcoder.
        name: target layer, as the key.
        decoder: decoders into that target.
    """
    # A module cannot replace a parameter of the same name in place.
    del decoders[name]
    decoders[name] = decoder
