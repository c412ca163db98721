"""The JSON document of a graph: the common schema, unique ids, exact boxes, correct counts."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clt.attribution.graphs.document_entries import patch_box
from clt.attribution.graphs.export import graph_document
from clt.attribution.graphs.faithfulness import EdgeReport
from clt.attribution.graphs.graph import Graph, NodeKind
from clt.attribution.graphs.scores import prune, score
from clt.attribution.viewer.document import GraphDocument, ImageEntry
from clt.attribution.viewer.page import write_export
from clt.errors import GraphError

# Required keys of Neuronpedia's graph-schema.json, with their types.
REQUIRED_METADATA: dict[str, Any] = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
REQUIRED_NODE: dict[str, Any] = {
    "node_id": str,
    "feature": (int, type(None)),
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
    "influence": (float, type(None)),
    "activation": float,
    "token_prob": (float, type(None)),
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
}
REQUIRED_LINK: dict[str, Any] = {"source": str, "target": str, "weight": float}


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., Graph]) -> Graph:
    return make_graph()


@pytest.fixture(scope="module")
def document(graph: Graph) -> GraphDocument:
    return graph_document(graph, prune(graph))


@pytest.fixture(scope="module")
def whole(graph: Graph) -> GraphDocument:
    """The document of the graph without pruning."""
    return graph_document(graph, prune(graph, 1.0, 1.0), max_nodes=10_000)


def test_document_has_the_fields_and_types_of_the_common_schema(document: GraphDocument) -> None:
    tree = json.loads(document.to_json())
    assert set(tree) == {"metadata", "qParams", "nodes", "links"}
    assert tree["qParams"]["linkType"] == "both"
    for required, entries in (
        (REQUIRED_METADATA, [tree["metadata"]]),
        (REQUIRED_NODE, tree["nodes"]),
        (REQUIRED_LINK, tree["links"]),
    ):
        assert entries
        for entry in entries:
            for name, kind in required.items():
                assert isinstance(entry[name], kind), (name, entry[name])


def test_document_is_unchanged_by_a_round_trip_through_json(document: GraphDocument) -> None:
    assert json.loads(document.to_json()) == document.to_tree()


def test_node_ids_are_unique_where_layer_zero_features_have_the_numbers_of_layers(
    graph: Graph, whole: GraphDocument
) -> None:
    nodes = graph.nodes
    features = nodes.is_kind(NodeKind.FEATURE) & (nodes.layer == 0) & (nodes.feature < graph.n_layers)
    assert features.any()
    # circuit-tracer names an error node of layer l `0_l_position`, which is also feature l of layer 0 there.
    errors = {f"0_{node.layer}_{node.ctx_idx}" for node in whole.nodes if node.kind == "error"}
    ids = [node.node_id for node in whole.nodes]
    assert errors & set(ids)
    assert len(set(ids)) == len(ids)
    assert len({node.js_node_id for node in whole.nodes}) == len(ids)


def test_links_are_the_kept_edges_between_nodes_of_the_document(graph: Graph) -> None:
    pruned = prune(graph)
    document = graph_document(graph, pruned)
    columns = {name: column for column, name in enumerate(graph.nodes.ids())}
    column_of = {node.node_id: columns[node.name] for node in document.nodes}
    rows = {int(column): row for row, column in enumerate(graph.rows_to_node)}
    assert len(document.links) == int(pruned.edge_mask.sum())
    for link in document.links:
        exact = float(graph.edges[rows[column_of[link.target]], column_of[link.source]])
        # Documents keep seven significant digits.
        assert link.weight == pytest.approx(exact, rel=1e-6)


def test_shares_of_a_target_sum_to_one_without_its_biases(whole: GraphDocument) -> None:
    kinds = {node.node_id: node.kind for node in whole.nodes}
    sums: Counter[str] = Counter()
    for link in whole.links:
        if kinds[link.source] != "bias":
            sums[link.target] += link.share
    # Pruning at 1.0 drops no edge of a target; seven digits of some hundred shares leave 1e-5 to spare.
    targets = [node.node_id for node in whole.nodes if node.kind == "logit"]
    assert [sums[target] for target in targets] == pytest.approx([1.0] * len(targets), abs=1e-5)


def test_influence_falls_with_rank_as_its_cumulative_share_grows(whole: GraphDocument) -> None:
    inner = sorted((node for node in whole.nodes if not node.is_target_logit), key=lambda node: -node.path_share)
    shares = [node.influence for node in inner]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5
    assert shares[-1] == pytest.approx(1.0, abs=1e-6)
    assert all(node.influence is None for node in whole.nodes if node.is_target_logit)


def test_image_nodes_carry_patch_and_box_and_others_do_not(document: GraphDocument) -> None:
    patches = [node for node in document.nodes if node.kind == "image"]
    assert len(patches) == 64
    odd = next(node for node in patches if (node.patch_row, node.patch_col) == (2, 5))
    assert odd.box == (40.0, 16.0, 48.0, 24.0)
    assert all(node.box is None and node.image is None for node in document.nodes if node.kind != "image")
    place = document.metadata.positions[odd.ctx_idx]
    assert (place.image, place.patch_row, place.patch_col) == (0, 2, 5)


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    corner=st.tuples(st.floats(0, 1000), st.floats(0, 1000)),
    size=st.tuples(st.floats(1, 4000), st.floats(1, 4000)),
)
def test_patch_boxes_tile_the_seen_region_exactly(
    rows: int, cols: int, corner: tuple[float, float], size: tuple[float, float]
) -> None:
    region = (corner[0], corner[1], corner[0] + size[0], corner[1] + size[1])
    image = ImageEntry(data_uri="", width=1, height=1, grid_rows=rows, grid_cols=cols, region=region)
    boxes = [[patch_box(image, row, col) for col in range(cols)] for row in range(rows)]
    assert boxes[0][0][:2] == region[:2]
    assert boxes[-1][-1][2:] == region[2:]
    for row in range(rows):
        for col in range(cols):
            left, top, right, bottom = boxes[row][col]
            assert left < right
            assert top < bottom
            assert (left, right) == (boxes[0][col][0], boxes[0][col][2])
            assert (top, bottom) == (boxes[row][0][1], boxes[row][0][3])
            assert col == 0 or left == boxes[row][col - 1][2]
            assert row == 0 or top == boxes[row - 1][col][3]


def test_boxes_are_in_pixels_of_the_original_when_it_is_given(graph: Graph) -> None:
    document = graph_document(graph, prune(graph), [Image.new("RGB", (1920, 1920))])
    [image] = document.metadata.images
    assert (image.width, image.height, image.region) == (1920, 1920, (0.0, 0.0, 1920.0, 1920.0))
    odd = next(node for node in document.nodes if (node.patch_row, node.patch_col) == (2, 5))
    assert odd.box == pytest.approx((1200.0, 480.0, 1440.0, 720.0), rel=1e-12)
    # Large pictures are embedded scaled down, or a photograph would make a page of tens of megabytes.
    assert len(image.data_uri) < 100_000


@pytest.mark.parametrize(
    ("originals", "complaint"), [([(64, 128)], "64x128 pixels"), ([(64, 64), (64, 64)], "images=2: the graph has 1")]
)
def test_images_of_another_prompt_are_refused(graph: Graph, originals: list[tuple[int, int]], complaint: str) -> None:
    with pytest.raises(GraphError, match=complaint):
        graph_document(graph, prune(graph), [Image.new("RGB", size) for size in originals])


def test_cap_keeps_the_most_influential_and_counts_the_omitted(graph: Graph, document: GraphDocument) -> None:
    capped = graph_document(graph, prune(graph), max_nodes=10)
    inner = {"feature", "error", "bias"}
    all_inner = [node for node in document.nodes if node.kind in inner]
    kept = [node.path_share for node in capped.nodes if node.kind in inner]
    assert sorted(kept) == sorted(node.path_share for node in all_inner)[-10:]
    assert capped.metadata.counts.inner_left_out == len(all_inner) - 10
    assert document.metadata.counts.inner_left_out == 0
    ids = {node.node_id for node in capped.nodes}
    assert {node.node_id for node in document.nodes if node.kind in {"text", "image", "logit"}} <= ids
    assert all(link.source in ids and link.target in ids for link in capped.links)


def test_scores_are_those_of_the_graph_and_of_the_page(graph: Graph) -> None:
    pruned = prune(graph)
    nothing = torch.zeros(200)
    check = EdgeReport(
        **dict.fromkeys(("row", "source", "predicted", "measured", "largest", "error"), nothing),
        max_rel_error=2e-7,
        column_max_rel_error=3e-7,
        by_kind=(),
    )
    document = graph_document(graph, pruned, edge_check=check)
    values = {entry.key: entry.value for entry in document.metadata.scores}
    assert values["replacement_score"] == pytest.approx(score(graph).replacement, rel=1e-6)
    assert values["completeness_score"] == pytest.approx(score(graph).completeness, rel=1e-6)
    assert values["page_replacement_score"] == pytest.approx(score(graph, pruned.node_mask).replacement, rel=1e-6)
    assert values["edge_max_rel_error"] == 2e-7
    assert "200 edges" in document.metadata.scores[-1].reading
    unmeasured = {entry.key: entry.value for entry in graph_document(graph, pruned).metadata.scores}
    assert unmeasured["edge_max_rel_error"] is None


def test_feature_labels_and_names_lead_back_to_the_graph(graph: Graph) -> None:
    layer, feature = int(graph.nodes.layer[0]), int(graph.nodes.feature[0])
    document = graph_document(graph, prune(graph, 1.0, 1.0), feature_labels={(layer, feature): "odd tile"})
    labelled = [node for node in document.nodes if node.clerp == "odd tile"]
    assert labelled
    assert {(node.layer, node.feature_index) for node in labelled} == {(str(layer), feature)}
    assert {node.name for node in document.nodes} <= set(graph.nodes.ids())


def test_features_without_a_row_are_marked(graph: Graph) -> None:
    uncapped = graph.rows_to_node
    rows = torch.cat([uncapped[:5], uncapped[-2:]])
    partial = replace(
        graph,
        rows_to_node=rows,
        edges=torch.cat([graph.edges[:5], graph.edges[-2:]]),
        row_values=torch.cat([graph.row_values[:5], graph.row_values[-2:]]),
    )
    document = graph_document(partial, prune(partial))
    features = [node for node in document.nodes if node.kind == "feature"]
    assert any(not node.has_row for node in features)
    sources = {link.target for link in document.links}
    assert all(node.node_id not in sources for node in features if not node.has_row)


def test_targets_that_are_no_token_have_no_probability(graph: Graph) -> None:
    first, second = graph.targets
    contrast = replace(
        first, kind="difference", minus_token_id=second.token_id, label="red - blue", probability=float("nan")
    )
    contrasted = replace(graph, targets=(contrast, second))
    document = graph_document(contrasted, prune(contrasted))
    entry = next(node for node in document.nodes if node.clerp == "red - blue")
    assert entry.token_prob is None
    assert entry.feature is None
    assert document.q_params.clicked_id == entry.node_id


def test_a_target_given_twice_is_refused(graph: Graph) -> None:
    doubled = replace(graph, targets=(graph.targets[0], graph.targets[0]))
    with pytest.raises(GraphError, match="name each target once"):
        graph_document(doubled, prune(doubled))


def test_a_graph_pruned_elsewhere_is_refused(graph: Graph, make_graph: Callable[..., Graph]) -> None:
    with pytest.raises(GraphError, match="another graph"):
        graph_document(graph, prune(make_graph(seed=1)))


def test_export_writes_exactly_two_files(document: GraphDocument, tmp_path: Path) -> None:
    page = write_export(document, tmp_path / "new" / "graph")
    assert sorted(path.name for path in page.parent.iterdir()) == ["graph.json", "index.html"]
    assert json.loads((page.parent / "graph.json").read_text()) == document.to_tree()


def test_export_into_a_file_is_one_line_that_names_it(document: GraphDocument, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(GraphError, match="taken: cannot write the page") as caught:
        write_export(document, taken)
    assert "\n" not in str(caught.value)
