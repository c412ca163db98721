"""The (layer, feature) pairs of a prompt: ranked by their influence in its graph, and matched with others as a control.

A graph has a node per position at which a feature is active; an experiment that changes a feature everywhere needs one
number per feature. The control answers the objection that any change of that size would have done: it changes features
of the same layers that write about as much (`clt.attribution.features.steering`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt.attribution.graphs.graph import Graph, NodeKind
from clt.attribution.graphs.scores import influence
from clt.transcoder.encoding import decoder_norms
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class FeaturePairs:
    """The P distinct (layer, feature) pairs that are active in a prompt, most influential first.

    Attributes:
        layer: [P] int64.
        feature: [P] int64.
        influence: [P] float64, summed over positions.
        strength: [P] float64, decoder norm times activation, summed over positions.
    """

    layer: Tensor
    feature: Tensor
    influence: Tensor
    strength: Tensor


def rank_pairs(graph: Graph, transcoder: CrossLayerTranscoder) -> FeaturePairs:
    """The active (layer, feature) pairs of a graph, most influential first; ties by layer, then feature number.

    Args:
        graph: a graph whose only targets are what the influence is on.
        transcoder: its transcoder, folded, so that strengths are in the model's units.

    Returns:
        The pairs, on the CPU.
    """
    nodes, n_features = graph.nodes, transcoder.config.n_features
    columns = nodes.is_kind(NodeKind.FEATURE)
    keys, pair_of_column = torch.unique(
        nodes.layer[columns].long() * n_features + nodes.feature[columns], return_inverse=True
    )

    def over_positions(values: Tensor) -> Tensor:
        return torch.zeros(len(keys), dtype=torch.float64).index_add_(0, pair_of_column, values.double())

    layer, feature = keys // n_features, keys % n_features
    norm = torch.cat(
        [decoder_norms(transcoder, source)[feature[layer == source]] for source in layer.unique().tolist()]
    )
    total = over_positions(influence(graph)[columns])
    order = total.argsort(descending=True, stable=True)
    return FeaturePairs(
        layer=layer[order],
        feature=feature[order],
        influence=total[order],
        strength=(over_positions(nodes.activation[columns]) * norm)[order],
    )


def match_controls(pairs: FeaturePairs, n: int) -> Tensor | None:
    """Finds for each of the first n pairs another one of the same layer that writes about as much.

    The strongest pair is served first, for it has the fewest likenesses; each takes the free pair whose strength has
    the ratio to its own closest to 1.

    Args:
        pairs: the pairs; the first n are the chosen ones and are no controls.
        n: how many to match.

    Returns:
        [n] int64 indices into `pairs`, or None when a layer has too few other pairs.
    """
    log_strength = pairs.strength.log()
    free = torch.arange(len(pairs.layer)) >= n
    controls = torch.empty(n, dtype=torch.int64)
    for chosen in log_strength[:n].argsort(descending=True, stable=True).tolist():
        candidates = (free & (pairs.layer == pairs.layer[chosen])).nonzero()[:, 0]
        if len(candidates) == 0:
            return None
        nearest = candidates[(log_strength[candidates] - log_strength[chosen]).abs().argmin()]
        controls[chosen] = nearest
        free[nearest] = False
    return controls
