"""Turns the columns and rows of a `Graph` into the entries of its JSON document.

Node ids are those of circuit-tracer (`layer_feature_position`, `E_token_position`) where these are unique. Others are
`error_layer_position`, `bias_kind_layer`, and `patch_image_row_column_position` for image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from clt.attribution.graphs.graph import BiasKind, Graph, NodeKind, NodeTable, Target
from clt.attribution.graphs.scores import PrunedGraph
from clt.attribution.viewer.document import (
    Box,
    ImageEntry,
    LinkEntry,
    NodeEntry,
    NodeKindName,
    PositionEntry,
    TargetEntry,
)

#: Rows handled at once.
_CHUNK = 256

#: Kind of each node in the document, and in the common schema.
_KINDS: dict[NodeKind, tuple[NodeKindName, str]] = {
    NodeKind.FEATURE: ("feature", "cross layer transcoder"),
    NodeKind.ERROR: ("error", "mlp reconstruction error"),
    NodeKind.TEXT: ("text", "embedding"),
    NodeKind.IMAGE: ("image", "embedding"),
    NodeKind.BIAS: ("bias", "bias"),
    NodeKind.LOGIT: ("logit", "logit"),
}


@dataclass(frozen=True, kw_only=True)
class _Node:
    """One row of a `NodeTable` as plain numbers."""

    kind: int
    layer: int
    position: int
    feature: int
    activation: float
    image: int
    patch_row: int
    patch_col: int


def patch_box(image: ImageEntry, row: int, col: int) -> Box:
    """Left, top, right, bottom of a patch in pixels; adjacent patches share their border exactly.

    Args:
        image: the image.
        row: row of the patch, from the top.
        col: column of the patch, from the left.
    """
    left, top, right, bottom = image.region

    def between(start: float, end: float, share: float) -> float:
        return start * (1 - share) + end * share

    return (
        between(left, right, col / image.grid_cols),
        between(top, bottom, row / image.grid_rows),
        between(left, right, (col + 1) / image.grid_cols),
        between(top, bottom, (row + 1) / image.grid_rows),
    )


def node_entries(
    graph: Graph,
    influence: Tensor,
    shown: Tensor,
    images: Sequence[ImageEntry],
    labels: Mapping[tuple[int, int], str],
) -> dict[int, NodeEntry]:
    """Entries of the shown nodes by column.

    Args:
        graph: the unpruned graph.
        influence: [N] float64, influence of every node.
        shown: [N] bool.
        images: entries of the images.
        labels: text by (layer, feature number).

    Returns:
        The entries, in column order.
    """
    has_row = torch.zeros(len(shown), dtype=torch.bool)
    has_row[graph.rows_to_node] = True
    names, ranks = graph.nodes.ids(), _cumulative_share(graph, influence)
    first_target = len(shown) - len(graph.targets)
    entries = {}
    columns = shown.nonzero()[:, 0]
    table = [getattr(graph.nodes, field.name)[columns].tolist() for field in fields(NodeTable)]
    for column, values in zip(columns.tolist(), zip(*table, strict=True), strict=True):
        node = _Node(**dict(zip((field.name for field in fields(NodeTable)), values, strict=True)))
        target = graph.targets[column - first_target] if column >= first_target else None
        node_id, feature, label = _identify(graph, node, target, column - first_target, labels)
        kind, feature_type = _KINDS[NodeKind(node.kind)]
        is_patch = node.kind == NodeKind.IMAGE
        entries[column] = NodeEntry(
            node_id=node_id,
            feature=feature,
            layer=str(graph.n_layers + 1) if target else "E" if node.layer < 0 else str(node.layer),
            ctx_idx=max(0, node.position),
            feature_type=feature_type,
            token_prob=_or_none(target.probability) if target else None,
            is_target_logit=target is not None,
            js_node_id=f"{node_id}-0",
            clerp=label,
            influence=None if target else short(ranks[column]),
            activation=short(node.activation),
            name=names[column],
            kind=kind,
            feature_index=node.feature if node.kind == NodeKind.FEATURE else None,
            path_share=0.0 if target else short(influence[column].item()),
            target_weight=short(target.weight) if target else 0.0,
            has_row=bool(has_row[column]),
            image=node.image if is_patch else None,
            patch_row=node.patch_row if is_patch else None,
            patch_col=node.patch_col if is_patch else None,
            box=patch_box(images[node.image], node.patch_row, node.patch_col) if is_patch else None,
        )
    return entries


def _identify(
    graph: Graph, node: _Node, target: Target | None, number: int, labels: Mapping[tuple[int, int], str]
) -> tuple[str, int | None, str]:
    """Node id, number in the schema's `feature` field, and label."""
    layer, position, feature = node.layer, node.position, node.feature
    if target is not None:
        if target.kind == "logit":
            return f"{graph.n_layers + 1}_{target.token_id}_{target.position}", target.token_id, target.label
        return f"target_{number}", None, target.label
    match NodeKind(node.kind):
        case NodeKind.FEATURE:
            return f"{layer}_{feature}_{position}", _cantor(layer, feature), labels.get((layer, feature), "")
        case NodeKind.ERROR:
            return f"error_{layer}_{position}", -1, f"L{layer} error"
        case NodeKind.BIAS:
            kind = BiasKind(feature).name.lower()
            if layer < 0:
                return f"bias_{kind}", None, f"{kind}'s own bias"
            return f"bias_{kind}_{layer}", None, f"L{layer} {kind} bias"
        case NodeKind.IMAGE:
            patch = f"{node.image}_{node.patch_row}_{node.patch_col}"
            return f"patch_{patch}_{position}", feature, f"patch {node.patch_row},{node.patch_col}"
        case _:
            return f"E_{feature}_{position}", feature, graph.token_strings[position]


