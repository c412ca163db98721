"""Sums over held-out tokens, by layer and modality, from which `clt.evaluation.evaluator` derives its measures.

Every rank fills the rows of its own layers with sums over its own tokens; one all-reduce over all ranks gives the sums
of a single process. Sums are float64.

Shape letters: N layers of the model, G modalities, B tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clt.distributed.mesh import Mesh, input_layers
from clt.distributed.shared_decoders import shared_decoders
from clt.records import ActivationBatch, Modality, SparseCodes
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.dead_features import firing_counts
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.sparsity import Peers

#: Bins of log10(firing rate), a quarter of a decade each.
RATE_EDGES = tuple(-7 + quarter / 4 for quarter in range(29))

#: A variance below this share of the mean square is rounding.
_NO_VARIATION = 1e-12


class HeldOutSums:
    """Sums over one rank's layers and tokens.

    Args:
        config: architecture.
        device: device of the transcoder.
        counts_tokens: whether this rank counts its tokens; true on one of the ranks that see the same tokens.

    Attributes:
        fired_NF: [N,F] int64, tokens on which each feature is active.
    """

    def __init__(self, config: CLTConfig, device: torch.device, counts_tokens: bool = True) -> None:
        shape = (config.n_layers, len(Modality))
        self._counts_tokens = counts_tokens
        self._tokens_G, self._active_NG, self._error_NG, self._square_NG, self._sum_NGD = (
            torch.zeros(size, dtype=torch.float64, device=device)
            for size in (shape[1:], shape, shape, shape, (*shape, config.d_model))
        )
        self.fired_NF = torch.zeros(config.n_layers, config.n_features, dtype=torch.int64, device=device)

    def add(
        self,
        transcoder: CrossLayerTranscoder,
        batch: ActivationBatch,
        exchange: Callable[[SparseCodes], SparseCodes] | None = None,
        peers: Peers | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            transcoder: this rank's share.
            batch: raw activations; x of `input_layers` of the share, y of its targets.
            exchange: returns the codes of all sources given those of the own ones; None where all are owned.
            peers: owners of the other layers; None where all are owned.
        """
        share, device = transcoder.share, self.fired_NF.device
        modality_GB = torch.arange(len(Modality), device=device)[:, None] == batch.tokens.modality.to(device)
        modality_GB = modality_GB.double()
        # In standardised units the means are near zero, so that the two-sum formula of the variance keeps its digits.
        x_layers = input_layers(transcoder.config, share)
        x = transcoder.scaling.standardise_x(batch.x.to(device), x_layers)
        y_MBD = transcoder.scaling.standardise_y(batch.y.to(device), share.targets, transcoder.columns)

        own = transcoder.encode(x[[x_layers.index(layer) for layer in share.sources]], peers=peers)
        self._active_NG[list(share.sources)] += (own.values > 0).sum(dim=2).double() @ modality_GB.T
        self.fired_NF[list(share.sources)] += firing_counts(own)
        if self._counts_tokens:
            self._tokens_G += modality_GB.sum(dim=1)

        codes = own if exchange is None else exchange(own)
        mesh = None if peers is None else peers.mesh
        shared = shared_decoders(transcoder, mesh) if isinstance(mesh, Mesh) else None
        for layer, y_BD in zip(share.targets, y_MBD.double(), strict=True):
            rows = transcoder.source_rows(layer)
            x_BD = x[x_layers.index(layer)] if transcoder.config.skip else None
            found_BD = transcoder.decode_layer(layer, codes.values[rows], codes.indices[rows], x_BD, shared)
            self._error_NG[layer] += modality_GB @ (found_BD.double() - y_BD).square().sum(dim=1)
            self._square_NG[layer] += modality_GB @ y_BD.square().sum(dim=1)
            self._sum_NGD[layer, :, transcoder.columns] += modality_GB @ y_BD

    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, for an all-reduce in place."""
        return self._tokens_G, self._active_NG, self._error_NG, self._square_NG, self._sum_NGD, self.fired_NF

    def tokens(self, modalities: Sequence[Modality]) -> int:
        """Tokens of these modalities."""
        return int(self._tokens_G[list(modalities)].sum())

    def fvu(self, layers: Sequence[int], modalities: Sequence[Modality]) -> list[float]:
        """Fraction of variance unexplained of target layers, NaN where the outputs do not vary."""
        groups = list(modalities)
        error_M, square_M, total_MD = (
            sums[list(layers)][:, groups].sum(dim=1) for sums in (self._error_NG, self._square_NG, self._sum_NGD)
        )
        deviation_M = square_M - total_MD.square().sum(dim=1) / self.tokens(modalities)
        return torch.where(deviation_M > _NO_VARIATION * square_M, error_M / deviation_M, math.nan).tolist()

    def l0(self, layers: Sequence[int], modalities: Sequence[Modality]) -> list[float]:
        """Active features per token of source layers."""
        return (self._active_NG[list(layers)][:, list(modalities)].sum(dim=1) / self.tokens(modalities)).tolist()

    def silent_features(self, layers: Sequence[int]) -> list[int]:
        """Features of source layers that are active on no token."""
        return (self.fired_NF[list(layers)] == 0).sum(dim=1).tolist()

    def rate_counts(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Features in each bin of `RATE_EDGES`, by source layer; those active on no token are in none."""
        counts = []
        for fired_F in self.fired_NF[list(layers)].cpu():
            rates = (fired_F[fired_F > 0].double() / self.tokens(list(Modality))).log10()
            inside = rates.clamp(RATE_EDGES[0], RATE_EDGES[-1])
            bins = torch.histogram(inside, torch.tensor(RATE_EDGES, dtype=torch.float64)).hist
            counts.append(tuple(bins.long().tolist()))
        return counts
