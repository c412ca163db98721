"""Checks edges of an unpruned graph against interventions on the model.

Intervention: the source is added once more (a feature set to twice its activation; an error, an embedding or a bias
added again) with attention patterns, norm denominators and MLP outputs frozen at the prompt's values. The measured
effect is the change of the target's value. Ameisen et al. 2025, "Circuit Tracing", validate graphs by perturbing the
model; the local replacement model is linear, so here edge and effect must be equal up to rounding.
`clt.attribution.graphs.edge_measurement` runs the interventions, independently of the code that computes edges.

Shapes: R rows, N nodes, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt.attribution.graphs.edge_measurement import EdgeMeasurement
from clt.attribution.graphs.graph import Graph, NodeKind
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.errors import GraphError
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class KindError:
    """Drawn edges of one kind of source.

    Attributes:
        kind: kind of the sources.
        n_edges: edges drawn.
        max_rel_error: largest error among them.
    """

    kind: NodeKind
    n_edges: int
    max_rel_error: float


@dataclass(frozen=True, kw_only=True)
class EdgeReport:
    """Predicted and measured effects of E edges.

    Attributes:
        row: [E] int64, row of each edge in the graph.
        source: [E] int64, node of its source.
        predicted: [E] float64, the graph's edge.
        measured: [E] float64, effect of the intervention.
        largest: [E] float64, largest absolute entry of the edge's row.
        error: [E] float64, |predicted - measured| / largest.
        max_rel_error: largest error of the drawn edges.
        column_max_rel_error: largest error over all rows of the drawn sources' columns, zeros included.
        by_kind: the same by kind of source; kinds without edges are left out.
    """

    row: Tensor
    source: Tensor
    predicted: Tensor
    measured: Tensor
    largest: Tensor
    error: Tensor
    max_rel_error: float
    column_max_rel_error: float
    by_kind: tuple[KindError, ...]


@torch.no_grad()
def check_edges(
    adapter: ModelAdapter,
    transcoder: CrossLayerTranscoder,
    inputs: PromptInputs,
    graph: Graph,
    *,
    n_edges: int = 200,
    per_kind: int = 40,
    seed: int = 0,
) -> EdgeReport:
    """Compares edges of a graph with interventions.

    Edges are the nonzero entries of the unpruned matrix. `n_edges` are drawn uniformly from all; then more are drawn
    of each kind of source, uniformly within the kind, until it has `per_kind` (or all there are).

    Args:
        adapter: the model the graph was made with.
        transcoder: the transcoder the graph was made with.
        inputs: the prompt the graph was made of.
        graph: an unpruned graph.
        n_edges: edges drawn from all kinds together.
        per_kind: least number of edges of each kind of source.
        seed: random seed of the draw.

    Returns:
        Predicted and measured effects, with their largest difference.

    Raises:
        GraphError: the graph is not of this model, transcoder and prompt.
    """
    _require_same(adapter, inputs, graph)
    measurement = EdgeMeasurement(adapter, transcoder, inputs, graph)
    largest = graph.edges.abs().amax(1).double()
    drawn = _draw(graph, n_edges, per_kind, seed)
    rows, sources = drawn // len(graph.nodes), drawn % len(graph.nodes)
    measured, worst_column = _measure(measurement, graph, rows, sources, largest)
    predicted = graph.edges[rows, sources].double()
    error = (predicted - measured).abs() / largest[rows]
    kinds = graph.nodes.kind[sources]
    by_kind = [
        KindError(kind=kind, n_edges=int((kinds == kind).sum()), max_rel_error=float(error[kinds == kind].max()))
        for kind in NodeKind
        if bool((kinds == kind).any())
    ]
    return EdgeReport(
        row=rows,
        source=sources,
        predicted=predicted,
        measured=measured,
        largest=largest[rows],
        error=error,
        max_rel_error=float(error.max()),
        column_max_rel_error=worst_column,
        by_kind=tuple(by_kind),
    )


def _measure(
    measurement: EdgeMeasurement, graph: Graph, rows: Tensor, sources: Tensor, largest: Tensor
) -> tuple[Tensor, float]:
    """Effect of each drawn edge's source on its row, and the largest error of any row of these sources."""
    measured, worst = torch.empty(len(rows), dtype=torch.float64), 0.0
    for source in sources.unique().tolist():
        effect = measurement.effect(source)
        difference = (effect - graph.edges[:, source].double()).abs()
        worst = max(worst, float((difference / largest.clamp_min(1e-300)).max()))
        measured[sources == source] = effect[rows[sources == source]]
    return measured, worst


def row_sum_error(graph: Graph) -> float:
    """Largest |sum of a row - value of its target| relative to the larger of that value and the row's largest entry."""
    difference = (graph.edges.double().sum(1) - graph.row_values.double()).abs()
    scale = torch.maximum(graph.edges.abs().amax(1), graph.row_values.abs()).double()
    return float((difference / scale.clamp_min(1e-300)).max())


def _require_same(adapter: ModelAdapter, inputs: PromptInputs, graph: Graph) -> None:
    if graph.model.fingerprint != adapter.identity.fingerprint:
        raise GraphError(
            f"the graph is of the model {graph.model.name}, not of {adapter.identity.name}; compute it again"
        )
    if not torch.equal(inputs.tokens.token_id[0].long().cpu(), graph.token_ids):
        raise GraphError(f"the graph is of the prompt {graph.prompt[:60]!r}, not of {inputs.prompts[0][:60]!r}")


def _draw(graph: Graph, n_edges: int, per_kind: int, seed: int) -> Tensor:
    """Flat indices of distinct nonzero entries of the matrix."""
    generator = torch.Generator().manual_seed(seed)
    present = (graph.edges != 0).flatten().nonzero()[:, 0]
    if len(present) == 0:
        raise GraphError("the graph has no edges to check; choose another target")

    def draw(candidates: Tensor, count: int) -> Tensor:
        return candidates[torch.randperm(len(candidates), generator=generator)[:count]]

    drawn = draw(present, n_edges)
    kinds = graph.nodes.kind[present % len(graph.nodes)]
    for kind in NodeKind:
        missing = per_kind - int((graph.nodes.kind[drawn % len(graph.nodes)] == kind).sum())
        if missing > 0:
            others = present[kinds == kind]
            others = others[~torch.isin(others, drawn)]
            drawn = torch.cat([drawn, draw(others, missing)])
    return drawn
