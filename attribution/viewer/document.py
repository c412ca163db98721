"""Schema of the JSON document of a graph, which front-ends and the page read.

Its skeleton (metadata, qParams, nodes, links) is the schema that circuit-tracer writes and Neuronpedia reads; the
fields that a vision-language model needs are added. The schema is defined by these dataclasses alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Box = tuple[float, float, float, float]
NodeKindName = Literal["feature", "error", "text", "image", "bias", "logit"]

# Our field names where the schema's are not snake case.
_JSON_NAMES = {
    "js_node_id": "jsNodeId",
    "q_params": "qParams",
    "pinned_ids": "pinnedIds",
    "link_type": "linkType",
    "clicked_id": "clickedId",
}


@dataclass(frozen=True, kw_only=True)
class NodeEntry:
    """A node of the document; the fields up to `activation` are those of the common schema.

    Attributes:
        node_id: unique in the document.
        feature: number that identifies the feature over all layers (Cantor pairing); vocabulary id of tokens and
            logits; -1 for errors; None for biases and for targets that are no token.
        layer: "E" for what enters the model, the layer of features, errors and biases, n_layers + 1 for targets.
        ctx_idx: position in the prompt; 0 for biases, which act at all positions.
        feature_type: the schema's name for the node's kind.
        token_prob: probability of a target token; None for every other node.
        is_target_logit: whether the node is a target.
        run_idx: always 0.
        reverse_ctx_idx: always 0.
        js_node_id: unique key for front-ends.
        clerp: label; empty for a feature that has none.
        influence: share of all influence held by the nodes at least as influential as this one, so small means
            important; None for targets.
        activation: activation of a feature, value of a target, length of any other source's vector.
        name: name of the node in the unpruned graph (`NodeTable.ids`).
        kind: kind of the node.
        feature_index: feature number within its layer; None for other kinds.
        path_share: share of the paths from the targets that pass through the node; 0 for targets.
        target_weight: weight of a target; 0 for other nodes.
        has_row: whether the node's own inputs were computed.
        image: number of the image that an image node is a patch of; None for other kinds.
        patch_row: row of the patch; None for other kinds.
        patch_col: column of the patch; None for other kinds.
        box: left, top, right, bottom of the patch in pixels of its image; None for other kinds.
    """

    node_id: str
    feature: int | None
    layer: str
    ctx_idx: int
    feature_type: str
    token_prob: float | None
    is_target_logit: bool
    run_idx: int = 0
    reverse_ctx_idx: int = 0
    js_node_id: str
    clerp: str
    influence: float | None
    activation: float
    name: str
    kind: NodeKindName
    feature_index: int | None = None
    path_share: float
    target_weight: float = 0.0
    has_row: bool
    image: int | None = None
    patch_row: int | None = None
    patch_col: int | None = None
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class LinkEntry:
    """An edge of the document.

    Attributes:
        source: node id of the source.
        target: node id of the target.
        weight: contribution of the source to the target's value.
        share: |weight| over the sum of |weight| of all edges into the target in the unpruned graph, biases left out.
    """

    source: str
    target: str
    weight: float
    share: float


@dataclass(frozen=True, kw_only=True)
class PositionEntry:
    """The image patch at a position of the prompt; all None for text."""

    image: int | None = None
    patch_row: int | None = None
    patch_col: int | None = None


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """An image of the prompt.

    Attributes:
        data_uri: the picture as PNG, scaled down when large.
        width: width in pixels of the image that boxes refer to.
        height: its height.
        grid_rows: rows of patches.
        grid_cols: columns of patches.
        region: left, top, right, bottom of the part that the patches cover, which is what the model gets.
    """

    data_uri: str
    width: int
    height: int
    grid_rows: int
    grid_cols: int
    region: Box


@dataclass(frozen=True, kw_only=True)
class TargetEntry:
    """A target, for the page's headline."""

    node_id: str
    kind: str
    label: str
    probability: float | None
    weight: float


@dataclass(frozen=True, kw_only=True)
class ScoreEntry:
    """A score of the graph, or the largest error of its edges.

    Attributes:
        key: identifier.
        name: displayed name.
        value: the number; None when it was not measured.
        unit: "share" of 1, or "error" relative to 1.
        reading: short explanation, displayed.
        definition: exact definition, displayed on demand.
    """

    key: str
    name: str
    value: float | None
    unit: Literal["share", "error"]
    reading: str
    definition: str


@dataclass(frozen=True, kw_only=True)
class CountEntry:
    """Numbers of nodes and edges of the graph and of the document.

    `inner_left_out` counts the features, errors and biases that pruning kept and `max_nodes` left out.
    """

    nodes_total: int
    nodes_shown: int
    links_total: int
    links_shown: int
    inner_left_out: int


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Prompt, model, transcoder and scores; the fields up to `info` are those of the common schema."""

    slug: str
    scan: str
    transcoder_list: tuple[str, ...]
    prompt_tokens: tuple[str, ...]
    prompt: str
    schema_version: int = 1
    info: dict[str, Any]
    n_layers: int
    model: dict[str, Any]
    transcoder: str
    positions: tuple[PositionEntry, ...]
    images: tuple[ImageEntry, ...]
    targets: tuple[TargetEntry, ...]
    scores: tuple[ScoreEntry, ...]
    counts: CountEntry


@dataclass(frozen=True, kw_only=True)
class QueryParameters:
    """Initial state of a front-end: pinned and selected nodes."""

    pinned_ids: tuple[str, ...] = ()
    supernodes: tuple[tuple[str, ...], ...] = ()
    link_type: str = "both"
    clicked_id: str


@dataclass(frozen=True, kw_only=True)
class GraphDocument:
    """A pruned graph as a document."""

    metadata: Metadata
    q_params: QueryParameters
    nodes: tuple[NodeEntry, ...]
    links: tuple[LinkEntry, ...]

    def to_tree(self) -> dict[str, Any]:
        """The document as plain JSON values, under the schema's names."""
        return _plain(asdict(self))

    def to_json(self) -> str:
        """The document as JSON text."""
        return json.dumps(self.to_tree(), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_JSON_NAMES.get(key, key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value
