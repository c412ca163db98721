"""Decoding: from sparse codes to reconstructions, for free, tied and independently trained decoders.

    free         W_dec[t] [S,F,D], a matrix for every source l of a target t
    target       W_dec[t] [1,F,D], one matrix shared by all sources of a target
    source       W_shared[l] [F,D], one matrix shared by all targets of a source; the activation of feature f is
                 first multiplied by target_scale[l] [T,F]
    independent  free; each source reconstructs the whole target, with a bias for every pair, b_dec[t] [S,D]
    offset       free; an active feature writes with its activation plus offset[t] [S,F]

Kernels support free decoders only: the sources of a target with one matrix are passed as one source with more slots.

Shape letters: S sources of one target, T targets of one source, B tokens, D d_model, F features per layer, K slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from clt.kernels import ops
from clt.transcoder.encoding import sum_by_feature
from clt.transcoder.lazy_decoder import MappedDecoder

if TYPE_CHECKING:
    from clt.transcoder.model import CrossLayerTranscoder

#: Arguments of the decode kernels: values [S,B,K], indices [S,B,K], decoders [S,F,D_own] and the grouping of the codes.
Slots = tuple[Tensor, Tensor, Tensor, ops.FeatureCSR | None]


class SourceDecoders(Protocol):
    """Decoders that belong to sources (`tied_decoders: source`), those of other ranks included."""

    def into(self, target: int) -> tuple[Tensor, Tensor]:
        """Decoders [S,F,D_own] and scales [S,F] of a target's sources."""
        ...


def decode(
    transcoder: CrossLayerTranscoder,
    layer: int,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    skip_BD: Tensor | None,
    shared: SourceDecoders | None,
) -> Tensor:
    """Reconstruction of a target layer; independent sources are combined according to the settings.

    Args:
        transcoder: the transcoder, or one rank's share.
        layer: target layer owned here.
        values_SBK: [S,B,K] activations of this target's sources.
        indices_SBK: [S,B,K] int32 feature numbers.
        skip_BD: [B,D_own] added to the sum, or None.
        shared: decoders that belong to sources; None if all are owned here or none exist.

    Returns:
        [B,D_own] standardised MLP output, the columns owned here.
    """
    values_SBK, indices_SBK, W_SFD, csr = _slots(transcoder, layer, values_SBK, indices_SBK, None, shared)
    b_dec = transcoder.decoder_bias(layer)
    if transcoder.config.independent is None:
        values_SBK, indices_SBK, W_SFD, csr = _in_memory(values_SBK, indices_SBK, W_SFD, csr)
        return ops.decode(values_SBK, indices_SBK, W_SFD, b_dec, skip_BD, csr)
    weights_S = combination(transcoder, layer)
    if transcoder.config.independent == "nearest":
        values_SBK, indices_SBK, W_SFD, b_dec, weights_S = (
            tensor[-1:] for tensor in (values_SBK, indices_SBK, W_SFD, b_dec, weights_S)
        )
    slots = _in_memory(values_SBK * weights_S[:, None, None], indices_SBK, W_SFD, None)
    return ops.decode(*slots[:3], weights_S @ b_dec, skip_BD)


def combination(transcoder: CrossLayerTranscoder, layer: int) -> Tensor:
    """[S]: weight of each source's reconstruction of a target."""
    n_sources = len(transcoder.sources_of(layer))
    ones_S = transcoder.decoder_bias(layer).new_ones(n_sources)
    match transcoder.config.independent:
        case "mean":
            return ones_S / n_sources
        case "nearest":
            return torch.where(torch.arange(n_sources, device=ones_S.device) == n_sources - 1, ones_S, 0)
    return ones_S


def squared_error(
    transcoder: CrossLayerTranscoder,
    layer: int,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    b_dec: Tensor,
    y: Tensor,
    weights_B: Tensor | None,
    skip_BD: Tensor | None,
    csr: ops.FeatureCSR | None,
    shared: SourceDecoders | None,
) -> tuple[Tensor, Tensor]:
    """Squared error of a reconstruction, or the mean over independent sources.

    Args:
        transcoder: the transcoder, or one rank's share.
        layer: target layer owned here.
        values_SBK: [S,B,K] activations of this target's sources.
        indices_SBK: [S,B,K] int32 feature numbers.
        b_dec: [D_own] bias; [S,D_own] for independent sources.
        y: [B,D_own] target output; also [S,B,D_own] for independent sources.
        weights_B: [B] weight of each token; None for 1/B.
        skip_BD: [B,D_own] added to the reconstruction, or None.
        csr: grouping of these S layers; default: built in the backward pass.
        shared: as for `decode`.

    Returns:
        error [] over the channels owned here, and the residual, reconstruction - y, detached: [B,D_own], or [S,B,D_own]
        for independent sources.
    """
    values_SBK, indices_SBK, W_SFD, csr = _slots(transcoder, layer, values_SBK, indices_SBK, csr, shared)
    if transcoder.config.independent is None:
        values_SBK, indices_SBK, W_SFD, csr = _in_memory(values_SBK, indices_SBK, W_SFD, csr)
        return ops.decode_loss(values_SBK, indices_SBK, W_SFD, b_dec, y, weights_B, skip_BD, csr)
    errors, residuals = [], []
    for row, y_BD in enumerate(y if y.dim() == 3 else y.expand(len(W_SFD), -1, -1)):
        own = slice(row, row + 1)
        error, residual_BD = ops.decode_loss(
            values_SBK[own], indices_SBK[own], W_SFD[own], b_dec[row], y_BD, weights_B, csr=csr and csr[own]
        )
        errors.append(error)
        residuals.append(residual_BD)
    return torch.stack(errors).mean(), torch.stack(residuals)


