"""Graphs of a tiny random Llama in float64 and of the toy model with an image in float32.

That every edge is its intervention's effect is in test_faithfulness.py; here: sums of rows, meaning of columns.
"""

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.faithfulness import row_sum_error
from clt.attribution.graphs.graph import BiasKind, NodeKind
from clt.attribution.graphs.nodes import seen_box
from clt.attribution.graphs.scores import influence, score
from clt.attribution.graphs.targets import FeatureTarget, LogitDifference, LogitTargets
from clt.attribution.replacement.frozen_model import record
from clt.capture.models.adapter import ModelAdapter
from clt.config import parse_config
from clt.errors import CheckpointError, ConfigError, GraphError
from clt.records import Modality
from clt.transcoder.model import Provenance

ARCHITECTURES = [
    {},
    {"first_offset": 1},
    {"n_targets": 1},
    {"n_targets": 2, "first_offset": 1},
    {"skip": True},
    {"skip": True, "first_offset": 1, "drop_bos": True},
    {"read_site": "mlp_in", "skip": True},
    {"read_site": "resid_pre", "skip": True, "n_targets": 2},
    {"read_site": "resid_post", "first_offset": 1},
    {"drop_bos": True},
]
PROMPT = "t h e q u i c k f o x"


@pytest.fixture(scope="module")
def adapter(make_tiny_llama):
    return make_tiny_llama()


@pytest.fixture(scope="module")
def inputs(adapter):
    return adapter.prepare(PROMPT)


@pytest.fixture(scope="module")
def graph(adapter, inputs, make_random_clt):
    return attribute(adapter, make_random_clt(adapter), inputs)


@pytest.fixture(scope="module")
def toy_inputs(toy_adapter):
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    return toy_adapter.prepare("USER: <image>\nIs there a red tile? ASSISTANT:", [picture])


@pytest.fixture(scope="module")
def toy_graph(toy_adapter, toy_inputs, make_random_clt):
    return attribute(toy_adapter, make_random_clt(toy_adapter, n_features=64, drop_bos=True), toy_inputs)


def rows_of(graph, *columns):
    """Rows of the graph as a dictionary by node."""
    names = zip(*(getattr(graph.nodes, c)[graph.rows_to_node].tolist() for c in columns), strict=True)
    return {name: graph.edges[row] for row, name in enumerate(names)}


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_row_sums_to_its_targets_value_in_float64(make_tiny_llama, make_random_clt, settings, bias):
    adapter = make_tiny_llama(bias=bias)
    wanted = (LogitTargets(), LogitDifference(token="a", minus="b", position=3), FeatureTarget(layer=1, feature=2))
    graph = attribute(
        adapter,
        make_random_clt(adapter, **settings),
        adapter.prepare(PROMPT),
        AttributionSettings(targets=wanted, batch_size=7),
    )
    assert graph.edges.dtype == torch.float64
    assert len(graph.rows_to_node) == graph.n_features + len(graph.targets) > 60
    assert row_sum_error(graph) < 1e-10


def test_every_row_sums_to_its_targets_value_with_an_image_in_float32(toy_graph):
    # Some hundred terms, each rounded at 6e-8 of the largest.
    assert row_sum_error(toy_graph) < 1e-5


def test_features_are_those_of_the_transcoder_where_it_looks(toy_adapter, toy_inputs, toy_graph, make_random_clt):
    transcoder = make_random_clt(toy_adapter, n_features=64, drop_bos=True)
    nodes, n = toy_graph.nodes, toy_graph.n_features
    x_LSD = record(toy_adapter, toy_inputs, "resid_mid").read
    codes = transcoder.encode(transcoder.scaling.standardise_x(x_LSD, (0, 1, 2, 3)))
    bos = toy_inputs.tokens.modality[0] == Modality.BOS
    assert int(bos.sum()) == 1
    expected = codes.values.masked_fill(bos[None, :, None], 0)
    found = torch.zeros(4, len(bos), 64)
    found[nodes.layer[:n].long(), nodes.position[:n].long(), nodes.feature[:n].long()] = nodes.activation[:n]
    dense = torch.zeros(4, len(bos), 64).scatter_add_(2, codes.indices.long(), expected)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
    order = list(zip(nodes.layer[:n].tolist(), nodes.position[:n].tolist(), nodes.feature[:n].tolist(), strict=True))
    assert order == sorted(set(order))


