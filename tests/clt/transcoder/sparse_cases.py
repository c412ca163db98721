"""Small transcoders of every kind of sparsity, and what the kinds mean by definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clt.records import SparseCodes
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.encoding import update_decoder_norms
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

L, D, F, K = 3, 4, 7, 2

KINDS = ("topk", "joint_topk", "batch_topk", "jumprelu", "relu")


def make_clt(kind: str, dtype: torch.dtype = torch.float64, **sparsity: Any) -> CrossLayerTranscoder:
    """A transcoder with random weights and norms that are theirs."""
    config = CLTConfig(
        n_layers=L,
        d_model=D,
        n_features=F,
        k=K,
        sparsity=SparsitySettings(kind=kind, **sparsity),  # type: ignore[arg-type]
    )
    transcoder = CrossLayerTranscoder(config, Scaling.identity(L, D)).to(dtype)
    with torch.no_grad():
        for group in (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_dec):
            for parameter in group.values():
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
        for parameter in transcoder.log_threshold.values():
            parameter.copy_(torch.randn(parameter.shape).mul(0.5) - 0.5)
    if config.sparsity.uses_decoder_norm:
        update_decoder_norms(transcoder)
    return transcoder


def dense(codes: SparseCodes) -> Tensor:
    """Activations as [L,B,F], differentiable."""
    layers, tokens, _ = codes.values.shape
    zeros = codes.values.new_zeros(layers, tokens, codes.n_features)
    return zeros.scatter_add(2, codes.indices.long(), codes.values)


def largest(scores: Tensor, n: int) -> Tensor:
    """Mask of the n largest positive entries of each row; ties go to the lowest place."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    return mask & ~(scores <= 0)


def by_definition(kind: str, scores_LBF: Tensor, k: int) -> Tensor:
    """[L,B,F] mask of what a rule selects."""
    layers, tokens, n_features = scores_LBF.shape
    if kind == "topk":
        return largest(scores_LBF.reshape(-1, n_features), k).view_as(scores_LBF)
    if kind == "joint_topk":
        flat = scores_LBF.transpose(0, 1).reshape(tokens, -1)
        return largest(flat, k * layers).view(tokens, layers, n_features).transpose(0, 1)
    if kind == "batch_topk":
        return largest(scores_LBF.reshape(1, -1), k * layers * tokens).view_as(scores_LBF)
    return scores_LBF > 0


def scores_by_hand(transcoder: CrossLayerTranscoder, x_LBD: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations and scores [L,B,F] of a whole transcoder."""
    pre = torch.stack([x @ transcoder.W_enc[str(i)].T + transcoder.b_enc[str(i)] for i, x in enumerate(x_LBD)])
    norms = torch.zeros(L, F, dtype=pre.dtype)
    for source in range(L):
        rows = [
            transcoder.W_dec[str(t)][source - transcoder.sources_of(t).start] for t in transcoder.targets_of(source)
        ]
        norms[source] = torch.cat(rows, dim=1).norm(dim=1)
    return pre, pre * norms[:, None] if transcoder.config.sparsity.uses_decoder_norm else pre
