"""Standardisation of activations: subtract the per-channel mean, divide by one scalar RMS per site.

The statistics are those of the store over the training tokens. Training and loss use standardised units, in which every
target has variance 1; `CrossLayerTranscoder.folded` moves the scaling into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from clt.records import SiteStats


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Affine maps between raw and standardised activations, per site.

    Attributes:
        mean_x: [L,D] float32, mean of every encoder input.
        rms_x: [L] float32, scalar scale of every encoder input.
        mean_y: [M,D] float32, mean of every MLP output.
        rms_y: [M] float32, scalar scale of every MLP output.
        layer_norm: encoder inputs are first standardised by each token's own mean and deviation.
    """

    mean_x: Tensor
    rms_x: Tensor
    mean_y: Tensor
    rms_y: Tensor
    layer_norm: bool = False

    @classmethod
    def identity(cls, n_layers: int, d_model: int) -> Scaling:
        """The identity scaling."""
        zeros, ones = torch.zeros(n_layers, d_model), torch.ones(n_layers)
        return cls(mean_x=zeros, rms_x=ones, mean_y=zeros.clone(), rms_y=ones.clone())

    @classmethod
    def from_stats(cls, stats_x: SiteStats, stats_y: SiteStats) -> Scaling:
        """The scaling that standardises activations with these moments; a constant site gets scale 1."""
        return cls(
            mean_x=stats_x.mean.float(),
            rms_x=_positive(stats_x.rms),
            mean_y=stats_y.mean.float(),
            rms_y=_positive(stats_y.rms),
        )

    def to(self, like: Tensor) -> Scaling:
        """All tensors in the dtype and on the device of `like`."""
        return replace(
            self,
            mean_x=self.mean_x.to(like),
            rms_x=self.rms_x.to(like),
            mean_y=self.mean_y.to(like),
            rms_y=self.rms_y.to(like),
        )

    def per_token(self) -> Scaling:
        """The same outputs scaling; encoder inputs are standardised by LayerNorm (without weight and bias) only."""
        zeros, ones = torch.zeros_like(self.mean_x), torch.ones_like(self.rms_x)
        return replace(self, mean_x=zeros, rms_x=ones, layer_norm=True)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for saving."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layer_norm"}

    def normalise_x(self, x: Tensor) -> Tensor:
        """Encoder inputs [...,D] after LayerNorm if `layer_norm`; this part is not folded into the weights."""
        return layer_norm(x, x.shape[-1:]) if self.layer_norm else x

    def standardise_x(self, x_LBD: Tensor, layers: tuple[int, ...]) -> Tensor:
        """Standardised encoder inputs of the given layers, [len(layers),B,D]."""
        index = list(layers)
        mean_L1D, rms_L11 = self.mean_x[index][:, None], self.rms_x[index][:, None, None]
        x_LBD = self.normalise_x(x_LBD)
        return (x_LBD - mean_L1D.to(x_LBD)) / rms_L11.to(x_LBD)

    def standardise_y(self, y_MBD: Tensor, layers: tuple[int, ...], columns: slice = slice(None)) -> Tensor:
        """Standardised MLP outputs of the given layers, [len(layers),B,D], or of the given channels only.

        Args:
            y_MBD: [len(layers),B,D] raw MLP outputs.
            layers: their layers.
            columns: channels to return.
        """
        index = list(layers)
        mean_M1D, rms_M11 = self.mean_y[index][:, None, columns], self.rms_y[index][:, None, None]
        return (y_MBD[:, :, columns] - mean_M1D.to(y_MBD)) / rms_M11.to(y_MBD)

    def restore_y(self, y_MBD: Tensor, layers: tuple[int, ...]) -> Tensor:
        """Raw MLP outputs from standardised ones, [len(layers),B,D]."""
        index = list(layers)
        mean_M1D, rms_M11 = self.mean_y[index][:, None], self.rms_y[index][:, None, None]
        return y_MBD * rms_M11.to(y_MBD) + mean_M1D.to(y_MBD)


def _positive(rms_S: Tensor) -> Tensor:
    return torch.where(rms_S > 0, rms_S, 1).float()
