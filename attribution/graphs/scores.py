"""Influence, pruning and scores of an attribution graph.

Ameisen et al. 2025, "Circuit Tracing", sections "Pruning" and "Evaluating graphs". Three conventions on top of it:

* Biases are neither explained nor error. They are left out of the normalisation of a row, so the scores are those of
  the paper, whose graphs have no bias nodes. Pruning keeps a bias node above the cutoff that the other nodes set.
* Completeness averages over rows that have inputs: features and targets. Errors and tokens have none.
* A path that ends at a feature without a row (`max_feature_nodes`) counts as error. So a cap can only lower the
  replacement score, by at most the share reported as `uncomputed`.

Shapes: R rows (nodes with inputs), N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt.attribution.graphs.graph import Graph, NodeKind
from clt.errors import GraphError

#: Rows handled at once in float64.
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class GraphScores:
    """Replacement and completeness score of a graph.

    Attributes:
        replacement: influence-weighted fraction of the paths from the targets that end at tokens and not at errors.
        completeness: influence-weighted fraction of each node's input that does not come from error nodes.
        uncomputed: fraction of the paths that end at features without a row; both scores count it as error.
    """

    replacement: float
    completeness: float
    uncomputed: float


@dataclass(frozen=True, kw_only=True, repr=False)
class PrunedGraph:
    """The part of a graph that holds most of the influence.

    Attributes:
        graph: the unpruned graph.
        node_mask: [N] bool, kept nodes.
        edge_mask: [R,N] bool, kept edges.
        influence: [N] float64, influence of every node in the unpruned graph.
    """

    graph: Graph
    node_mask: Tensor
    edge_mask: Tensor
    influence: Tensor

    def __repr__(self) -> str:
        nodes, edges = int(self.node_mask.sum()), int(self.edge_mask.sum())
        return f"PrunedGraph(nodes={nodes} of {self.node_mask.numel()}, edges={edges} of {self.edge_mask.numel()})"

    def edge_list(self) -> tuple[Tensor, Tensor, Tensor]:
        """Source nodes [E], target nodes [E] and weights [E] of the kept edges, strongest first."""
        rows, sources = self.edge_mask.nonzero(as_tuple=True)
        weights = self.graph.edges[rows, sources]
        order = weights.abs().argsort(descending=True, stable=True)
        return sources[order], self.graph.rows_to_node[rows[order]], weights[order]


def influence(graph: Graph) -> Tensor:
    """Influence of each node on the targets: the targets' rows of (I - A)^-1 - I.

    A is the adjacency matrix in absolute value, each row divided by its sum without biases. A node has influence 1 when
    every path from the targets passes through it once; targets have none.

    Args:
        graph: an unpruned graph.

    Returns:
        [N] float64.

    Raises:
        GraphError: the edges form a cycle.
    """
    everything = torch.ones(len(graph.nodes), dtype=torch.bool)
    return _influence(graph, everything, through=everything)


def replacement_score(graph: Graph, keep: Tensor | None = None) -> float:
    """Influence-weighted fraction of the paths from the targets that end at tokens and not at errors; see `score`."""
    return score(graph, keep).replacement


def completeness_score(graph: Graph, keep: Tensor | None = None) -> float:
    """Influence-weighted fraction of each node's input that does not come from error nodes; see `score`."""
    return score(graph, keep).completeness


def score(graph: Graph, keep: Tensor | None = None) -> GraphScores:
    """Replacement and completeness score.

    Args:
        graph: an unpruned graph.
        keep: [N] bool, nodes of a pruned graph; the others count as errors. Default: all.

    Returns:
        The scores, each between 0 and 1.

    Raises:
        GraphError: no target has an input, or the edges form a cycle.
    """
    nodes = graph.nodes
    everything = torch.ones(len(nodes), dtype=torch.bool)
    keep = everything if keep is None else keep
    tokens = nodes.is_kind(NodeKind.TEXT, NodeKind.IMAGE) & keep
    inputs = ~nodes.is_kind(NodeKind.BIAS, NodeKind.LOGIT)
    errors = inputs & (nodes.is_kind(NodeKind.ERROR) | graph.without_row | ~keep)
    counted = torch.stack([inputs, errors], dim=1).double()
    flow = _influence(graph, everything, through=keep)
    ends = flow[tokens].sum() + flow[errors].sum()
    if ends == 0:
        raise GraphError("all inputs of the graph's targets are biases; choose another target")
    weights = graph.target_weights + torch.where(keep, flow, 0.0)[graph.rows_to_node]
    explained, total = 0.0, 0.0
    for rows in weights.nonzero()[:, 0].split(_CHUNK):
        sums, missing = (graph.edges[rows].double().abs_() @ counted).T
        has_inputs = sums > 0
        share = 1 - missing[has_inputs] / sums[has_inputs]
        explained += float(weights[rows][has_inputs] @ share)
        total += float(weights[rows][has_inputs].sum())
    return GraphScores(
        replacement=float(flow[tokens].sum() / ends),
        completeness=explained / total,
        uncomputed=float(flow[graph.without_row].sum() / ends),
    )


