"""Encoding with the rules of `clt.transcoder.sparsity`: from pre-activations to differentiable codes.

Rules that compare all pre-activations of a step hold them in memory at once: B*F numbers per own layer.

Shape letters: L source layers, S sources of one target, B tokens, D d_model, F features per layer, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt.errors import CheckpointError
from clt.kernels import ops
from clt.records import SparseCodes
from clt.transcoder.sparsity import RULES, Peers, Rule, Scores, all_positive

if TYPE_CHECKING:
    from clt.transcoder.model import CrossLayerTranscoder


def encode(transcoder: CrossLayerTranscoder, x_LBD: Tensor, k: int, peers: Peers | None) -> SparseCodes:
    """Codes of the source layers owned here, by the transcoder's rule.

    A training step (peers given, transcoder in training mode) updates decoder norms and the running threshold.
    Otherwise the saved norms are used, and batch_topk fires above its running threshold.

    Args:
        transcoder: the transcoder, or one rank's share.
        x_LBD: [L_own,B,D] standardised encoder inputs of its sources.
        k: active features per token and layer, as the rule uses it.
        peers: processes whose activations are compared with these; None for one that owns all layers.

    Returns:
        Codes [L_own,B,K], values differentiable; K is the same on all ranks that exchange codes.

    Raises:
        CheckpointError: the rule has no inference threshold yet.
    """
    kind, layers = transcoder.config.sparsity.kind, transcoder.share.sources
    trains = peers is not None and transcoder.training
    peers = peers or Peers()
    assert peers.mesh or kind != "joint_topk" or len(layers) == transcoder.n_sources, (
        "joint_topk on a share of the layers needs peers"
    )
    if trains and transcoder.config.sparsity.uses_decoder_norm:
        update_decoder_norms(transcoder, peers)
    fires_above = kind == "batch_topk" and not trains
    rule = all_positive if fires_above else RULES[kind]
    codes, threshold = _activate(transcoder, layers, x_LBD, k, rule, peers, fires_above)
    if trains and threshold is not None:
        _update_threshold(transcoder, threshold)
    return codes


def encode_layer(transcoder: CrossLayerTranscoder, layer: int, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Codes of one layer alone, at inference.

    Args:
        transcoder: the transcoder, or one rank's share.
        layer: source layer owned here.
        x_BD: [B,D] standardised encoder input.
        k: active features per token, for rules that select k.

    Returns:
        values [B,K] and indices [B,K] int32.

    Raises:
        CheckpointError: the rule has no inference threshold yet.
    """
    compares = transcoder.config.sparsity.kind in ("joint_topk", "batch_topk")
    rule = all_positive if compares else RULES[transcoder.config.sparsity.kind]
    codes, _ = _activate(transcoder, (layer,), x_BD[None], k, rule, Peers(), compares)
    return codes.values[0], codes.indices[0]


@torch.no_grad()
def scores_of(transcoder: CrossLayerTranscoder, layer: int, pre_BF: Tensor) -> Tensor:
    """Scores that rules compare: pre-activations, times decoder norm with `sparsity.decoder_norm`.

    Args:
        transcoder: the transcoder, or one rank's share.
        layer: source layer owned here.
        pre_BF: [B,F] its pre-activations.

    Returns:
        [B,F].
    """
    if not transcoder.config.sparsity.uses_decoder_norm:
        return pre_BF
    return pre_BF * transcoder.decoder_norm[layer].to(pre_BF.dtype)


@torch.no_grad()
def update_decoder_norms(transcoder: CrossLayerTranscoder, peers: Peers | None = None) -> None:
    """Sets the norms that rank features to those of the decoders; called at every training step.

    Args:
        transcoder: the transcoder, or one rank's share.
        peers: owners of the other decoders; None for a process that owns all.
    """
    # Rounded to float32: another order of summation changes the last digits of float64, which must not change ranks.
    norms_LF = decoder_squares(transcoder, peers or Peers()).sqrt().to(torch.float32)
    for layer in transcoder.share.sources:
        transcoder.decoder_norm[layer].copy_(norms_LF[transcoder.source_row(layer)])


def decoder_squares(transcoder: CrossLayerTranscoder, peers: Peers) -> Tensor:
    """Squared norm of every feature's decoder vectors over all its targets, [L,F] float64, differentiable.

    In float64, so that the norms do not depend on how the decoders are distributed. One all-reduce forward and one
    backward.
    """
    device = next(transcoder.parameters()).device
    squares_LF = torch.zeros(transcoder.n_sources, transcoder.config.n_features, dtype=torch.float64, device=device)
    for name, W_SFD in transcoder.W_dec.items():
        rows = transcoder.source_rows(int(name))
        # A matrix shared by all sources counts for each of them.
        squares_SF = _RowSquares.apply(W_SFD).expand(rows.stop - rows.start, -1)
        squares_LF = squares_LF + _placed(squares_SF, rows.start, transcoder.n_sources)
    for name, W_FD in transcoder.W_shared.items():
        squares_F = transcoder.target_scales(int(name)).double().square().sum(dim=0) * _RowSquares.apply(W_FD)
        squares_LF = squares_LF + _placed(squares_F[None], transcoder.source_row(int(name)), transcoder.n_sources)
    summed: Tensor = _SumOverPeers.apply(squares_LF, peers)
    return summed


