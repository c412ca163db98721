"""The central claim: each edge equals the measured effect of its intervention, image tokens included."""

from dataclasses import replace

import pytest
import torch

from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.edge_measurement import EdgeMeasurement
from clt.attribution.graphs.faithfulness import check_edges, row_sum_error
from clt.attribution.graphs.graph import BiasKind, NodeKind
from clt.attribution.graphs.targets import FeatureTarget, LogitDifference, LogitTargets
from clt.capture.sources.toy import toy_examples
from clt.errors import GraphError
from clt.transcoder.architecture import SparsitySettings

ARCHITECTURES = [
    {},
    {"first_offset": 1, "n_targets": 1},
    {"n_targets": 2, "skip": True, "drop_bos": True},
    {"read_site": "mlp_in", "skip": True, "first_offset": 1},
    {"read_site": "resid_pre", "skip": True},
    {"feature_offset": True, "n_targets": 2, "skip": True},
    {"read_site": "resid_post", "first_offset": 1, "drop_bos": True},
    {"sparsity": SparsitySettings(kind="jumprelu", threshold=0.7)},
]
TARGETS = (
    LogitTargets(),
    LogitDifference(token="a", minus="b", position=3),
    FeatureTarget(layer=1, feature=2, position=4),
)


@pytest.fixture(scope="module")
def toy_case(toy_adapter, make_random_clt):
    """The toy model with an image, a transcoder, its prompt and its graph."""
    example = toy_examples(1, seed=21)[0]
    inputs = toy_adapter.prepare(example.prompt, example.images)
    transcoder = make_random_clt(toy_adapter, n_features=256, k=8)
    return toy_adapter, transcoder, inputs, attribute(toy_adapter, transcoder, inputs)


@pytest.fixture(scope="module")
def small_report(toy_case):
    return check_edges(*toy_case, n_edges=30, per_kind=2, seed=3)


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_every_column_equals_its_intervention_in_float64(make_tiny_llama, make_random_clt, settings):
    adapter = make_tiny_llama()
    transcoder = make_random_clt(adapter, **settings)
    inputs = adapter.prepare("s i x t h")
    graph = attribute(adapter, transcoder, inputs, AttributionSettings(targets=TARGETS))
    measurement = EdgeMeasurement(adapter, transcoder, inputs, graph)
    measured = torch.stack([measurement.effect(source) for source in range(len(graph.nodes))], dim=1)
    kinds = set(graph.nodes.kind[(measured != 0).any(0)].tolist())
    assert kinds == {NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TEXT, NodeKind.BIAS}
    largest = graph.edges.abs().amax(1, keepdim=True)
    # Differences of two forwards: rounding of the values, not of the effect.
    assert float(((measured - graph.edges).abs() / largest).max()) < 1e-12
    above = graph.edges.abs() > 1e-6 * largest
    assert float(((measured - graph.edges).abs() / graph.edges.abs())[above].max()) < 1e-6


def test_edges_equal_their_interventions_with_an_image_in_float32(toy_case):
    report = check_edges(*toy_case)
    assert report.max_rel_error <= 1e-5
    assert report.column_max_rel_error <= 1e-5
    assert len(report.row) >= 200
    kinds = {item.kind: item for item in report.by_kind}
    assert set(kinds) == set(NodeKind) - {NodeKind.LOGIT}
    assert all(item.n_edges >= 40 for item in report.by_kind)
    assert sum(item.n_edges for item in report.by_kind) == len(report.row)
    assert max(item.max_rel_error for item in report.by_kind) == report.max_rel_error


def test_the_report_holds_distinct_edges_of_the_graph_that_are_not_zero(toy_case, small_report):
    graph, report = toy_case[-1], small_report
    assert len({*zip(report.row.tolist(), report.source.tolist(), strict=True)}) == len(report.row) < 40
    torch.testing.assert_close(report.predicted, graph.edges[report.row, report.source].double())
    assert bool((report.predicted != 0).all())
    torch.testing.assert_close(report.largest, graph.edges[report.row].abs().amax(1).double())
    torch.testing.assert_close(report.error, (report.predicted - report.measured).abs() / report.largest)
    again, other = (
        check_edges(*toy_case, n_edges=30, per_kind=2, seed=3),
        check_edges(*toy_case, n_edges=30, per_kind=2),
    )
    assert torch.equal(again.source, report.source) and not torch.equal(other.source, report.source)


@pytest.mark.parametrize("kind", [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TEXT, NodeKind.IMAGE, NodeKind.BIAS])
def test_wrong_columns_of_one_kind_are_found(toy_case, kind):
    adapter, transcoder, inputs, graph = toy_case
    edges = graph.edges.clone()
    edges[:, graph.nodes.is_kind(kind)] *= 1.01
    report = check_edges(adapter, transcoder, inputs, replace(graph, edges=edges), n_edges=10, per_kind=5)
    for item in report.by_kind:
        assert (item.max_rel_error > 1e-5) == (item.kind == kind)
    assert row_sum_error(replace(graph, edges=edges)) > 1e-5


def test_a_missing_edge_is_found_in_its_column(toy_case):
    adapter, transcoder, inputs, graph = toy_case
    edges = graph.edges.clone()
    bias = graph.nodes.is_kind(NodeKind.BIAS) & (graph.nodes.feature == BiasKind.DECODER)
    edges[-1, bias] = 0
    report = check_edges(adapter, transcoder, inputs, replace(graph, edges=edges), n_edges=5, per_kind=20)
    assert report.column_max_rel_error > 1e-4


def test_a_graph_of_a_text_model_has_no_image_edges_to_draw(make_tiny_llama, make_random_clt):
    adapter = make_tiny_llama(bias=False, dtype=torch.float32)
    transcoder, inputs = make_random_clt(adapter), adapter.prepare("a b c d e f g h i j")
    report = check_edges(adapter, transcoder, inputs, attribute(adapter, transcoder, inputs))
    assert {item.kind for item in report.by_kind} == set(NodeKind) - {NodeKind.LOGIT, NodeKind.IMAGE}
    assert report.max_rel_error <= 1e-5


def test_graphs_of_another_prompt_model_or_transcoder_are_refused(make_tiny_llama, make_random_clt):
    adapter = make_tiny_llama()
    transcoder, inputs = make_random_clt(adapter), adapter.prepare("a b c")
    graph = attribute(adapter, transcoder, inputs)
    with pytest.raises(GraphError, match="not of 'a b d'"):
        check_edges(adapter, transcoder, adapter.prepare("a b d"), graph)
    with pytest.raises(GraphError, match="the graph is of the model"):
        check_edges(make_tiny_llama(n_layers=2), transcoder, inputs, graph)
    for weight in transcoder.W_enc.values():
        weight.data *= 1.5
    with pytest.raises(GraphError, match="not those of this model, transcoder"):
        check_edges(adapter, transcoder, inputs, graph)
