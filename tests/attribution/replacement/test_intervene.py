"""`ReplacementModel.intervene` against attribution edges, against plain forwards, and on the model itself."""

import logging
import pickle

import pytest
import torch

from clt.attribution.graphs.attribute import attribute
from clt.attribution.graphs.graph import NodeKind
from clt.attribution.replacement.feature_table import FeatureChanges, FeatureTable
from clt.attribution.replacement.intervene import Frozen
from clt.attribution.replacement.replacement_model import Intervention, ReplacementModel
from clt.errors import GraphError, ModelError
from clt.records import SparseCodes

PROMPT = "t h e q u i c k f o x"
EVERYTHING: tuple[Frozen, ...] = ("attention", "norms", "features")
TOKENS = ("a", "b", "c")


@pytest.fixture(scope="module", params=[{}, {"skip": True, "n_targets": 2}, {"drop_bos": True, "first_offset": 1}])
def model(request, make_tiny_llama, make_random_clt):
    # Four layers: with first_offset 1, features of layer l first act on those of layer l + 2.
    adapter = make_tiny_llama(n_layers=4)
    return ReplacementModel(adapter, make_random_clt(adapter, **request.param))


def test_direct_effect_on_every_logit_and_feature_is_the_edge(model: ReplacementModel) -> None:
    inputs = model.prepare(PROMPT)
    graph = attribute(model.adapter, model.transcoder, inputs)
    features = graph.nodes.is_kind(NodeKind.FEATURE).nonzero()[:, 0].tolist()
    compared = 0
    for node in features[::7]:
        layer, position = int(graph.nodes.layer[node]), int(graph.nodes.position[node])
        feature = int(graph.nodes.feature[node])
        double = Intervention(layer=layer, feature=feature, position=position, scale=2.0)
        result = model.intervene(inputs, [double], freeze=EVERYTHING)
        change_V = (result.logits - result.logits_before)[-1]
        for row, target in enumerate(graph.targets, start=len(graph.rows_to_node) - len(graph.targets)):
            effect = float(change_V[target.token_id] - change_V.mean())
            # Two forwards in float64, whose norms run in float64 as well.
            assert effect == pytest.approx(float(graph.edges[row, node]), rel=1e-6, abs=1e-9)
        rows = {int(n): row for row, n in enumerate(graph.rows_to_node.tolist())}
        numbers = {
            (int(graph.nodes.layer[n]), int(graph.nodes.position[n]), int(graph.nodes.feature[n])): n for n in features
        }
        for change in result.changed:
            if change.before > 0 and change.after > 0:
                edge = float(graph.edges[rows[numbers[change[:3]]], node])
                assert change.after - change.before == pytest.approx(edge, rel=1e-6, abs=1e-8)
                compared += 1
    assert compared > 10


@pytest.mark.parametrize("mlps", ["replaced", "original"])
def test_nothing_frozen_is_a_plain_forward_with_interventions(model: ReplacementModel, mlps) -> None:
    inputs = model.prepare(PROMPT)
    changes = [Intervention(layer=1, feature=3, value=2.0), Intervention(layer=1, feature=5, position=4, scale=0.0)]
    result = model.intervene(inputs, changes, freeze=(), mlps=mlps)
    errors = model.record_errors(inputs) if mlps == "replaced" else None
    expected = model.forward(inputs, changes, errors, mlps=mlps)[0]
    torch.testing.assert_close(result.logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.logits_before, model.adapter.forward(inputs)[0], rtol=1e-9, atol=1e-9)


def test_each_frozen_part_keeps_less_of_the_response(model: ReplacementModel) -> None:
    inputs = model.prepare(PROMPT)
    change = [Intervention(layer=0, feature=3, position=4, value=3.0)]
    seen = [model.intervene(inputs, change, freeze=parts).logits for parts in ((), ("attention",), EVERYTHING)]
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
    # Attention is the only way from one position to later ones: patterns frozen or not, earlier positions stay.
    before = model.adapter.forward(inputs)[0]
    for logits in seen:
        torch.testing.assert_close(logits[:4], before[:4], rtol=1e-9, atol=1e-9)
    by_name = model.intervene(inputs, change, freeze="attention").logits
    assert torch.equal(by_name, seen[1])


def test_features_upstream_of_an_intervention_do_not_change(model: ReplacementModel) -> None:
    changed = model.intervene(PROMPT, [Intervention(layer=0, feature=3, position=4, value=3.0)]).changed
    assert len(changed) > 0
    assert bool(((changed.layer > 0) & (changed.position >= 4)).all())