def decoder_norms(transcoder: CrossLayerTranscoder, source: int) -> Tensor:
    """Norm of every feature's decoder vectors over all targets of one source, [F] float64 on the CPU, detached.

    Unlike `decoder_squares` it reads decoders that stay in their files, and combines independent sources.
    """
    squares_F = torch.zeros(transcoder.config.n_features, dtype=torch.float64)
    for target in transcoder.targets_of(source):
        squares_F += transcoder.decoder(source, target).detach().double().square().sum(1).cpu()
    return squares_F.sqrt()


def _placed(squares_SF: Tensor, start: int, n_rows: int) -> Tensor:
    """[L,F]: zeros except for these rows."""
    return torch.nn.functional.pad(squares_SF, (0, 0, start, n_rows - start - len(squares_SF)))


def sum_by_feature(amounts_BK: Tensor, values_BK: Tensor, indices_BK: Tensor, n_features: int) -> Tensor:
    """Sum over the filled slots of each feature, bitwise reproducible.

    Args:
        amounts_BK: [B,K] numbers to sum.
        values_BK: [B,K] activations; slots with 0 are empty.
        indices_BK: [B,K] int32 feature numbers.
        n_features: features of the layer, F.

    Returns:
        [F].
    """
    csr = ops.feature_csr(values_BK[None], indices_BK[None], n_features)
    # The gradient of the encoder bias is this sum.
    nothing_BD = amounts_BK.new_zeros(len(amounts_BK), 1)
    return ops.encoder_grad(amounts_BK.contiguous(), values_BK, indices_BK, nothing_BD, n_features, csr)[1]


def jump(values_BK: Tensor, log_threshold_F: Tensor, indices_BK: Tensor, bandwidth: float) -> Tensor:
    """Activations that passed their thresholds, with a straight-through gradient for the thresholds.

    The gradient of log threshold t is -(t/w) * t * sum of dL/dz over the activations in (t, t + w]: a rectangular
    kernel of width w on the upper side (Rajamanoharan et al. 2024, "Jumping ahead", use both sides). Activations below
    the threshold are zero and have no slot: including them would make the step dense in the window and enlarge the
    exchange of codes. `clt.transcoder.penalty` adds the curvature term by which the slope of the loss below the
    threshold differs from that above it, so that the two estimates agree as w goes to 0.

    Args:
        values_BK: [B,K] pre-activations above their thresholds, 0 in empty slots.
        log_threshold_F: [F].
        indices_BK: [B,K] int32 feature numbers.
        bandwidth: w, in standardised units.

    Returns:
        The same values.
    """
    passed: Tensor = _Jump.apply(values_BK, log_threshold_F, indices_BK, bandwidth)
    return passed


def in_window(values_BK: Tensor, thresholds_BK: Tensor, bandwidth: float) -> Tensor:
    """Slots that are filled and at most a bandwidth above their threshold.

    Args:
        values_BK: [B,K] activations.
        thresholds_BK: [B,K] thresholds of their features.
        bandwidth: in standardised units.

    Returns:
        [B,K] bool.
    """
    return (values_BK != 0) & (values_BK <= thresholds_BK + bandwidth)


def _activate(
    transcoder: CrossLayerTranscoder,
    layers: Sequence[int],
    x_LBD: Tensor,
    k: int,
    rule: Rule,
    peers: Peers,
    fires_above: bool,
) -> tuple[SparseCodes, Tensor | None]:
    """Codes of these layers by a rule, and the rule's threshold."""
    with torch.no_grad():
        pre = [ops.preactivations(x, *transcoder.encoder(layer)) for layer, x in zip(layers, x_LBD, strict=True)]
        empty = x_LBD.new_zeros(0, x_LBD.shape[1], transcoder.config.n_features)
        own = [_eligible(transcoder, layer, pre_BF, fires_above) for layer, pre_BF in zip(layers, pre, strict=True)]
        rows = tuple(transcoder.source_row(layer) for layer in layers)
        own_LBF = torch.stack(own) if own else empty
        selected = rule(Scores(own_LBF=own_LBF, rows=rows, n_layers=transcoder.n_sources, peers=peers), k)
        del own, own_LBF
        picked = [
            _pick(pre_BF, scores_BK, indices_BK)
            for pre_BF, scores_BK, indices_BK in zip(pre, selected.scores_LBK, selected.indices_LBK, strict=True)
        ]
        del pre
    values = []
    for layer, x_BD, picked_BK, indices_BK in zip(layers, x_LBD, picked, selected.indices_LBK, strict=True):
        values_BK = ops.encode_selected(x_BD, *transcoder.encoder(layer), picked_BK, indices_BK)
        if transcoder.config.sparsity.kind == "jumprelu":
            bandwidth = transcoder.config.sparsity.bandwidth
            values_BK = jump(values_BK, transcoder.log_thresholds(layer), indices_BK, bandwidth)
        values.append(values_BK)
    values_LBK = torch.stack(values) if values else selected.scores_LBK
    codes = SparseCodes(values=values_LBK, indices=selected.indices_LBK, n_features=transcoder.config.n_features)
    return codes, selected.threshold