def link_entries(pruned: PrunedGraph, nodes: Mapping[int, NodeEntry]) -> tuple[LinkEntry, ...]:
    """Entries of the kept edges between shown nodes, strongest first.

    Args:
        pruned: the pruned graph.
        nodes: entries of the shown nodes by column.
    """
    graph = pruned.graph
    counted = (~graph.nodes.is_kind(NodeKind.BIAS)).double()
    sums = torch.zeros(len(graph.nodes), dtype=torch.float64)
    for rows in torch.arange(len(graph.edges)).split(_CHUNK):
        sums[graph.rows_to_node[rows]] = graph.edges[rows].double().abs_() @ counted
    sources, targets, weights = pruned.edge_list()
    shares = torch.where(sums > 0, 1 / sums, 0.0)[targets] * weights.double().abs()
    return tuple(
        LinkEntry(source=nodes[source].node_id, target=nodes[target].node_id, weight=short(weight), share=short(share))
        for source, target, weight, share in zip(
            sources.tolist(), targets.tolist(), weights.tolist(), shares.tolist(), strict=True
        )
        if source in nodes and target in nodes
    )


def position_entries(graph: Graph) -> tuple[PositionEntry, ...]:
    """The image patch, if any, at each position of the prompt.

    Args:
        graph: the unpruned graph.
    """
    entries = [PositionEntry()] * graph.n_positions
    for column in graph.nodes.is_kind(NodeKind.IMAGE).nonzero()[:, 0].tolist():
        entries[int(graph.nodes.position[column])] = PositionEntry(
            image=int(graph.nodes.image[column]),
            patch_row=int(graph.nodes.patch_row[column]),
            patch_col=int(graph.nodes.patch_col[column]),
        )
    return tuple(entries)


def target_entries(graph: Graph, nodes: Mapping[int, NodeEntry]) -> tuple[TargetEntry, ...]:
    """The targets, largest weight first.

    Args:
        graph: the unpruned graph.
        nodes: entries of the shown nodes by column, including the targets.
    """
    first = len(graph.nodes) - len(graph.targets)
    entries = [
        TargetEntry(
            node_id=nodes[first + number].node_id,
            kind=target.kind,
            label=target.label,
            probability=_or_none(target.probability),
            weight=short(target.weight),
        )
        for number, target in enumerate(graph.targets)
    ]
    return tuple(sorted(entries, key=lambda entry: -entry.weight))


def short(value: float) -> float:
    """The value rounded to seven significant digits, the precision of float32; the graph file keeps all digits."""
    return float(f"{value:.7g}")


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else short(value)


def _cantor(layer: int, feature: int) -> int:
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _cumulative_share(graph: Graph, influence: Tensor) -> list[float]:
    """Share of all influence held by the nodes down to each one; biases are left out, as in pruning."""
    counted = torch.where(graph.nodes.is_kind(NodeKind.BIAS), 0.0, influence)
    order = influence.argsort(descending=True, stable=True)
    shares = torch.zeros_like(influence)
    shares[order] = counted[order].cumsum(0) / counted.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return shares.tolist()
