"""Training objective of one rank: raw activations to codes, exchange, reconstructions and its share of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clt.distributed.code_exchange import CodeExchange, InFlightCodes
from clt.distributed.mesh import input_layers
from clt.distributed.shared_decoders import shared_decoders
from clt.kernels import ops
from clt.kernels.common.dtypes import accumulator
from clt.step_phases import phase
from clt.training.loss import LossTerms, auxk_error, combine, encode_dead, revival
from clt.training.metrics import Observations
from clt.training.settings import AuxKSettings
from clt.transcoder.dead_features import fired_features
from clt.transcoder.layers import target_layers, target_weight
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.penalty import sparsity_loss
from clt.transcoder.sparsity import Peers

#: Error and residual of one own target from (its row, its layer, values, indices and grouping of its sources' codes).
Decode = Callable[[int, int, Tensor, Tensor, ops.FeatureCSR | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DeadPart:
    """Tensors of the auxiliary loss that a backward pass needs.

    Attributes:
        codes: of the dead features, from all ranks.
        x_LBD: [L_own,B,D] encoder inputs of the tokens of the auxiliary loss.
        residuals: [B,D_own] of every own target, dead features' reconstruction - missed output.
        weights_B: [B] of these tokens, None for 1/B.
    """

    codes: InFlightCodes
    x_LBD: Tensor
    residuals: list[Tensor]
    weights_B: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Results of a forward pass, with the tensors that a backward pass needs.

    Attributes:
        x_LBD: [L_own,B,D] standardised encoder inputs.
        x_MBD: [M_own,B,D] those of the own targets; None without skip connection.
        weights_B: [B] weight of each token, None for 1/B.
        codes: from all ranks.
        residuals: [B,D_own] of every own target.
        dead: None without auxiliary loss.
        terms: of the loss.
    """

    x_LBD: Tensor
    x_MBD: Tensor | None
    weights_B: Tensor | None
    codes: InFlightCodes
    residuals: list[Tensor]
    dead: DeadPart | None
    terms: LossTerms

    def observations(self, penalty: Tensor | None = None) -> Observations:
        """Metrics of the forward pass.

        Args:
            penalty: scalar, this rank's share of the sparsity penalty, if the rule has one.
        """
        own = self.codes.own
        return Observations(
            error_M=self.terms.error_M,
            auxk=self.terms.auxk,
            revival=self.terms.revival,
            penalty=torch.zeros_like(self.terms.auxk) if penalty is None else penalty,
            l0_L=(own.values.detach() > 0).sum(dim=(1, 2)) / self.x_LBD.shape[1],
            fired_LF=fired_features(own),
        )


