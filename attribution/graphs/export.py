"""Describes a pruned attribution graph as a document, which `clt.attribution.viewer` writes and shows.

The document follows the schema that circuit-tracer writes and Neuronpedia reads, with unique node ids (there an error
node of layer l has the id of a feature of layer 0). It adds what a vision-language model needs: the patch of an image
node, its box in pixels, the images, and the scores and edge check of the graph.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from clt.attribution.graphs.document_entries import link_entries, node_entries, position_entries, short, target_entries
from clt.attribution.graphs.graph import Graph, GraphImage, NodeKind
from clt.attribution.graphs.scores import PrunedGraph, score
from clt.attribution.viewer.document import (
    CountEntry,
    GraphDocument,
    ImageEntry,
    Metadata,
    QueryParameters,
    ScoreEntry,
)
from clt.errors import GraphError

if TYPE_CHECKING:
    from clt.attribution.graphs.faithfulness import EdgeReport

#: Longer side in pixels of a picture in the document.
LARGEST_PICTURE = 1024


def graph_document(
    graph: Graph,
    pruned: PrunedGraph,
    images: Sequence[Image.Image] = (),
    *,
    feature_labels: Mapping[tuple[int, int], str] | None = None,
    edge_check: EdgeReport | None = None,
    slug: str = "graph",
    max_nodes: int = 500,
) -> GraphDocument:
    """Describes a pruned graph as a document.

    Args:
        graph: the unpruned graph.
        pruned: the part to show; see `clt.attribution.graphs.scores.prune`.
        images: the original images; pixel boxes then refer to them. Default: the graph's own copies.
        feature_labels: text by (layer, feature number).
        edge_check: edges compared with interventions. Default: not measured.
        slug: short name of the graph.
        max_nodes: features, errors and biases to show at most, the most influential first. Tokens and targets are
            always shown, and the document counts what was left out.

    Returns:
        The document.

    Raises:
        GraphError: `pruned` is of another graph, an image does not fit, or a target occurs twice.
    """
    if pruned.graph is not graph:
        raise GraphError("pruned: made from another graph; prune this one")
    if max_nodes < 1:
        raise GraphError(f"max_nodes={max_nodes}: must be at least 1")
    shown, left_out = _capped(pruned, max_nodes)
    pictures = _image_entries(graph, images)
    nodes = node_entries(graph, pruned.influence, shown, pictures, feature_labels or {})
    for node_id, count in Counter(node.node_id for node in nodes.values()).items():
        if count > 1:
            raise GraphError(f"node {node_id} occurs {count} times; name each target once")
    links = link_entries(pruned, nodes)
    targets = target_entries(graph, nodes)
    metadata = Metadata(
        slug=slug,
        scan=graph.model.name,
        transcoder_list=(graph.clt_fingerprint,),
        prompt_tokens=graph.token_strings,
        prompt=graph.prompt,
        info={"generator": {"name": "vlm-clt", "version": version("vlm-clt")}},
        n_layers=graph.n_layers,
        model=asdict(graph.model),
        transcoder=graph.clt_fingerprint,
        positions=position_entries(graph),
        images=pictures,
        targets=targets,
        scores=(*_score_entries(graph, shown), _edge_check_entry(edge_check)),
        counts=_count_entry(graph, len(nodes), len(links), left_out),
    )
    opening = QueryParameters(clicked_id=targets[0].node_id)
    return GraphDocument(metadata=metadata, q_params=opening, nodes=tuple(nodes.values()), links=links)


def _capped(pruned: PrunedGraph, max_nodes: int) -> tuple[Tensor, int]:
    """[N] mask of the shown nodes, and the number of kept nodes that `max_nodes` leaves out."""
    inner = pruned.node_mask & pruned.graph.nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS)
    candidates = inner.nonzero()[:, 0]
    by_influence = candidates[pruned.influence[candidates].argsort(descending=True, stable=True)]
    shown = pruned.node_mask.clone()
    shown[by_influence[max_nodes:]] = False
    return shown, max(0, len(candidates) - max_nodes)


def _image_entries(graph: Graph, originals: Sequence[Image.Image]) -> tuple[ImageEntry, ...]:
    if originals and len(originals) != len(graph.images):
        raise GraphError(f"images={len(originals)}: the graph has {len(graph.images)}; pass the images of the prompt")
    pictures = originals or [Image.fromarray(image.pixels.numpy()) for image in graph.images]
    return tuple(_image_entry(image, picture) for image, picture in zip(graph.images, pictures, strict=True))


def _image_entry(image: GraphImage, picture: Image.Image) -> ImageEntry:
    height, width = image.pixels.shape[:2]
    scale_x, scale_y = picture.width / width, picture.height / height
    # Rounding to whole pixels changes the aspect ratio of a scaled copy by at most this much.
    if abs(scale_x / scale_y - 1) > 1 / width + 1 / height:
        given = f"{picture.width}x{picture.height}"
        raise GraphError(f"image of {given} pixels: the graph's is {width}x{height}; pass the images of the prompt")
    left, top, right, bottom = image.box
    shown = picture.convert("RGB")
    shown.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG")
    return ImageEntry(
        data_uri=f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}",
        width=picture.width,
        height=picture.height,
        grid_rows=image.grid[0],
        grid_cols=image.grid[1],
        region=(left * scale_x, top * scale_y, right * scale_x, bottom * scale_y),
    )


def _count_entry(graph: Graph, nodes_shown: int, links_shown: int, left_out: int) -> CountEntry:
    return CountEntry(
        nodes_total=len(graph.nodes),
        nodes_shown=nodes_shown,
        links_total=int(torch.count_nonzero(graph.edges)),
        links_shown=links_shown,
        inner_left_out=left_out,
    )


def _score_entries(graph: Graph, shown: Tensor) -> tuple[ScoreEntry, ...]:
    whole, page = score(graph), score(graph, shown)
    uncomputed = ""
    if whole.uncomputed > 0:
        uncomputed = (
            f" {whole.uncomputed:.1%} of the paths end at features whose inputs were not computed and count as errors."
        )
    return (
        ScoreEntry(
            key="replacement_score",
            name="Replacement score",
            value=short(whole.replacement),
            unit="share",
            reading="influence-weighted fraction of paths that lead back to tokens and patches, not error nodes",
            definition="Influence-weighted fraction of the paths from the targets that lead back to tokens and "
            f"patches, not error nodes, in the unpruned graph.{uncomputed}",
        ),
        ScoreEntry(
            key="completeness_score",
            name="Completeness score",
            value=short(whole.completeness),
            unit="share",
            reading="influence-weighted fraction of each node's input that does not come from error nodes",
            definition="Fraction of the input of features and targets, weighted by their influence, that does not come "
            f"from error nodes, in the unpruned graph.{uncomputed}",
        ),
        ScoreEntry(
            key="page_replacement_score",
            name="Replacement score of this page",
            value=short(page.replacement),
            unit="share",
            reading="the same, with nodes that are not on this page counted as errors",
            definition="Replacement score in which pruned nodes count as error nodes.",
        ),
    )


def _edge_check_entry(check: EdgeReport | None) -> ScoreEntry:
    reading = "no edge of this graph was measured by intervention"
    if check is not None:
        reading = f"relative to the row's largest edge, over {len(check.error)} edges; rounding is below 1e-5"
    return ScoreEntry(
        key="edge_max_rel_error",
        name="Largest edge error",
        value=None if check is None else short(check.max_rel_error),
        unit="error",
        reading=reading,
        definition="Largest |predicted - measured| over the largest absolute edge of the row. Intervention: the source "
        "is added once more, with attention patterns, norm denominators and all MLP outputs frozen.",
    )
