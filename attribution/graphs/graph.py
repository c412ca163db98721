"""The attribution graph of one prompt: nodes and exact edges.

`attribute` computes a `Graph`; `clt.attribution.graphs.scores` prunes and scores it. Rows are targets (the nodes that
have inputs), columns are sources, and every row sums to its target's value: the adjacency matrix of Ameisen et al.
2025, "Circuit Tracing", section "Constructing an attribution graph", completed by bias nodes.

Columns: features (by layer, position, feature number) | errors (layer-major) | prompt tokens | biases | targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clt.attribution.viewer.show import show
from clt.records import ModelIdentity
from clt.transcoder.architecture import CLTConfig

if TYPE_CHECKING:
    from clt.attribution.graphs.faithfulness import EdgeReport


class NodeKind(IntEnum):
    """Kind of a node; stored as uint8."""

    FEATURE = 0
    ERROR = 1
    TEXT = 2
    IMAGE = 3
    BIAS = 4
    LOGIT = 5


class BiasKind(IntEnum):
    """Kind of a bias node; stored in `NodeTable.feature`."""

    DECODER = 0
    ATTENTION = 1
    TARGET = 2


@dataclass(frozen=True, kw_only=True)
class NodeTable:
    """The N nodes, in column order.

    Attributes:
        kind: [N] uint8, a `NodeKind`. LOGIT is any target node, also a difference of logits or a chosen feature.
        layer: [N] int16; -1 for tokens and for the targets' own bias, the number of layers for logits.
        position: [N] int32, index in the prompt; -1 for biases, which act at all positions.
        feature: [N] int32; feature number, vocabulary id of tokens and logits, `BiasKind` of biases, -1 for errors.
        activation: [N] float32; a feature's activation, a target's value, the length of any other source's vector
            (for a bias that acts at S positions, of its [S,D] vectors together).
        image: [N] int16, number of the image in the prompt; -1 for nodes that are no image token.
        patch_row: [N] int16, row of the image patch, else -1.
        patch_col: [N] int16, column of the image patch, else -1.
    """

    kind: Tensor
    layer: Tensor
    position: Tensor
    feature: Tensor
    activation: Tensor
    image: Tensor
    patch_row: Tensor
    patch_col: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def is_kind(self, *kinds: NodeKind) -> Tensor:
        """Mask [N] of the nodes of these kinds."""
        return torch.isin(self.kind, torch.tensor([int(kind) for kind in kinds], dtype=self.kind.dtype))

    def ids(self) -> list[str]:
        """One readable name per node, unique in the graph, e.g. `feature.2.917@13` (layer, number, position)."""
        layers, positions, features = self.layer.tolist(), self.position.tolist(), self.feature.tolist()
        first_target = len(self) - int(self.is_kind(NodeKind.LOGIT).sum())
        names = []
        for node, kind in enumerate(self.kind.tolist()):
            layer, position, feature = layers[node], positions[node], features[node]
            match NodeKind(kind):
                case NodeKind.FEATURE:
                    names.append(f"feature.{layer}.{feature}@{position}")
                case NodeKind.ERROR:
                    names.append(f"error.{layer}@{position}")
                case NodeKind.BIAS:
                    names.append(f"bias.{BiasKind(feature).name.lower()}" + (f".{layer}" if layer >= 0 else ""))
                case NodeKind.LOGIT:
                    names.append(f"target.{node - first_target}")
                case other:
                    names.append(f"{other.name.lower()}@{position}")
        return names


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target of the graph.

    Attributes:
        kind: "logit": a logit minus the mean over the vocabulary; "difference": one logit minus another;
            "feature": the pre-activation of a feature.
        label: displayed text: the token, "a - b", or the feature's name.
        position: index in the prompt.
        token_id: vocabulary id; -1 for a feature.
        minus_token_id: vocabulary id of the logit that a difference subtracts; else -1.
        layer: the feature's layer; the number of layers for logits.
        feature: feature number; -1 for logits.
        probability: the model's probability of the token at the position; NaN unless kind is "logit".
        weight: share of this target in the influence; the weights of a graph sum to 1.
    """

    kind: Literal["logit", "difference", "feature"]
    label: str
    position: int
    token_id: int = -1
    minus_token_id: int = -1
    layer: int
    feature: int = -1
    probability: float = float("nan")
    weight: float