def prune(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
    """The smallest set of nodes, then of edges, that holds the given shares of influence.

    Tokens and targets are always kept. Edges are scored in the renormalised graph of the kept nodes. Then features
    and errors without an outgoing edge, and features without an incoming one, are removed until nothing changes.

    Args:
        graph: an unpruned graph.
        node_threshold: share of the nodes' influence to keep, above 0 and at most 1.
        edge_threshold: share of the edges' influence to keep, above 0 and at most 1.

    Returns:
        Masks of the kept nodes and edges.

    Raises:
        GraphError: a threshold is out of range, or the edges form a cycle.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < threshold <= 1:
            raise GraphError(f"{name}={threshold}: must be above 0 and at most 1")
    nodes = graph.nodes
    biases = nodes.is_kind(NodeKind.BIAS)
    always = nodes.is_kind(NodeKind.TEXT, NodeKind.IMAGE, NodeKind.LOGIT)
    node_score = influence(graph)
    node_mask = always | ((node_score > 0) & (node_score >= _cutoff(node_score[~biases], node_threshold)))

    edge_weight = graph.target_weights + _influence(graph, node_mask, through=node_mask)[graph.rows_to_node]
    rows = (node_mask[graph.rows_to_node] & (edge_weight > 0)).nonzero()[:, 0]
    columns = node_mask.nonzero()[:, 0]
    magnitude = graph.edges[rows][:, columns].double().abs()
    sums = magnitude[:, ~biases[columns]].sum(1, keepdim=True)
    edge_score = magnitude / torch.where(sums > 0, sums, torch.inf) * edge_weight[rows, None]
    kept = (edge_score > 0) & (edge_score >= _cutoff(edge_score[:, ~biases[columns]].flatten(), edge_threshold))

    edge_mask = torch.zeros(graph.edges.shape, dtype=torch.bool)
    edge_mask[rows[:, None], columns] = kept
    return _without_loose_ends(graph, node_mask, edge_mask, always, node_score)


def _without_loose_ends(
    graph: Graph, node_mask: Tensor, edge_mask: Tensor, always: Tensor, node_score: Tensor
) -> PrunedGraph:
    has_row = torch.zeros_like(node_mask)
    has_row[graph.rows_to_node] = True
    while True:
        has_input = torch.zeros_like(node_mask)
        has_input[graph.rows_to_node] = edge_mask.any(1)
        remains = node_mask & (always | (edge_mask.any(0) & (has_input | ~has_row)))
        if torch.equal(remains, node_mask):
            return PrunedGraph(graph=graph, node_mask=node_mask, edge_mask=edge_mask, influence=node_score)
        node_mask = remains
        edge_mask &= remains & remains[graph.rows_to_node, None]


def _influence(graph: Graph, columns: Tensor, *, through: Tensor) -> Tensor:
    """Influence [N] in the graph restricted to `columns`; paths continue from the nodes in `through` only."""
    counted = columns & ~graph.nodes.is_kind(NodeKind.BIAS)
    flow = spread(graph.edges, graph.rows_to_node, graph.target_weights, counted, through, graph.n_layers)
    return flow * columns


def spread(
    edges: Tensor, rows_to_node: Tensor, weights: Tensor, counted: Tensor, through: Tensor, n_layers: int
) -> Tensor:
    """Power series of the normalised adjacency matrix, from the rows' weights to all nodes.

    Args:
        edges: [R,N].
        rows_to_node: [R] int64, distinct.
        weights: [R] float64, weight of the paths that start at each row.
        counted: [N] bool, columns over which a row is normalised.
        through: [N] bool, nodes from which paths continue.
        n_layers: decoder layers; a path has at most one feature per layer.

    Returns:
        [N] float64, for columns that are not counted too.

    Raises:
        GraphError: paths are longer than the layers allow.
    """
    total = torch.zeros(edges.shape[1], dtype=torch.float64)
    for _ in range(n_layers + 2):
        received = torch.zeros_like(total)
        for rows in weights.nonzero()[:, 0].split(_CHUNK):
            magnitude = edges[rows].double().abs_()
            sums = magnitude @ counted.double()
            received += torch.where(sums > 0, weights[rows] / sums, 0.0) @ magnitude
        if not bool(received.any()):
            return total
        total += received
        weights = torch.where(through, received, 0.0)[rows_to_node]
    raise GraphError("the edges of the graph form a cycle; compute the graph again")


def _cutoff(scores: Tensor, threshold: float) -> Tensor:
    """The smallest of the largest scores that together hold the threshold's share of the sum."""
    ordered = scores.sort(descending=True).values
    if len(ordered) == 0:
        return torch.zeros((), dtype=scores.dtype)
    cumulative = ordered.cumsum(0)
    return ordered[torch.searchsorted(cumulative, threshold * cumulative[-1])]