def test_nodes_come_in_order_with_unique_ids_and_image_tokens_know_their_patch(toy_graph, toy_inputs):
    nodes, S = toy_graph.nodes, toy_graph.n_positions
    kinds = nodes.kind.tolist()
    assert kinds[toy_graph.n_features : toy_graph.n_features + 4 * S] == [NodeKind.ERROR] * 4 * S
    tokens = slice(toy_graph.n_features + 4 * S, toy_graph.n_features + 5 * S)
    assert set(kinds[tokens]) == {NodeKind.TEXT, NodeKind.IMAGE}
    patches = nodes.is_kind(NodeKind.IMAGE)
    assert int(patches.sum()) == 64
    places = list(zip(nodes.patch_row[patches].tolist(), nodes.patch_col[patches].tolist(), strict=True))
    assert places == [(row, column) for row in range(8) for column in range(8)]
    assert set(nodes.image[patches].tolist()) == {0} and set(nodes.image[~patches].tolist()) == {-1}
    assert kinds[tokens.stop :] == [NodeKind.BIAS] * 5 + [NodeKind.LOGIT] * len(toy_graph.targets)
    assert nodes.feature[tokens].tolist() == toy_inputs.tokens.token_id[0].tolist()
    assert len(set(nodes.ids())) == len(nodes)
    assert toy_graph.images[0].grid == (8, 8) and toy_graph.images[0].box == (0, 0, 64, 64)
    assert toy_graph.images[0].pixels.shape == (64, 64, 3)


def test_bias_nodes_are_the_decoders_the_attentions_and_the_targets_own(graph, adapter):
    biases = graph.nodes.is_kind(NodeKind.BIAS)
    found = list(zip(graph.nodes.feature[biases].tolist(), graph.nodes.layer[biases].tolist(), strict=True))
    expected = [(BiasKind.DECODER, layer) for layer in range(3)] + [(BiasKind.ATTENTION, layer) for layer in range(3)]
    assert found == [*expected, (BiasKind.TARGET, -1)]


def test_image_patches_have_edges(toy_graph):
    patches = toy_graph.nodes.is_kind(NodeKind.IMAGE)
    assert bool((toy_graph.edges[:, patches] != 0).any(0).all())


def test_an_edge_runs_upwards_in_layers_and_forwards_in_position(graph):
    nodes, rows = graph.nodes, graph.rows_to_node
    layer, kind = nodes.layer.long(), nodes.kind.long()
    # Feature and error of layer l enter with the MLP's output, after what a feature of layer l reads.
    earlier = layer[None] < layer[rows][:, None]
    before = nodes.position[None] <= nodes.position[rows][:, None]
    allowed = (earlier | (kind == NodeKind.BIAS)) & (before | (kind == NodeKind.BIAS)) & (kind != NodeKind.LOGIT)
    assert not graph.edges[~allowed].any()
    # A target behind the last attention sees the last MLP at its own position only; features see all before them.
    to_features = allowed[: graph.n_features] & (kind != NodeKind.BIAS)
    assert bool((graph.edges[: graph.n_features][to_features] != 0).all())


def test_results_do_not_depend_on_the_batch_size(adapter, inputs, graph, make_random_clt):
    for batch_size in (1, 5, 1000):
        other = attribute(adapter, make_random_clt(adapter), inputs, AttributionSettings(batch_size=batch_size))
        torch.testing.assert_close(other.edges, graph.edges, rtol=1e-12, atol=1e-12)


def test_a_difference_is_the_difference_of_two_rows_and_an_active_feature_its_own_row(adapter, inputs, make_random_clt):
    plain = attribute(
        adapter, make_random_clt(adapter), inputs, AttributionSettings(targets=(LogitTargets(tokens=("a", "b")),))
    )
    chosen = next(n for n in range(plain.n_features) if plain.nodes.layer[n] == 2 and plain.nodes.position[n] == 9)
    feature = FeatureTarget(layer=2, feature=int(plain.nodes.feature[chosen]), position=9)
    wanted = AttributionSettings(targets=(LogitDifference(token="a", minus="b"), feature))
    other = attribute(adapter, make_random_clt(adapter), inputs, wanted)
    torch.testing.assert_close(other.edges[-2], plain.edges[-2] - plain.edges[-1])
    torch.testing.assert_close(other.edges[-1], plain.edges[chosen])


def test_nothing_after_a_target_has_influence_on_it(adapter, inputs, make_random_clt):
    wanted = AttributionSettings(targets=(FeatureTarget(layer=2, feature=4, position=6),))
    graph = attribute(adapter, make_random_clt(adapter), inputs, wanted)
    flow = influence(graph)
    assert not flow[(graph.nodes.position > 6) | ((graph.nodes.layer >= 2) & (graph.nodes.position >= 0))].any()
    assert flow[(graph.nodes.position == 6) & graph.nodes.is_kind(NodeKind.TEXT)] > 0


