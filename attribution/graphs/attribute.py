"""Computes the attribution graph of a prompt.

`attribute` records a forward of the prompt, makes it linear (`clt.attribution.replacement`), splits every MLP output
into features, bias and error (`sources`), and computes one row of direct effects per active feature and per target
(`targets`). The result is exact: every row sums to its target's value. With `max_feature_nodes` only the most
influential features get a row, found iteratively as in circuit-tracer; every feature stays a column (Ameisen et al.
2025, "Circuit Tracing", section "Constructing an attribution graph").
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from clt.attribution.graphs.graph import Graph
from clt.attribution.graphs.nodes import graph_images, node_table
from clt.attribution.graphs.scores import spread
from clt.attribution.graphs.sources import Readouts, Sources
from clt.attribution.graphs.targets import LogitTargets, ResolvedTarget, TargetSettings, resolve_targets
from clt.attribution.replacement.frozen_model import record
from clt.attribution.replacement.linear_model import LinearModel
from clt.attribution.replacement.replacement_model import ReplacementModel
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.config import STRICT
from clt.errors import ConfigError
from clt.transcoder.model import CrossLayerTranscoder

log = logging.getLogger(__name__)

#: Batches of rows between two rankings of the features without a row.
_BATCHES_PER_RANKING = 4


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AttributionSettings:
    """Targets of a graph, and limits of its computation."""

    targets: tuple[TargetSettings, ...] = (LogitTargets(),)
    """Targets: logits, differences of logits, features."""
    max_feature_nodes: int | None = Field(default=None, ge=0)
    """Number of features, the most influential ones, whose inputs are computed; default: all."""
    batch_size: int = Field(default=128, gt=0)
    """Rows computed at once; affects memory, not results."""


@torch.no_grad()
def attribute(
    adapter: ModelAdapter,
    transcoder: CrossLayerTranscoder,
    inputs: PromptInputs,
    settings: AttributionSettings | None = None,
) -> Graph:
    """Computes the attribution graph of one prompt.

    Args:
        adapter: the model.
        transcoder: a transcoder of this model; scaled or folded.
        inputs: one prompt without padding, from `adapter.prepare`.
        settings: targets and limits. Default: those of `AttributionSettings`.

    Returns:
        The unpruned graph, on the CPU; edges in the model's dtype, float32 at least.

    Raises:
        CheckpointError: the transcoder belongs to another model, or its dimensions do not fit.
        ConfigError: the transcoder's features read what they write, or its encoders normalise each token.
        GraphError: a target does not exist, or there is more than one prompt.
        ModelError: attribution does not support the architecture.
    """
    return attribute_model(ReplacementModel(adapter, transcoder), inputs, settings)


@torch.no_grad()
def attribute_model(
    model: ReplacementModel, inputs: PromptInputs, settings: AttributionSettings | None = None
) -> Graph:
    """`attribute` for an existing replacement model.

    Args:
        model: replacement model.
        inputs: one prompt.
        settings: targets, limits and batch size; None for the defaults.

    Returns:
        The graph.

    Raises:
        ConfigError, GraphError, ModelError: as for `attribute`.
    """
    settings = settings or AttributionSettings()
    started = time.perf_counter()
    adapter, folded = model.adapter, model.transcoder
    if folded.config.layer_norm:
        raise ConfigError("clt.layer_norm=true: attribution needs linear encoders; train with layer_norm: false")
    linear = LinearModel(adapter, record(adapter, inputs, folded.config.read_site))
    sources = Sources(linear, folded.to(linear.dtype), inputs.tokens.select(0))
    targets = resolve_targets(adapter, inputs, sources, settings.targets)
    n_features = len(sources.features)
    if settings.max_feature_nodes is None or settings.max_feature_nodes >= n_features:
        chosen, edges, values = _all_rows(sources, targets, settings.batch_size)
    else:
        chosen, edges, values = _influential_rows(sources, targets, settings.batch_size, settings.max_feature_nodes)
    first_target = sources.n_columns + 1
    rows_to_node = torch.cat([chosen, torch.arange(first_target, first_target + len(targets))])
    seconds = time.perf_counter() - started
    log.debug("features=%d rows=%d columns=%d seconds=%.2f", n_features, *edges.shape, seconds)
    token_ids = inputs.tokens.token_id[0].long().cpu()
    return Graph(
        nodes=node_table(sources, targets, inputs),
        rows_to_node=rows_to_node,
        edges=edges,
        row_values=values,
        targets=tuple(item.target for item in targets),
        token_ids=token_ids,
        token_strings=tuple(map(adapter.token_text, token_ids.tolist())),
        prompt=inputs.prompts[0],
        images=graph_images(adapter, inputs),
        model=adapter.identity,
        architecture=model.config,
        clt_fingerprint=model.fingerprint,
    )


class _RowBuffer:
    """Rows of a graph under construction."""

    def __init__(self, sources: Sources, n_rows: int, n_targets: int) -> None:
        self.sources = sources
        dtype = sources.linear.dtype
        self.edges = torch.zeros(n_rows + n_targets, sources.n_columns + 1 + n_targets, dtype=dtype)
        self.values = torch.zeros(n_rows + n_targets, dtype=dtype)

    def fill(self, rows: slice, readouts: Readouts) -> None:
        self.edges[rows, : self.sources.n_columns] = self.sources.rows(readouts).cpu()
        self.edges[rows, self.sources.n_columns] = readouts.constant.cpu()
        self.values[rows] = readouts.value.cpu()

    def fill_targets(self, first: int, targets: Sequence[ResolvedTarget]) -> None:
        for number, item in enumerate(targets, start=first):
            self.fill(slice(number, number + 1), item.readout)

    def fill_features(self, first: int, chosen: Tensor, batch_size: int) -> None:
        """Computes rows of features, given in node order, in batches of one layer."""
        features = self.sources.features
        layers = features.layer.cpu()[chosen]
        for layer in layers.unique().tolist():
            for batch in chosen[layers == layer].split(batch_size):
                readouts = self.sources.feature_readouts(layer, features.position[batch], features.number[batch])
                self.fill(slice(first, first + len(batch)), readouts)
                first += len(batch)


def _all_rows(sources: Sources, targets: Sequence[ResolvedTarget], batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of all features, edges [R,N] and values [R]."""
    everything = torch.arange(len(sources.features))
    buffer = _RowBuffer(sources, len(everything), len(targets))
    buffer.fill_features(0, everything, batch_size)
    buffer.fill_targets(len(everything), targets)
    return everything, buffer.edges, buffer.values