@dataclass(frozen=True, kw_only=True)
class GraphImage:
    """An image of the prompt, as the viewer draws it.

    Attributes:
        pixels: [height,width,3] uint8; scaled down when the original is large.
        grid: rows and columns of patches.
        box: left, top, right, bottom in `pixels` of the part that the patch grid covers.
    """

    pixels: Tensor
    grid: tuple[int, int]
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, repr=False)
class Graph:
    """The unpruned attribution graph of one prompt.

    Attributes:
        nodes: the N nodes.
        rows_to_node: [R] int64, node of each row: features in node order, then all targets. With a cap on feature
            rows R is smaller than the number of features and targets; the other features are columns only.
        edges: [R,N] float32 or float64, direct effect of each column on each row's target. A row sums to its value.
        row_values: [R], pre-activation of the feature, or value of the target.
        targets: the targets, in node order.
        token_ids: [S] int64, vocabulary ids of the prompt.
        token_strings: S pieces of text.
        prompt: the prompt as given.
        images: the images of the prompt.
        model: the model that ran.
        architecture: architecture of the transcoder.
        clt_fingerprint: hex digest of the transcoder's weights.
    """

    nodes: NodeTable
    rows_to_node: Tensor
    edges: Tensor
    row_values: Tensor
    targets: tuple[Target, ...]
    token_ids: Tensor
    token_strings: tuple[str, ...]
    prompt: str
    images: tuple[GraphImage, ...]
    model: ModelIdentity
    architecture: CLTConfig
    clt_fingerprint: str

    def __repr__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:59]}\u2026"
        n_errors = int(self.nodes.is_kind(NodeKind.ERROR).sum())
        return (
            f"Graph(prompt={prompt!r}, model={self.model.name!r}, n_features={self.n_features}, n_errors={n_errors}, "
            f"n_tokens={self.n_positions}, n_targets={len(self.targets)}, n_rows={len(self.rows_to_node)})"
        )

    @property
    def n_features(self) -> int:
        """Active features: the first columns."""
        return int(self.nodes.is_kind(NodeKind.FEATURE).sum())

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return self.model.n_layers

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt, S."""
        return len(self.token_ids)

    @property
    def target_weights(self) -> Tensor:
        """[R] float64, weight of each row as a target: 0 for features."""
        weights = torch.zeros(len(self.rows_to_node), dtype=torch.float64)
        weights[len(weights) - len(self.targets) :] = torch.tensor(
            [t.weight for t in self.targets], dtype=torch.float64
        )
        return weights

    @property
    def without_row(self) -> Tensor:
        """[N] mask of the features whose own inputs were not computed (`max_feature_nodes`)."""
        mask = self.nodes.is_kind(NodeKind.FEATURE)
        mask[self.rows_to_node] = False
        return mask

    def save(self, path: Path | str) -> None:
        """Writes the graph to one safetensors file, atomically.

        Args:
            path: the file; its folder is created if needed.

        Raises:
            GraphError: the file cannot be written.
        """
        from clt.attribution.graphs.graph_file import write_graph

        write_graph(self, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> Graph:
        """Reads a graph written by `save`.

        Args:
            path: the file.

        Returns:
            The graph, on the CPU.

        Raises:
            GraphError: the file is missing, damaged, or of another layout.
        """
        from clt.attribution.graphs.graph_file import read_graph

        return read_graph(Path(path))

    def show(
        self,
        folder: Path | str | None = None,
        *,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        max_nodes: int = 500,
        edge_check: EdgeReport | None = None,
    ) -> Path:
        """Writes the page of this graph and opens it: inside a notebook, else in a browser where there is one.

        Args:
            folder: folder of `index.html` and `graph.json`. Default: a new temporary folder, which is kept.
            node_threshold: fraction of the nodes' influence to keep; see `clt.attribution.graphs.scores.prune`.
            edge_threshold: fraction of the edges' influence to keep.
            max_nodes: features, errors and biases to show at most, the most influential first.
            edge_check: result of `clt.attribution.graphs.faithfulness.check_edges`, for the page's header.

        Returns:
            Path of the page; without a browser it is logged too.

        Raises:
            GraphError: a threshold is out of range, or the folder cannot be written.
        """
        from clt.attribution.graphs.export import graph_document
        from clt.attribution.graphs.scores import prune

        pruned = prune(self, node_threshold, edge_threshold)
        return show(graph_document(self, pruned, edge_check=edge_check, max_nodes=max_nodes), folder)
