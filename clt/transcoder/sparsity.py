"""Selection rules from pre-activations to activations, exact for every split of layers and tokens over ranks.

    topk        the k largest of a token and source layer
    joint_topk  the k*L largest of a token over its L source layers, weighted by decoder norm
    batch_topk  the k*L*B largest of all B tokens of a step (Bussmann et al. 2024, "BatchTopK sparse autoencoders")
    jumprelu    those above a learned threshold of the feature (Rajamanoharan et al. 2024, "Jumping ahead")
    relu        all positive ones

Rules compare scores: pre-activations, times decoder norm if configured. Ties go to the lowest (layer, token, feature);
data ranks hold consecutive tokens. Ranks exchange counts only. All rules but topk use K = the largest count over the
ranks that exchange codes: one all-reduce and one host sync per step. Shape letter N: candidates of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from clt.kernels import ops


class MeshLike(Protocol):
    """Subset of `clt.distributed.mesh.Mesh` that rules use: rank on the data axis, reductions over an axis."""

    @property
    def data_rank(self) -> int: ...

    @property
    def data_size(self) -> int: ...

    def all_reduce(
        self, tensor: Tensor, axis: Literal["model", "world"], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        """See `clt.distributed.mesh.Mesh.all_reduce`."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Processes whose activations are compared with those of this process.

    Attributes:
        mesh: the processes; None for a single process.
    """

    mesh: MeshLike | None = None

    @property
    def data_rank(self) -> int:
        """Rank on the data axis."""
        return self.mesh.data_rank if self.mesh else 0

    @property
    def data_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.mesh.data_size if self.mesh else 1

    def sum(self, tensor: Tensor, over: Literal["model", "world"]) -> Tensor:
        """Sums a tensor in place over the ranks with the same tokens ("model") or all ranks, and returns it."""
        return self.mesh.all_reduce(tensor, over) if self.mesh else tensor

    def slots(self, counts_LB: Tensor) -> int:
        """Largest count over the ranks that exchange codes, at least 1; a host sync."""
        most = counts_LB.max().long() if counts_LB.numel() else counts_LB.new_zeros((), dtype=torch.int64)
        if self.mesh:
            most = self.mesh.all_reduce(most, "model", dist.ReduceOp.MAX)
        return max(1, int(most))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of the source layers owned here, as a rule compares them.

    Attributes:
        own_LBF: [L_own,B,F] scores of the source layers owned here; only positive ones can be selected.
        rows: index of each own layer among all source layers, ascending.
        n_layers: number of all source layers, L.
        peers: owners of the other layers.
    """

    own_LBF: Tensor
    rows: tuple[int, ...]
    n_layers: int
    peers: Peers


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Features selected by a rule.

    Attributes:
        scores_LBK: [L_own,B,K] scores, 0 in empty slots.
        indices_LBK: [L_own,B,K] int32 feature numbers, ascending, empty slots last as 0.
        threshold: [] lowest selected score over all ranks, for rules with one threshold per batch; NaN if any score
            was NaN.
    """

    scores_LBK: Tensor
    indices_LBK: Tensor
    threshold: Tensor | None = None


Rule = Callable[[Scores, int], Selected]


def topk_of_layer(scores: Scores, k: int) -> Selected:
    """The k largest of each token and layer; no communication."""
    layers, tokens, n_features = scores.own_LBF.shape
    if not layers:
        return _stacked((), scores.own_LBF, k)
    values, indices = ops.select_topk(scores.own_LBF.reshape(-1, n_features), k)
    return Selected(scores_LBK=values.view(layers, tokens, k), indices_LBK=indices.view(layers, tokens, k))


def topk_of_token(scores: Scores, k: int) -> Selected:
    """The k*L largest of each token over all layers; one all-reduce of [B,256] per radix digit, one of [L,B]."""
    layers, tokens, n_features = scores.own_LBF.shape
    n = k * scores.n_layers
    flat = scores.own_LBF.transpose(0, 1).reshape(tokens, -1)
    # Only the own n largest can be among the n largest of all; of ties, at most the first n.
    width = min(n, flat.shape[1])
    best_BN, place_BN = ops.select_topk(flat, width) if width else (flat, flat.int())
    threshold_B, quota_B = ops.token_threshold(best_BN, n, lambda counts: scores.peers.sum(counts, "model"))
    row_BN = (place_BN // n_features).long()
    tied_BN = (best_BN == threshold_B[:, None]) & (best_BN > 0)
    above_BN = ~(best_BN <= threshold_B[:, None]) & (best_BN != 0)
    tied_LB = _count_rows(tied_BN, row_BN, layers)
    wanted_LB = _tie_quota(tied_LB, quota_B, scores)
    chosen_BN = above_BN | (tied_BN & (_rank_in_row(tied_BN, tied_LB, row_BN) < _of_row(wanted_LB, row_BN)))
    counts_LB = _count_rows(chosen_BN, row_BN, layers)
    slots = scores.peers.slots(counts_LB)
    slot_BN = row_BN * slots + _rank_in_row(chosen_BN, counts_LB, row_BN)
    # Candidates that are not selected go to an extra slot, which is dropped.
    slot_BN = torch.where(chosen_BN, slot_BN, layers * slots)
    parts = []
    for amounts_BN in (best_BN, (place_BN % n_features)):
        out = amounts_BN.new_zeros(tokens, layers * slots + 1).scatter_(1, slot_BN, amounts_BN)
        parts.append(out[:, :-1].reshape(tokens, layers, slots).transpose(0, 1).contiguous())
    return Selected(scores_LBK=parts[0], indices_LBK=parts[1])


def topk_of_batch(scores: Scores, k: int) -> Selected:
    """The k*L*B largest of all tokens and layers; an all-reduce of 256 counts per radix digit, one of [L + 1, data]."""
    peers, own_LBF = scores.peers, scores.own_LBF
    layers, tokens, n_features = own_LBF.shape
    flat = own_LBF.reshape(-1, n_features) if layers else own_LBF.new_zeros(1, n_features)
    n = k * scores.n_layers * tokens * peers.data_size
    threshold, quota = ops.batch_threshold(flat, n, lambda counts: peers.sum(counts, "world"))
    above_LB = own_LBF.new_zeros(layers, tokens, dtype=torch.int64)
    tied_LB = torch.zeros_like(above_LB)
    for row, own_BF in enumerate(own_LBF):
        above_LB[row] = (~(own_BF <= threshold)).sum(dim=1)
        tied_LB[row] = ((own_BF == threshold) & (own_BF > 0)).sum(dim=1)
    # Ties go to the lowest (layer, token, feature) = (layer, data rank, own token, feature): count the ties before each
    # own layer. The last row counts NaN scores.
    table = tied_LB.new_zeros(scores.n_layers + 1, peers.data_size)
    table[list(scores.rows), peers.data_rank] = tied_LB.sum(dim=1)
    table[-1, peers.data_rank] = own_LBF.isnan().sum()
    table = peers.sum(table, "world")
    before = (table.view(-1).cumsum(0).view_as(table) - table)[list(scores.rows), peers.data_rank]
    quota_L = (quota - before).clamp(min=0)
    wanted_LB = (quota_L[:, None] - (tied_LB.cumsum(1) - tied_LB)).clamp(min=0).minimum(tied_LB)
    slots = min(n_features, peers.slots(above_LB + wanted_LB))
    chosen = [ops.select_above(own_BF, threshold, quota_L[row], slots)[:2] for row, own_BF in enumerate(own_LBF)]
    known = torch.where(table[-1].sum() == 0, threshold, torch.nan)
    return replace(_stacked(chosen, own_LBF, slots), threshold=known)


def all_positive(scores: Scores, k: int) -> Selected:
    """Every positive score; k is not used."""
    own_LBF = scores.own_LBF
    counts_LB = (~(own_LBF <= 0)).sum(dim=2)
    slots = scores.peers.slots(counts_LB)
    zero = own_LBF.new_zeros(())
    chosen = [ops.select_above(own_BF, zero, zero.long(), slots)[:2] for own_BF in own_LBF]
    return _stacked(chosen, own_LBF, slots)


RULES: dict[str, Rule] = {
    "topk": topk_of_layer,
    "joint_topk": topk_of_token,
    "batch_topk": topk_of_batch,
    "jumprelu": all_positive,
    "relu": all_positive,
}


def _stacked(chosen: Sequence[tuple[Tensor, Tensor]], own_LBF: Tensor, slots: int) -> Selected:
    if not chosen:
        empty = own_LBF.new_zeros(0, own_LBF.shape[1], slots)
        return Selected(scores_LBK=empty, indices_LBK=empty.int())
    values, indices = (torch.stack(tensors) for tensors in zip(*chosen, strict=True))
    return Selected(scores_LBK=values, indices_LBK=indices)


def _tie_quota(tied_LB: Tensor, quota_B: Tensor, scores: Scores) -> Tensor:
    """[L_own,B]: number of ties to select in each own layer; lower layers of all ranks come first."""
    table_LB = tied_LB.new_zeros(scores.n_layers, len(quota_B))
    table_LB[list(scores.rows)] = tied_LB
    table_LB = scores.peers.sum(table_LB, "model")
    before_LB = (table_LB.cumsum(0) - table_LB)[list(scores.rows)]
    return (quota_B - before_LB).clamp(min=0)


def _count_rows(marked_BN: Tensor, row_BN: Tensor, layers: int) -> Tensor:
    """[L_own,B]: number of marked candidates of each layer."""
    return marked_BN.new_zeros(len(marked_BN), layers, dtype=torch.int64).scatter_add_(1, row_BN, marked_BN.long()).T


def _rank_in_row(marked_BN: Tensor, counts_LB: Tensor, row_BN: Tensor) -> Tensor:
    """[B,N]: number of earlier marked candidates of the same layer; candidates ascend by (layer, feature)."""
    return marked_BN.cumsum(1) - marked_BN.long() - _of_row(counts_LB.cumsum(0) - counts_LB, row_BN)


def _of_row(amounts_LB: Tensor, row_BN: Tensor) -> Tensor:
    return amounts_LB.T.gather(1, row_BN)