def _influential_rows(
    sources: Sources, targets: Sequence[ResolvedTarget], batch_size: int, n_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the `n_rows` features ranked highest while rows are added, edges [R,N] and values [R]."""
    T, n = len(targets), len(sources.features)
    buffer = _RowBuffer(sources, n_rows, T)
    buffer.fill_targets(0, targets)
    N = buffer.edges.shape[1]
    counted, everything = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    counted[: sources.first_bias] = True
    chosen = torch.empty(0, dtype=torch.int64)
    while len(chosen) < n_rows:
        filled = T + len(chosen)
        weights = torch.zeros(filled, dtype=torch.float64)
        weights[:T] = torch.tensor([item.target.weight for item in targets], dtype=torch.float64)
        nodes = torch.cat([torch.arange(N - T, N), chosen])
        flow = spread(buffer.edges[:filled], nodes, weights, counted, everything, sources.linear.n_layers)[:n]
        flow[chosen] = -1.0
        count = min(_BATCHES_PER_RANKING * batch_size, n_rows - len(chosen))
        best = flow.argsort(descending=True, stable=True)[:count].sort().values
        buffer.fill_features(filled, best, batch_size)
        chosen = torch.cat([chosen, best])
    order = chosen.argsort()
    rows = torch.cat([T + order, torch.arange(T)])
    return chosen[order], buffer.edges[rows], buffer.values[rows]