def pair_decoder(transcoder: CrossLayerTranscoder, source: int, target: int) -> Tensor:
    """Contribution of each feature of a source to the reconstruction of a target per unit of activation.

    Args:
        transcoder: the transcoder, or one rank's share.
        source: source layer.
        target: one of its targets.

    Returns:
        [F,D_own].
    """
    if transcoder.config.independent is not None:
        row = transcoder.sources_of(target).index(source)
        return combination(transcoder, target)[row] * transcoder.decoder_matrix(target)[row]
    match transcoder.config.tied_decoders:
        case "target":
            return transcoder.decoder_matrix(target)[0]
        case "source":
            scale_F = transcoder.target_scales(source)[transcoder.targets_of(source).index(target)]
            return scale_F[:, None] * transcoder.shared_decoder(source)
    return transcoder.decoder_matrix(target)[transcoder.sources_of(target).index(source)]


def _slots(
    transcoder: CrossLayerTranscoder,
    layer: int,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    csr: ops.FeatureCSR | None,
    shared: SourceDecoders | None,
) -> Slots:
    match transcoder.config.tied_decoders:
        case "target":
            values_BN, indices_BN = (tensor.transpose(0, 1).flatten(1) for tensor in (values_SBK, indices_SBK))
            return values_BN[None], indices_BN[None], transcoder.decoder_matrix(layer), None
        case "source":
            W_SFD, scale_SF = _own_shared(transcoder, layer) if shared is None else shared.into(layer)
            scaled_SBK: Tensor = _Scaled.apply(values_SBK, scale_SF, indices_SBK)
            return scaled_SBK, indices_SBK, W_SFD, csr
    return written(transcoder, layer, values_SBK, indices_SBK), indices_SBK, transcoder.decoder_matrix(layer), csr


def written(transcoder: CrossLayerTranscoder, target: int, values_SBK: Tensor, indices_SBK: Tensor) -> Tensor:
    """Factors of the decoder vectors into a target: activations plus, if the config has them, offsets.

    Args:
        transcoder: the transcoder, or one rank's share.
        target: target layer owned here.
        values_SBK: [S,B,K] activations of its sources.
        indices_SBK: [S,B,K] int32 feature numbers.

    Returns:
        [S,B,K]; 0 in empty slots.
    """
    if not transcoder.config.feature_offset:
        return values_SBK
    offset_SBK = _of_slots(transcoder.feature_offsets(target), indices_SBK)
    # An empty slot writes nothing.
    return torch.where(values_SBK == 0, 0, values_SBK + offset_SBK)


def _in_memory(values_SBK: Tensor, indices_SBK: Tensor, W_SFD: Tensor, csr: ops.FeatureCSR | None) -> Slots:
    """The same arguments, with the needed rows of decoders that stay in their file."""
    if isinstance(W_SFD, MappedDecoder):
        return *W_SFD.of_active(values_SBK, indices_SBK), None
    return values_SBK, indices_SBK, W_SFD, csr


def _own_shared(transcoder: CrossLayerTranscoder, target: int) -> tuple[Tensor, Tensor]:
    """Copies of the decoders [S,F,D] and scales [S,F] of a target's sources, all owned here."""
    sources = transcoder.sources_of(target)
    scales = [transcoder.target_scales(source)[transcoder.targets_of(source).index(target)] for source in sources]
    return torch.stack([transcoder.shared_decoder(source) for source in sources]), torch.stack(scales)


class _Scaled(torch.autograd.Function):
    """Activations times the scales of their features; gradients of the scales are summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values_SBK: Tensor, scale_SF: Tensor, indices_SBK: Tensor) -> Tensor:
        ctx.save_for_backward(values_SBK, scale_SF, indices_SBK)
        return values_SBK * _of_slots(scale_SF, indices_SBK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values_SBK, scale_SF, indices_SBK = ctx.saved_tensors
        amounts_SBK = gradients[0] * values_SBK
        sums = [
            sum_by_feature(*codes, scale_SF.shape[1])
            for codes in zip(amounts_SBK, values_SBK, indices_SBK, strict=True)
        ]
        return gradients[0] * _of_slots(scale_SF, indices_SBK), torch.stack(sums), None


def _of_slots(scale_SF: Tensor, indices_SBK: Tensor) -> Tensor:
    return scale_SF.gather(1, indices_SBK.flatten(1).long()).view(indices_SBK.shape)
