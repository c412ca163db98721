"""Influence, pruning and scores on a graph small enough to compute by hand, and on random ones by matrix inverse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.attribution.graphs.graph import BiasKind, Graph, NodeKind, NodeTable, Target
from clt.attribution.graphs.scores import completeness_score, influence, prune, replacement_score, score
from clt.errors import GraphError
from clt.records import ModelIdentity
from clt.transcoder.architecture import CLTConfig

F0, F1, E0, E1, TOKEN, BIAS, LOGIT_A, LOGIT_B = range(8)


def node_table(kinds, layers, features):
    n = len(kinds)
    nowhere = torch.full((n,), -1, dtype=torch.int16)
    return NodeTable(
        kind=torch.tensor(kinds, dtype=torch.uint8),
        layer=torch.tensor(layers, dtype=torch.int16),
        position=torch.zeros(n, dtype=torch.int32),
        feature=torch.tensor(features, dtype=torch.int32),
        activation=torch.ones(n),
        image=nowhere,
        patch_row=nowhere,
        patch_col=nowhere,
    )


@pytest.fixture
def graph():
    """Two features, one token, two layers, two logits of weight 0.8 and 0.2; the numbers in this file follow from it.

    Normalised, without the bias:  F0 = TOKEN;  F1 = 3/4 F0 + 1/4 E0;  A = 1/2 F1 + 1/4 E1 + 1/4 TOKEN;
    B = 1/2 F0 + 1/2 F1.
    """
    kinds = [NodeKind.FEATURE] * 2 + [NodeKind.ERROR] * 2 + [NodeKind.TEXT, NodeKind.BIAS] + [NodeKind.LOGIT] * 2
    nodes = node_table(kinds, [0, 1, 0, 1, -1, -1, 2, 2], [3, 4, -1, -1, 9, BiasKind.TARGET, 5, 6])
    edges = torch.zeros(4, 8)
    edges[0, [TOKEN, BIAS]] = torch.tensor([2.0, 5.0])
    edges[1, [F0, E0, BIAS]] = torch.tensor([3.0, 1.0, -7.0])
    edges[2, [F1, E1, TOKEN]] = torch.tensor([-2.0, 1.0, 1.0])
    edges[3, [F0, F1]] = torch.tensor([1.0, -1.0])
    targets = [
        Target(kind="logit", label=label, position=0, token_id=token, layer=2, probability=weight, weight=weight)
        for label, token, weight in (("a", 5, 0.8), ("b", 6, 0.2))
    ]
    return Graph(
        nodes=nodes,
        rows_to_node=torch.tensor([F0, F1, LOGIT_A, LOGIT_B]),
        edges=edges,
        row_values=edges.sum(1),
        targets=tuple(targets),
        token_ids=torch.tensor([9]),
        token_strings=("x",),
        prompt="x",
        images=(),
        model=ModelIdentity(
            name="hand", revision="local", architecture="none", n_layers=2, d_model=4, fingerprint="00" * 32
        ),
        architecture=CLTConfig(n_features=8, k=1, n_layers=2, d_model=4),
        clt_fingerprint="11" * 32,
    )


def only(graph, *nodes):
    mask = torch.zeros(len(graph.nodes), dtype=torch.bool)
    mask[list(nodes)] = True
    return mask


def test_influence_is_the_hand_computed_one(graph):
    # F1: 0.8/2 + 0.2/2. F0: 0.2/2 + 0.5 * 3/4. TOKEN: 0.8/4 + 0.475. BIAS: 0.475 * 5/2 + 0.5 * 7/4.
    expected = [0.475, 0.5, 0.125, 0.2, 0.675, 2.0625, 0.0, 0.0]
    assert influence(graph).tolist() == pytest.approx(expected, abs=1e-12)


def test_scores_are_the_hand_computed_ones(graph):
    found = score(graph)
    assert found.replacement == pytest.approx(0.675, abs=1e-12)
    # Rows F0, F1, A, B with weights 0.475, 0.5, 0.8, 0.2 and error shares 0, 1/4, 1/4, 0.
    assert found.completeness == pytest.approx((0.475 + 0.375 + 0.6 + 0.2) / 1.975, abs=1e-12)
    assert found.uncomputed == 0
    assert (replacement_score(graph), completeness_score(graph)) == (found.replacement, found.completeness)


def test_biases_count_neither_as_explained_nor_as_error(graph):
    edges = graph.edges.clone()
    edges[:, BIAS] = torch.tensor([0.0, 100.0, -3.0, 9.0])
    assert score(replace(graph, edges=edges)) == score(graph)


def test_a_pruned_node_counts_as_error(graph):
    found = score(graph, keep=~only(graph, F0))
    # Paths end at TOKEN (0.8/4), E0, E1 and at F0 itself.
    assert found.replacement == pytest.approx(0.2, abs=1e-12)
    # Rows F1 (nothing left), A and B.
    assert found.completeness == pytest.approx((0.0 + 0.6 + 0.1) / 1.5, abs=1e-12)


def test_a_feature_without_a_row_counts_as_error_and_is_reported(graph):
    keep_rows = [1, 2, 3]
    capped = replace(
        graph,
        edges=graph.edges[keep_rows],
        rows_to_node=graph.rows_to_node[keep_rows],
        row_values=graph.row_values[keep_rows],
    )
    found = score(capped)
    assert capped.without_row.nonzero().flatten().tolist() == [F0]
    assert (found.replacement, found.uncomputed) == (pytest.approx(0.2), pytest.approx(0.475))
    assert found.replacement <= 0.675 <= found.replacement + found.uncomputed + 1e-12


def test_prune_keeps_the_hand_computed_nodes_and_edges(graph):
    # Nodes by score: TOKEN 0.675, F1 0.5, F0 0.475 hold 1.65 of 1.975 (83.5 %). The bias exceeds the cutoff 0.475.
    # Edges among them: TOKEN-F0 0.733, F0-F1 0.633, F1-A 0.533, TOKEN-A 0.267 hold 2.167 of 2.367 (91.5 %).
    pruned = prune(graph, node_threshold=0.8, edge_threshold=0.9)
    assert torch.equal(pruned.node_mask, only(graph, F0, F1, TOKEN, BIAS, LOGIT_A, LOGIT_B))
    sources, targets, weights = pruned.edge_list()
    found = set(zip(sources.tolist(), targets.tolist(), weights.tolist(), strict=True))
    expected = {(TOKEN, F0, 2.0), (F0, F1, 3.0), (F1, LOGIT_A, -2.0), (TOKEN, LOGIT_A, 1.0)}
    assert found == expected | {(BIAS, F0, 5.0), (BIAS, F1, -7.0)}
    assert weights.abs().tolist() == sorted(weights.abs().tolist(), reverse=True)
    assert torch.equal(pruned.influence, influence(graph))


def test_prune_drops_a_bias_below_the_cutoff(graph):
    edges = graph.edges.clone()
    edges[:, BIAS] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    assert not prune(replace(graph, edges=edges)).node_mask[BIAS]


def test_prune_removes_a_feature_whose_inputs_are_all_pruned(graph):
    edges = torch.zeros_like(graph.edges)
    edges[1, [E0, F0]] = torch.tensor([2.0, 1.0])
    edges[2, [F1, E1, TOKEN]] = torch.tensor([-2.0, 0.5, 1.5])
    edges[3, TOKEN] = 1.0
    # TOKEN 0.5, F1 0.4, E0 0.267, F0 0.133, E1 0.1: the first two hold 64 %.
    pruned = prune(replace(graph, edges=edges), node_threshold=0.6, edge_threshold=1.0)
    assert torch.equal(pruned.node_mask, only(graph, TOKEN, LOGIT_A, LOGIT_B))
    sources, targets, _ = pruned.edge_list()
    assert set(zip(sources.tolist(), targets.tolist(), strict=True)) == {(TOKEN, LOGIT_A), (TOKEN, LOGIT_B)}


def test_prune_removes_a_feature_that_only_a_pruned_edge_leaves(graph):
    # With A reading the token almost alone, F1 writes 0.002 to A and 0.1 to B: both edges are among the last.
    edges = graph.edges.clone()
    edges[2, TOKEN] = 1000.0
    assert prune(replace(graph, edges=edges), node_threshold=0.999, edge_threshold=1.0).node_mask[F1]
    pruned = prune(replace(graph, edges=edges), node_threshold=0.999, edge_threshold=0.75)
    assert not pruned.node_mask[F1] and not pruned.edge_mask[:, F1].any()


def test_prune_at_one_keeps_all_that_has_influence(graph):
    pruned = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    assert pruned.node_mask.all()
    assert torch.equal(pruned.edge_mask, graph.edges != 0)


@pytest.mark.parametrize("thresholds", [(0.0, 0.9), (1.1, 0.9), (0.9, -0.1), (0.9, float("nan"))])
def test_prune_refuses_a_threshold_that_is_no_share(graph, thresholds):
    with pytest.raises(GraphError, match="_threshold="):
        prune(graph, *thresholds)


def test_a_cycle_is_refused(graph):
    edges = graph.edges.clone()
    edges[0, F1] = 1.0
    for function in (influence, score, prune):
        with pytest.raises(GraphError, match="cycle"):
            function(replace(graph, edges=edges))


def test_a_graph_of_biases_has_no_scores(graph):
    edges = torch.zeros_like(graph.edges)
    edges[:, BIAS] = 1.0
    with pytest.raises(GraphError, match="are biases"):
        score(replace(graph, edges=edges))


@given(seed=st.integers(0, 10_000), n_features=st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_influence_is_the_inverse_minus_the_identity(make_graph, seed, n_features):
    graph = make_graph(n_features=n_features, words=("<s>", "<image>", "a", "b"), seed=seed)
    graph = replace(graph, edges=graph.edges.double())
    n, biases = len(graph.nodes), graph.nodes.is_kind(NodeKind.BIAS)
    sums = graph.edges[:, ~biases].abs().sum(1, keepdim=True)
    square = torch.zeros(n, n, dtype=torch.float64)
    square[graph.rows_to_node] = torch.where(sums > 0, graph.edges.abs() / sums, 0.0)
    eye = torch.eye(n, dtype=torch.float64)
    start = torch.zeros(n, dtype=torch.float64)
    start[graph.rows_to_node] = graph.target_weights
    expected = start @ (torch.linalg.inv(eye - square) - eye)
    torch.testing.assert_close(influence(graph), expected, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 10_000), node=st.floats(0.05, 1.0), edge=st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_a_pruned_graph_has_no_loose_ends(make_graph, seed, node, edge):
    graph = make_graph(words=("<s>", "<image>", "a", "b"), seed=seed)
    pruned = prune(graph, node, edge)
    nodes, rows = graph.nodes, graph.rows_to_node
    fixed = nodes.is_kind(NodeKind.TEXT, NodeKind.IMAGE, NodeKind.LOGIT)
    assert bool(pruned.node_mask[fixed].all())
    assert not pruned.edge_mask[:, ~pruned.node_mask].any() and not pruned.edge_mask[~pruned.node_mask[rows]].any()
    leaves = pruned.edge_mask.any(0)
    assert bool((leaves | fixed | ~pruned.node_mask).all())
    enters = pruned.edge_mask.any(1)
    assert bool((enters | fixed[rows] | ~pruned.node_mask[rows]).all())
    assert 0 <= replacement_score(graph, pruned.node_mask) <= replacement_score(graph) + 1e-12
    assert 0 <= completeness_score(graph, pruned.node_mask) <= 1


def test_pruned_graph_prints_what_is_kept(graph):
    pruned = prune(graph, node_threshold=0.8, edge_threshold=0.9)
    nodes, edges = len(pruned.node_mask.nonzero()), len(pruned.edge_list()[0])
    assert repr(pruned) == f"PrunedGraph(nodes={nodes} of 8, edges={edges} of 32)"