def _eligible(transcoder: CrossLayerTranscoder, layer: int, pre_BF: Tensor, fires_above: bool) -> Tensor:
    """Scores of a layer, 0 where its thresholds exclude them."""
    scores_BF = scores_of(transcoder, layer, pre_BF)
    if transcoder.config.sparsity.kind != "topk":
        scores_BF = _one_nan(scores_BF)
    if transcoder.config.sparsity.kind == "jumprelu":
        return scores_BF.masked_fill(scores_BF <= transcoder.log_thresholds(layer).exp(), 0)
    if fires_above:
        threshold = transcoder.threshold[layer]
        if bool(threshold.isnan()):
            raise CheckpointError(
                f"sparsity.kind={transcoder.config.sparsity.kind}: the transcoder has no inference threshold; set "
                "one with clt.convert.thresholds.calibrate_threshold, or convert it with "
                "clt.convert.thresholds.to_jumprelu"
            )
        return scores_BF.masked_fill(scores_BF <= threshold.to(scores_BF.dtype), 0)
    return scores_BF


def _one_nan(scores_BF: Tensor) -> Tensor:
    """Replaces all scores of a token with non-finite ones by a single NaN, which fills one slot only."""
    broken_BF = ~scores_BF.isfinite()
    scores_BF = scores_BF.masked_fill(broken_BF, 0)
    scores_BF[:, 0].masked_fill_(broken_BF.any(dim=1), torch.nan)
    return scores_BF


def _pick(pre_BF: Tensor, scores_BK: Tensor, indices_BK: Tensor) -> Tensor:
    """Pre-activations of the filled slots; NaN scores are kept, so that they reach the loss and are detected."""
    picked_BK = torch.where(scores_BK != 0, pre_BF.gather(1, indices_BK.long()), 0)
    return picked_BK.masked_fill(scores_BK.isnan(), torch.nan)


@torch.no_grad()
def _update_threshold(transcoder: CrossLayerTranscoder, threshold: Tensor) -> None:
    """Updates the running mean of the threshold; the first value initialises it."""
    for layer in transcoder.share.sources:
        old, new = transcoder.threshold[layer], threshold.to(torch.float64)
        followed = torch.where(old.isnan(), new, torch.lerp(new, old, transcoder.config.sparsity.threshold_decay))
        # All ranks skip a non-finite step, so it does not change the threshold.
        old.copy_(torch.where(new.isfinite(), followed, old))


class _RowSquares(torch.autograd.Function):
    """Squared norms of rows in float64, without a squared copy of the weights."""

    @staticmethod
    def forward(ctx: Any, W_SFD: Tensor) -> Tensor:
        ctx.save_for_backward(W_SFD)
        return torch.linalg.vector_norm(W_SFD, dim=-1, dtype=torch.float64).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (W_SFD,) = ctx.saved_tensors
        return 2 * gradients[0].to(W_SFD.dtype)[..., None] * W_SFD


class _SumOverPeers(torch.autograd.Function):
    """Sum over the model group; every rank's part of the loss depends on it, so the gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.sum(tensor.clone(), "model")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.peers.sum(gradients[0].clone(), "model"), None


class _Jump(torch.autograd.Function):
    """See `jump`."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, log_threshold_F: Tensor, indices_BK: Tensor, bandwidth: float) -> Tensor:
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values_BK, log_threshold_F, indices_BK)
        return values_BK.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, log_threshold_F, indices_BK = ctx.saved_tensors
        thresholds_BK = log_threshold_F.exp()[indices_BK.long()]
        slope_BK = -gradients[0] * thresholds_BK.square() / ctx.bandwidth
        amounts_BK = torch.where(in_window(values_BK, thresholds_BK, ctx.bandwidth), slope_BK, 0)
        grad_F = sum_by_feature(amounts_BK, values_BK, indices_BK, len(log_threshold_F))
        return gradients[0], grad_F, None, None
