"""Properties of the graph and of its file: bit-equal round trip, atomic writes, damage is a one-line error."""

import json
import pickle
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from clt.attribution.graphs.graph import Graph, NodeKind, NodeTable
from clt.errors import GraphError


@pytest.fixture
def graph(make_graph):
    graph = make_graph(words=("<s>", "<image>", "a", "<image>", "b"))
    difference = replace(graph.targets[1], kind="difference", minus_token_id=2, probability=float("nan"))
    return replace(graph, targets=(graph.targets[0], difference))


def same(one, other):
    assert one.dtype == other.dtype and torch.equal(one, other)


def test_save_and_load_give_back_the_same_graph(graph, tmp_path):
    path = tmp_path / "new" / "graph.safetensors"
    graph.save(path)
    loaded = Graph.load(path)
    for field in fields(NodeTable):
        same(getattr(loaded.nodes, field.name), getattr(graph.nodes, field.name))
    for name in ("rows_to_node", "edges", "row_values", "token_ids"):
        same(getattr(loaded, name), getattr(graph, name))
    for name in ("token_strings", "prompt", "model", "architecture", "clt_fingerprint"):
        assert getattr(loaded, name) == getattr(graph, name)
    assert repr(loaded.targets) == repr(graph.targets)
    same(loaded.images[0].pixels, graph.images[0].pixels)
    assert (loaded.images[0].grid, loaded.images[0].box) == (graph.images[0].grid, graph.images[0].box)
    assert [file.name for file in path.parent.iterdir()] == ["graph.safetensors"]


def test_edges_keep_their_dtype(graph, tmp_path):
    path = tmp_path / "graph.safetensors"
    replace(graph, edges=graph.edges.double()).save(path)
    same(Graph.load(path).edges, graph.edges.double())


def test_save_replaces_a_graph_and_leaves_it_alone_when_it_fails(graph, tmp_path, monkeypatch):
    path = tmp_path / "graph.safetensors"
    graph.save(path)
    before = path.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("clt.attribution.graphs.graph_file.write_tensors", full_disk)
    with pytest.raises(GraphError, match="No space left"):
        graph.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["graph.safetensors"]
    replace(graph, prompt="other").save(path)
    assert Graph.load(path).prompt == "other"


def test_save_below_a_file_is_refused(graph, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphError, match="cannot be written"):
        graph.save(tmp_path / "file" / "graph.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GraphError, match=r"none\.safetensors: no such graph file"):
        Graph.load(tmp_path / "none.safetensors")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_or_a_lost_end_is_noticed(graph, tmp_path, data):
    path = tmp_path / "graph.safetensors"
    graph.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        # The first 8 bytes and the header are a few percent of the file: draw from them as often as from the rest.
        header = 8 + int.from_bytes(content[:8], "little")
        where = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1)))
        content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = Graph.load(path)
    except GraphError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        # White space and names outside our header can change without changing the graph.
        same(loaded.edges, graph.edges)
        assert loaded.nodes.ids() == graph.nodes.ids() and loaded.prompt == graph.prompt


def test_a_pickle_is_not_read(tmp_path):
    path = tmp_path / "graph.pt"
    path.write_bytes(pickle.dumps({"adjacency_matrix": [1]}))
    with pytest.raises(GraphError, match="not a readable graph"):
        Graph.load(path)


def test_a_safetensors_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "graph.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(GraphError, match="not a readable graph"):
        Graph.load(path)


def test_another_layout_is_refused(graph, tmp_path):
    import zlib

    path = tmp_path / "graph.safetensors"
    graph.save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["graph"])
    text = json.dumps(header | {"schema": 99})
    save_file(tensors, path, metadata={"graph": text, "graph_crc32": str(zlib.crc32(text.encode()))})
    with pytest.raises(GraphError, match="layout 99, expected 1"):
        Graph.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": torch.zeros(3, 4)}, "edges have shape"),
        ({"row_values": torch.zeros(3)}, "edges have shape"),
        ({"token_strings": ("a",)}, "1 token strings for 5 tokens"),
        ({"targets": ()}, "the last rows are not the targets"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(graph, tmp_path, change, message):
    path = tmp_path / "graph.safetensors"
    replace(graph, **change).save(path)
    with pytest.raises(GraphError, match=message):
        Graph.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_edge_that_is_not_finite_is_refused(graph, tmp_path, value):
    edges = graph.edges.clone()
    edges[2, 3] = value
    replace(graph, edges=edges).save(tmp_path / "graph.safetensors")
    with pytest.raises(GraphError, match="not finite"):
        Graph.load(tmp_path / "graph.safetensors")


def test_ids_are_unique_and_identify_the_node(graph):
    ids = graph.nodes.ids()
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    by_kind = {NodeKind(kind): ids[node] for node, kind in enumerate(graph.nodes.kind.tolist())}
    assert by_kind[NodeKind.ERROR] == "error.2@4"
    assert by_kind[NodeKind.IMAGE] == "image@3"
    assert by_kind[NodeKind.BIAS] == "bias.target"
    assert by_kind[NodeKind.LOGIT] == "target.1"
    layer, position, feature = (int(getattr(graph.nodes, c)[0]) for c in ("layer", "position", "feature"))
    assert ids[0] == f"feature.{layer}.{feature}@{position}"


def test_target_weights_and_missing_rows_are_read_off_the_rows(graph):
    assert graph.target_weights.tolist() == [0.0] * graph.n_features + [0.9, 0.1]
    capped = replace(graph, edges=graph.edges[2:], rows_to_node=graph.rows_to_node[2:], row_values=graph.row_values[2:])
    assert not graph.without_row.any()
    assert capped.without_row.nonzero().flatten().tolist() == [0, 1]