def test_intervention_without_effect_is_an_error_or_a_warning(model, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(GraphError, match="interventions is empty"):
        model.intervene(PROMPT, [])
    with pytest.raises(GraphError, match=r"freeze=\['mlp'\]: unknown; choose among attention, norms, features"):
        model.intervene(PROMPT, [Intervention(layer=1, feature=3, value=1.0)], freeze=["mlp"])
    table = model.features(PROMPT)
    inactive = next(f for f in range(20) if not bool(((table.layer == 1) & (table.feature == f)).any()))
    with caplog.at_level(logging.WARNING):
        result = model.intervene(PROMPT, [Intervention(layer=1, feature=inactive, scale=5.0)])
    assert "changed no activation" in caplog.text and len(result.changed) == 0


def test_each_intervention_without_effect_is_named_also_while_generating(
    model: ReplacementModel, caplog: pytest.LogCaptureFixture
) -> None:
    row = next(iter(model.features(PROMPT).where(layer=1)))
    works = Intervention(layer=1, feature=row.feature, position=row.position, value=9.0)
    idle = Intervention(layer=1, feature=row.feature, position=row.position, scale=1.0)
    for run in (
        lambda both: model.intervene(PROMPT, both),
        lambda both: model.generate(PROMPT, 3, both, mlps="original"),
    ):
        caplog.clear()
        run([works])
        assert "changed no activation" not in caplog.text
        run([works, idle])
        assert f"{idle} changed no activation:" in caplog.text


def test_entries_of_a_feature_table_are_numbers_of_an_intervention(model: ReplacementModel) -> None:
    row = model.features(PROMPT).where(layer=1).top(1)
    plain = Intervention(layer=1, feature=int(row.feature), position=int(row.position), scale=3.0)
    change = Intervention(
        layer=row.layer[0], feature=row.feature[0], position=row.position[0].numpy(), scale=torch.tensor(3.0)
    )
    assert change == plain and hash(change) == hash(plain)
    for wrong in ({"feature": 1.5}, {"layer": "1"}, {"position": torch.tensor([1, 2])}, {"scale": "x"}):
        with pytest.raises(GraphError, match=f"{next(iter(wrong))}=.* is not a single number of its kind"):
            Intervention(**({"layer": 1, "feature": 1, "scale": 1.0} | wrong))


def test_results_hold_no_model(model: ReplacementModel) -> None:
    result = model.intervene(PROMPT, [Intervention(layer=1, feature=3, value=2.0)])
    again = pickle.loads(pickle.dumps(result))
    assert repr(again) == repr(result) and torch.equal(again.logits, result.logits)
    assert len(pickle.dumps(result)) < sum(p.numel() for p in model.adapter.model.parameters())


def test_norms_of_another_kind_are_refused_only_where_they_are_frozen() -> None:
    from ...capture.tiny_models import make_adapter
    from ..conftest import build_random_clt

    adapter = make_adapter("gpt2")
    model = ReplacementModel(adapter, build_random_clt(adapter))
    change = [Intervention(layer=0, feature=3, value=3.0)]
    assert model.intervene("the cat sat", change, freeze="attention").logits.isfinite().all()
    with pytest.raises(ModelError, match="LayerNorm"):
        model.intervene("the cat sat", change, freeze="norms")


def test_result_names_tokens_and_changes(model: ReplacementModel) -> None:
    result = model.intervene(PROMPT, [Intervention(layer=0, feature=3, position=4, value=9.0)])
    tokens = result.next_tokens(2)
    after = result.logits[-1].float().softmax(-1)
    assert 2 <= len(tokens) <= 4 and {t.token_id for t in tokens} >= set(after.topk(2).indices.tolist())
    assert all(t.after == pytest.approx(float(after[t.token_id])) for t in tokens)
    assert "features changed" in repr(result) and "->" in repr(result)


def table(rows: list[tuple[int, int, int, float]]) -> FeatureTable:
    layer, position, feature, activation = zip(*rows, strict=True) if rows else ((), (), (), ())
    return FeatureTable(
        layer=torch.tensor(layer, dtype=torch.int64),
        position=torch.tensor(position, dtype=torch.int64),
        feature=torch.tensor(feature, dtype=torch.int64),
        activation=torch.tensor(activation),
        layers=(1, 2),
        n_features=5,
        tokens=TOKENS,
    )


def test_table_of_hand_written_codes() -> None:
    values = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]], [[0.0, 0.0], [4.0, 0.5], [0.0, 0.0]]])
    indices = torch.tensor([[[0, 4], [0, 0], [2, 0]], [[0, 0], [1, 3], [0, 0]]], dtype=torch.int32)
    found = FeatureTable.from_codes(SparseCodes(values=values, indices=indices, n_features=5), (1, 2), TOKENS)
    assert [tuple(row) for row in found] == [
        (1, 0, 0, 1.0),
        (1, 0, 4, 2.0),
        (1, 2, 2, 3.0),
        (2, 1, 1, 4.0),
        (2, 1, 3, 0.5),
    ]
    dense = torch.zeros(2, 3, 5)
    for layer, position, feature, activation in found:
        dense[layer - 1, position, feature] = activation
    assert torch.equal(found.dense(), dense)
    assert [row.activation for row in found.top(2)] == [4.0, 3.0] and len(found.top(99)) == 5
    assert torch.equal(found.top(99).dense(), dense)
    assert len(found.where(layer=2)) == 2 and len(found.where(position=-1)) == 1
    assert len(found.where(layer=1, position=0)) == 2
    for refused in (lambda: found.top(0), lambda: found.where(layer=0), lambda: found.where(position=3)):
        with pytest.raises(GraphError):
            refused()
    assert repr(found).splitlines()[0] == "FeatureTable: 5 active features, 3 tokens, layers 1..2"


def test_changes_between_hand_written_tables() -> None:
    before = table([(1, 0, 4, 2.0), (1, 2, 2, 3.0), (2, 1, 1, 4.0)])
    after = table([(1, 0, 4, 2.0), (2, 1, 1, 4.5), (2, 2, 0, 1.0)])
    changes = FeatureChanges.between(before, after)
    assert [tuple(row) for row in changes] == [(1, 2, 2, 3.0, 0.0), (2, 2, 0, 0.0, 1.0), (2, 1, 1, 4.0, 4.5)]
    assert len(FeatureChanges.between(before, before)) == 0
    assert len(FeatureChanges.between(table([]), table([]))) == 0
    # Rounding is no change.
    assert len(FeatureChanges.between(table([(1, 0, 4, 2.0)]), table([(1, 0, 4, 2.00001)]))) == 0


def test_unknown_kind_of_mlp_outputs_is_refused(model: ReplacementModel) -> None:
    inputs = model.prepare(PROMPT)
    for call in (model.forward, model.codes, model.features, model.generate):
        with pytest.raises(GraphError, match="mlps='orginal': unknown; choose among replaced, original"):
            call(inputs, mlps="orginal")
