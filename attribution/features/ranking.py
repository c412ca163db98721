"""Ranks the features of a prompt by influence, and finds matched controls for the top ones.

A graph has one node per position at which a feature is active. Ablating a feature at all positions needs one number per
feature, so influence and output norm are summed over positions. A control is another active feature of the same layer
with a similar output norm (`clt.attribution.features.steering`).
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
class RankedFeatures:
    """The P distinct features that are active in a prompt, most influential first.

    Attributes:
        layer: [P] int64, source layer.
        feature: [P] int64, feature number within its layer.
        influence: [P] float64, summed over positions.
        output_norm: [P] float64, decoder norm times activation, summed over positions.
    """

    layer: Tensor
    feature: Tensor
    influence: Tensor
    output_norm: Tensor

    def __len__(self) -> int:
        return len(self.layer)


def rank_features(graph: Graph, transcoder: CrossLayerTranscoder) -> RankedFeatures:
    """The active features of a graph, most influential first; ties by layer, then feature number.

    Args:
        graph: a graph whose only targets are those that the influence is on.
        transcoder: its transcoder, folded, so that output norms are in the model's units.

    Returns:
        The features, on the CPU.
    """
    nodes, n_features = graph.nodes, transcoder.config.n_features
    columns = nodes.is_kind(NodeKind.FEATURE)
    keys, key_of_column = torch.unique(
        nodes.layer[columns].long() * n_features + nodes.feature[columns], return_inverse=True
    )

    def over_positions(values: Tensor) -> Tensor:
        return torch.zeros(len(keys), dtype=torch.float64).index_add_(0, key_of_column, values.double())

    layer, feature = keys // n_features, keys % n_features
    norm = torch.cat(
        [decoder_norms(transcoder, source)[feature[layer == source]] for source in layer.unique().tolist()]
    )
    total = over_positions(influence(graph)[columns])
    order = total.argsort(descending=True, stable=True)
    return RankedFeatures(
        layer=layer[order],
        feature=feature[order],
        influence=total[order],
        output_norm=(over_positions(nodes.activation[columns]) * norm)[order],
    )


def match_controls(features: RankedFeatures, n: int) -> Tensor | None:
    """Matches each of the top n features with another one of its layer that has a similar output norm.

    Greedy, from the largest output norm down, because large ones have the fewest similar ones: each feature gets the
    free one whose output norm has the ratio to its own closest to 1.

    Args:
        features: the features; the first n are no controls.
        n: number of features to match.

    Returns:
        [n] int64 indices into `features`, or None when a layer has too few other features.
    """
    log_norm = features.output_norm.log()
    free = torch.arange(len(features)) >= n
    controls = torch.empty(n, dtype=torch.int64)
    for chosen in log_norm[:n].argsort(descending=True, stable=True).tolist():
        candidates = (free & (features.layer == features.layer[chosen])).nonzero()[:, 0]
        if len(candidates) == 0:
            return None
        nearest = candidates[(log_norm[candidates] - log_norm[chosen]).abs().argmin()]
        controls[chosen] = nearest
        free[nearest] = False
    return controls
