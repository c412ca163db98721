"""One rank's forward pass in training: raw activations, codes, exchange, reconstructions, share of the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clt.config import AuxKSettings
from clt.dead_features import fired_features
from clt.loss import auxk_error, combine, encode_dead, revival
from clt.metrics import Observations
from clt.model import CrossLayerTranscoder, source_layers, target_layers
from clt.parallel import CodeExchange, input_layers


class Objective(nn.Module):
    """The training loss of one rank's layers; the sum over the layer axis is the loss of its tokens.

    Args:
        transcoder: this rank's share.
        exchange: brings the codes of all layers.
        settings: auxiliary loss.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, exchange: CodeExchange, settings: AuxKSettings) -> None:
        super().__init__()
        self.transcoder = transcoder
        self._exchange = exchange
        self._settings = settings
        self._x_layers = input_layers(transcoder.config, transcoder.share)
        self._n_sources = len(source_layers(transcoder.config))
        self._n_targets = len(target_layers(transcoder.config))

    def forward(self, x_raw: Tensor, y_raw: Tensor, k: int, dead_LF: Tensor | None) -> tuple[Tensor, Observations]:
        """Loss of one batch.

        Args:
            x_raw: [X_own,B,D] raw encoder inputs of `input_layers` of the share.
            y_raw: [M_own,B,D] raw MLP outputs of the own targets.
            k: active features per token and source.
            dead_LF: [L_own,F] bool, features that take the auxiliary loss, or None for no such loss; None on all ranks
                or on none.

        Returns:
            This rank's share of the loss, and what was seen.
        """
        clt = self.transcoder
        x = clt.scaling.standardise_x(x_raw, self._x_layers)
        y_MBD = clt.scaling.standardise_y(y_raw, clt.share.targets)
        x_LBD = self._rows(x, clt.share.sources)
        x_MBD = self._rows(x, clt.share.targets) if clt.config.skip else None

        own_codes = clt.encode(x_LBD, k)
        error_M, residuals = clt.decode_loss(self._exchange(own_codes), y_MBD, x_MBD)
        auxk_M = lift = None
        if dead_LF is not None:
            # Every n-th token of each rank: the share is exact and no random state has to be kept.
            tokens = slice(None, None, round(1 / self._settings.token_fraction))
            dead_codes = encode_dead(clt, x_LBD[:, tokens], dead_LF, self._settings.k or clt.config.k)
            missed_MBD = -torch.stack([residual_BD[tokens] for residual_BD in residuals])
            auxk_M = auxk_error(clt, self._exchange(dead_codes), missed_MBD)
            lift = revival(dead_codes, self._n_sources)
        terms = combine(error_M, auxk_M, lift, self._settings, self._n_targets)
        return terms.total, Observations(
            error_M=terms.error_M,
            auxk=terms.auxk,
            revival=terms.revival,
            l0_L=(own_codes.values.detach() > 0).sum(dim=(1, 2)) / x_LBD.shape[1],
            fired_LF=fired_features(own_codes),
        )

    def _rows(self, x: Tensor, layers: tuple[int, ...]) -> Tensor:
        return x if layers == self._x_layers else x[[self._x_layers.index(layer) for layer in layers]]