class Objective(nn.Module):
    """The training loss of one rank's share; the sum over the model group is the loss of its tokens.

    Args:
        transcoder: this rank's share.
        exchange: gathers the codes of all layers.
        settings: auxiliary loss.

    Attributes:
        transcoder: this rank's share.
        settings: auxiliary loss.
        n_targets: target layers of the whole transcoder.
        order: rows of the own targets, in the order in which their codes arrive.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, exchange: CodeExchange, settings: AuxKSettings) -> None:
        super().__init__()
        self.transcoder = transcoder
        self._exchange = exchange
        self.settings = settings
        self._x_layers = input_layers(transcoder.config, transcoder.share)
        self.n_targets = len(target_layers(transcoder.config))
        self._weights = [target_weight(transcoder.config, layer) for layer in transcoder.share.targets]
        self.order = sorted(
            range(len(transcoder.share.targets)),
            key=lambda row: exchange.last_slot(transcoder.source_rows(transcoder.share.targets[row])),
        )

    def forward(
        self,
        x_raw: Tensor,
        y_raw: Tensor,
        k: int,
        dead_LF: Tensor | None,
        penalty_weight: float = 0.0,
        weights_B: Tensor | None = None,
    ) -> tuple[Tensor, Observations]:
        """Loss of one batch.

        Args:
            x_raw: [X_own,B,D] raw encoder inputs of `input_layers` of the share.
            y_raw: [M_own,B,D] raw MLP outputs of the own targets, all columns.
            k: active features per token and source.
            dead_LF: [L_own,F] bool, features that take the auxiliary loss, or None for no such loss; None on all ranks
                or on none.
            penalty_weight: of the sparsity penalty, for kinds that have one.
            weights_B: [B] weight of each token in all terms of the loss, over B; None for 1/B.

        Returns:
            This rank's share of the loss, and its metrics.
        """
        passed = self.run(x_raw, y_raw, k, dead_LF, weights_B)
        transcoder, total, penalty = self.transcoder, passed.terms.total, None
        if transcoder.config.sparsity.has_penalty:
            peers = Peers(mesh=self._exchange.mesh)
            weights = None if passed.weights_B is None else passed.weights_B.to(passed.x_LBD.dtype)
            cost, penalty = sparsity_loss(transcoder, passed.codes.own, penalty_weight, peers, weights)
            total = total + cost
        return total, passed.observations(penalty)

    def run(
        self,
        x_raw: Tensor,
        y_raw: Tensor,
        k: int,
        dead_LF: Tensor | None,
        weights_B: Tensor | None,
        needs_gradient: bool | None = None,
    ) -> ForwardPass:
        """The forward pass without the sparsity penalty; see `forward` for the other arguments.

        Args:
            needs_gradient: as of `CodeExchange.send`.
        """
        transcoder = self.transcoder
        x = transcoder.scaling.standardise_x(x_raw, self._x_layers).to(transcoder.dtype)
        y_MBD = transcoder.scaling.standardise_y(y_raw, transcoder.share.targets, transcoder.columns).to(
            transcoder.dtype
        )
        x_LBD = self._rows(x, transcoder.share.sources)
        x_MBD = self._rows(x, transcoder.share.targets) if transcoder.config.skip else None
        if weights_B is not None:
            weights_B = weights_B.to(accumulator(x.dtype))

        shared = shared_decoders(transcoder, self._exchange.mesh)
        codes = self._send(x_LBD, k, needs_gradient)
        # Every n-th token of each rank: the share is exact and needs no random numbers.
        tokens = slice(None, None, round(1 / self.settings.token_fraction))
        # Sent before anything is decoded: these codes are in flight meanwhile, and so are their gradients later.
        dead_codes = None if dead_LF is None else self._send_dead(x_LBD[:, tokens], dead_LF, needs_gradient)
        error_M, residuals = self._decode_targets(
            codes,
            lambda row, layer, values_SBK, indices_SBK, csr: transcoder.decode_loss_layer(
                layer, values_SBK, indices_SBK, y_MBD[row], _row(x_MBD, row), csr, weights_B, shared
            ),
        )
        dead = auxk_M = lift = None
        if dead_codes is not None:
            some_B = None if weights_B is None else _of_some(weights_B, tokens)
            auxk_M, left = self._decode_targets(
                dead_codes,
                lambda row, layer, values_SBK, indices_SBK, csr: auxk_error(
                    transcoder, layer, values_SBK, indices_SBK, -residuals[row][..., tokens, :], csr, some_B, shared
                ),
            )
            lift = revival(dead_codes.own, transcoder.n_sources_of_model, some_B)
            dead = DeadPart(codes=dead_codes, x_LBD=x_LBD[:, tokens], residuals=left, weights_B=some_B)
        return ForwardPass(
            x_LBD=x_LBD,
            x_MBD=x_MBD,
            weights_B=weights_B,
            codes=codes,
            residuals=residuals,
            dead=dead,
            terms=combine(error_M, auxk_M, lift, self.settings, error_M.new_tensor(self._weights)),
        )

    @phase("encode")
    def _send(self, x_LBD: Tensor, k: int, needs_gradient: bool | None) -> InFlightCodes:
        transcoder = self.transcoder
        n_features, tokens = transcoder.config.n_features, x_LBD.shape[1]
        if transcoder.encodes_layers_alone:
            pairs = (
                transcoder.encode_layer(layer, x_BD, k)
                for layer, x_BD in zip(transcoder.share.sources, x_LBD, strict=True)
            )
            return self._exchange.send(pairs, (tokens, k), n_features, x_LBD, needs_gradient)
        codes = transcoder.encode(x_LBD, k, Peers(mesh=self._exchange.mesh))
        pairs_of_all = zip(codes.values, codes.indices, strict=True)
        return self._exchange.send(pairs_of_all, codes.values.shape[1:], n_features, x_LBD, needs_gradient)

    @phase("encode")
    def _send_dead(self, x_LBD: Tensor, dead_LF: Tensor, needs_gradient: bool | None) -> InFlightCodes:
        config = self.transcoder.config
        k = self.settings.k or config.k
        pairs = encode_dead(self.transcoder, x_LBD, dead_LF, k)
        return self._exchange.send(pairs, (x_LBD.shape[1], k), config.n_features, x_LBD, needs_gradient)

    @phase("decode")
    def _decode_targets(self, codes: InFlightCodes, decode: Decode) -> tuple[Tensor, list[Tensor]]:
        """Errors [M_own] and residuals [B,D_own] of the own targets, each decoded as soon as its codes have arrived."""
        transcoder, found = self.transcoder, {}
        for row in self.order:
            layer = transcoder.share.targets[row]
            found[row] = decode(row, layer, *codes.take(transcoder.source_rows(layer)))
        codes.finish()
        errors, residuals = zip(*(found[row] for row in sorted(found)), strict=True)
        return torch.stack(errors), list(residuals)

    def _rows(self, x: Tensor, layers: tuple[int, ...]) -> Tensor:
        return x if layers == self._x_layers else x[[self._x_layers.index(layer) for layer in layers]]


def _row(x_MBD: Tensor | None, row: int) -> Tensor | None:
    return None if x_MBD is None else x_MBD[row]


def _of_some(weights_B: Tensor, tokens: slice) -> Tensor:
    """Weights of every n-th token, rescaled to their number."""
    some_B = weights_B[tokens]
    return some_B * (len(weights_B) / len(some_B))
