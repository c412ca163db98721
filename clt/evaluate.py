"""What a held-out store says of a transcoder: reconstruction error, active features and dead features per layer.

The definitions hold for the whole project: `fvu` of a layer is the sum of squared errors over the sum of squared
deviations from the mean, pooled over channels; `dead` is never active on the held-out tokens at the weights given.
What needs a running model is in `clt.attribution.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from clt.dead_features import firing_counts
from clt.errors import StoreError
from clt.model import CrossLayerTranscoder, source_layers, target_layers
from clt.records import ActivationBatch


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """Measures on held-out tokens.

    Attributes:
        num_tokens: tokens evaluated.
        fvu: fraction of variance unexplained, by target layer.
        l0: active features per token, by source layer.
        dead_fraction: share of features never active, by source layer.
    """

    num_tokens: int
    fvu: dict[int, float]
    l0: dict[int, float]
    dead_fraction: dict[int, float]

    @property
    def mean_fvu(self) -> float:
        """Mean over target layers."""
        return sum(self.fvu.values()) / len(self.fvu)

    @property
    def mean_l0(self) -> float:
        """Mean over source layers."""
        return sum(self.l0.values()) / len(self.l0)

    @property
    def mean_dead_fraction(self) -> float:
        """Mean over source layers."""
        return sum(self.dead_fraction.values()) / len(self.dead_fraction)


@torch.no_grad()
def evaluate_store(clt: CrossLayerTranscoder, batches: Iterable[ActivationBatch]) -> StoreReport:
    """Measures a transcoder on activations.

    Args:
        clt: a whole transcoder.
        batches: raw activations of all layers; x [n_layers,B,D] and y [n_layers,B,D].

    Returns:
        The report, from float64 sums.

    Raises:
        StoreError: there are no tokens.
    """
    sources, targets = source_layers(clt.config), target_layers(clt.config)
    shape = (len(targets), clt.config.d_model)
    error_M = torch.zeros(len(targets), dtype=torch.float64)
    sum_MD, square_MD = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    fired_LF = torch.zeros(len(sources), clt.config.n_features, dtype=torch.int64)
    num_tokens = 0
    for batch in batches:
        # In standardised units the means are near zero, so that the two-sum formula of the variance keeps its digits.
        x_LBD = clt.scaling.standardise_x(batch.x[list(sources)], sources)
        x_MBD = clt.scaling.standardise_x(batch.x[list(targets)], targets) if clt.config.skip else None
        y_MBD = clt.scaling.standardise_y(batch.y[list(targets)], targets).double()
        codes = clt.encode(x_LBD)
        error_M += (clt.decode(codes, x_MBD).double() - y_MBD).square().sum(dim=(1, 2))
        sum_MD += y_MBD.sum(dim=1)
        square_MD += y_MBD.square().sum(dim=1)
        fired_LF += firing_counts(codes)
        num_tokens += y_MBD.shape[1]
    if num_tokens == 0:
        raise StoreError("no tokens to evaluate; give a store that holds some")
    deviation_M = (square_MD - sum_MD.square() / num_tokens).sum(dim=1)
    return StoreReport(
        num_tokens=num_tokens,
        fvu=dict(zip(targets, (error_M / deviation_M).tolist(), strict=True)),
        l0=dict(zip(sources, (fired_LF.sum(dim=1) / num_tokens).tolist(), strict=True)),
        dead_fraction=dict(zip(sources, (fired_LF == 0).double().mean(dim=1).tolist(), strict=True)),
    )