def test_a_cap_keeps_all_columns_and_the_rows_of_the_full_graph(adapter, inputs, graph, make_random_clt):
    settings = AttributionSettings(max_feature_nodes=30, batch_size=3)
    capped = attribute(adapter, make_random_clt(adapter), inputs, settings)
    assert len(capped.rows_to_node) == 30 + len(graph.targets)
    where = {node: row for row, node in enumerate(graph.rows_to_node.tolist())}
    full_rows = graph.edges[[where[node] for node in capped.rows_to_node.tolist()]]
    torch.testing.assert_close(capped.edges, full_rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(capped.row_values, graph.row_values[[where[n] for n in capped.rows_to_node.tolist()]])
    assert int(capped.without_row.sum()) == graph.n_features - 30
    chosen = influence(graph)[capped.rows_to_node[:30]].sum()
    best = influence(graph)[: graph.n_features].topk(30).values.sum()
    assert float(chosen) > 0.9 * float(best)


def test_a_cap_lowers_scores_by_no_more_than_the_share_it_reports(adapter, inputs, graph, make_random_clt):
    whole, before = score(graph), 0.0
    assert whole.uncomputed == 0
    for cap in (0, 10, 40, 80):
        settings = AttributionSettings(max_feature_nodes=cap, batch_size=4)
        part = score(attribute(adapter, make_random_clt(adapter), inputs, settings))
        assert before <= part.replacement <= whole.replacement <= part.replacement + part.uncomputed + 1e-12
        assert part.completeness <= whole.completeness
        before = part.replacement


def test_a_prompt_without_active_features_has_a_graph(adapter, inputs, make_random_clt):
    transcoder = make_random_clt(adapter)
    with torch.no_grad():
        for bias in transcoder.b_enc.values():
            bias.fill_(-1e4)
    graph = attribute(adapter, transcoder, inputs)
    assert graph.n_features == 0
    assert row_sum_error(graph) < 1e-10
    assert 0 < score(graph).replacement < 1


def test_the_answer_may_follow_the_prompt(adapter, graph, make_random_clt):
    longer = attribute(adapter, make_random_clt(adapter), adapter.prepare(PROMPT, answer="y e s"))
    assert longer.targets == graph.targets
    of_graph, of_longer = (rows_of(g, "kind", "layer", "position", "feature") for g in (graph, longer))
    for name, row in of_graph.items():
        if name[0] == NodeKind.FEATURE:
            torch.testing.assert_close(of_longer[name].sum(), row.sum())


def test_tokens_are_inputs_of_block_0_and_not_rows_of_the_table(adapter, inputs, graph, make_random_clt):
    scaled = copy.deepcopy(adapter.model)
    scaled.model.embed_tokens.register_forward_hook(lambda module, args, output: 1.7 * output)
    scaled.model.embed_tokens.weight.data /= 1.7
    other = ModelAdapter(scaled, adapter, adapter.identity)
    torch.testing.assert_close(attribute(other, make_random_clt(adapter), inputs).edges, graph.edges)


def test_an_embedding_column_carries_the_length_of_its_vector(adapter, inputs, graph):
    tokens = graph.nodes.is_kind(NodeKind.TEXT)
    table = adapter.model.model.embed_tokens.weight[inputs.model_inputs["input_ids"][0]]
    torch.testing.assert_close(graph.nodes.activation[tokens].double(), table.norm(dim=1), rtol=1e-6, atol=0)


def test_the_time_is_logged(adapter, inputs, make_random_clt, caplog):
    with caplog.at_level(logging.DEBUG, logger="clt.attribution.graphs.attribute"):
        attribute(adapter, make_random_clt(adapter), inputs, AttributionSettings(max_feature_nodes=0))
    assert "features" in caplog.text and " s" in caplog.text


def test_box_of_an_image_is_its_centre_crop():
    crop = SimpleNamespace(size={"shortest_edge": 336}, do_center_crop=True, crop_size={"height": 336, "width": 336})
    assert seen_box(crop, 640, 480) == pytest.approx((80, 0, 560, 480))
    assert seen_box(crop, 100, 300) == pytest.approx((0, 100, 100, 200))
    whole = SimpleNamespace(size={"height": 64, "width": 64}, do_center_crop=False)
    assert seen_box(whole, 640, 480) == (0, 0, 640, 480)


def test_another_models_transcoder_is_refused(adapter, inputs, make_random_clt):
    transcoder = make_random_clt(adapter)
    transcoder.provenance = Provenance(model=replace(adapter.identity, fingerprint="0" * 64, name="other"))
    with pytest.raises(CheckpointError, match="other"):
        attribute(adapter, transcoder, inputs)


def test_features_that_read_their_own_output_are_refused(adapter, inputs, make_random_clt):
    with pytest.raises(ConfigError, match="resid_post"):
        attribute(adapter, make_random_clt(adapter, read_site="resid_post"), inputs)


def test_encoders_with_a_norm_of_their_own_are_refused(adapter, inputs, make_random_clt):
    with pytest.raises(ConfigError, match="layer_norm"):
        attribute(adapter, make_random_clt(adapter, layer_norm=True), inputs)


def test_two_prompts_are_refused(adapter, inputs, make_random_clt):
    with pytest.raises(GraphError, match="prompts=2"):
        attribute(adapter, make_random_clt(adapter), adapter.collate([inputs, inputs]))


def test_every_kind_of_target_can_be_written():
    tree = {
        "targets": [
            {"tokens": ["yes", 3], "position": -2},
            {"token": "yes", "minus": 4},
            {"layer": 2, "feature": 7, "position": 5},
        ]
    }
    assert parse_config(AttributionSettings, tree, "test").targets == (
        LogitTargets(tokens=("yes", 3), position=-2),
        LogitDifference(token="yes", minus=4),
        FeatureTarget(layer=2, feature=7, position=5),
    )
    with pytest.raises(ConfigError, match=r"targets\.0.*tokenz"):
        parse_config(AttributionSettings, {"targets": [{"tokenz": ["yes"]}]}, "test")
