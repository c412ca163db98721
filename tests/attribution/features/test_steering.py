"""Steering experiment: hand-computed ranking and matching, and a transcoder where one feature decides the answer."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clt.attribution.features.ranking import RankedFeatures, match_controls, rank_features
from clt.attribution.features.steering import SteeringSettings, steer
from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.graph import NodeKind
from clt.attribution.graphs.scores import influence
from clt.attribution.graphs.targets import LogitTargets
from clt.attribution.replacement.replacement_model import Intervention, ReplacementModel
from clt.capture.sources.toy import toy_examples
from clt.errors import InputError
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.encoding import decoder_norms
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling


def make_clt(adapter, size=0.02, **settings):
    """A random transcoder with decoders of the given size."""
    config = CLTConfig(
        **{"n_features": 64, "k": 8, "n_layers": adapter.n_layers, "d_model": adapter.d_model} | settings
    )
    scaling = replace(Scaling.identity(config.n_layers, config.d_model), rms_y=torch.full((config.n_layers,), 2.0))
    transcoder = CrossLayerTranscoder(config, scaling, seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in transcoder.W_dec.values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return transcoder


def correct_examples(adapter, count, answer=None):
    """Examples whose greedy answer, generated with the cache, is the expected one."""
    found = []
    for example in toy_examples(150, 31, ("exists",) if answer else ("odd", "background")):
        if answer not in (None, example.answer):
            continue
        wanted = adapter.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        generated = adapter.generate(adapter.prepare(example.prompt, example.images), len(wanted) + 1)[0]
        if generated == [*wanted, adapter.tokenizer.eos_token_id]:
            found.append(example)
        if len(found) == count:
            return found
    raise AssertionError("the toy model answers too few prompts")


def features_of(layers, norms):
    count = len(layers)
    return RankedFeatures(
        layer=torch.tensor(layers),
        feature=torch.arange(count),
        influence=torch.arange(count, 0, -1).double(),
        output_norm=torch.tensor(norms, dtype=torch.float64),
    )


def test_influence_and_output_norm_are_summed_over_positions(toy_adapter):
    transcoder = make_clt(toy_adapter, n_targets=2).folded()
    [example] = correct_examples(toy_adapter, 1)
    inputs = toy_adapter.prepare(example.prompt, example.images)
    graph = attribute(toy_adapter, transcoder, inputs, AttributionSettings(max_feature_nodes=100))
    flow, nodes = influence(graph), graph.nodes
    total, norms = defaultdict(float), defaultdict(float)
    for node in nodes.is_kind(NodeKind.FEATURE).nonzero()[:, 0].tolist():
        layer, feature = int(nodes.layer[node]), int(nodes.feature[node])
        vectors = [
            transcoder.W_dec[str(t)][layer - transcoder.sources_of(t).start, feature]
            for t in transcoder.targets_of(layer)
        ]
        total[layer, feature] += float(flow[node])
        norms[layer, feature] += float(nodes.activation[node]) * float(torch.cat(vectors).norm())
    features = rank_features(graph, transcoder)
    keys = list(zip(features.layer.tolist(), features.feature.tolist(), strict=True))
    assert sorted(keys) == sorted(total)
    assert keys == sorted(total, key=lambda key: (-total[key], key))
    for i, key in enumerate(keys):
        assert float(features.influence[i]) == pytest.approx(total[key], rel=1e-9)
        # The reference sums norms in float32.
        assert float(features.output_norm[i]) == pytest.approx(norms[key], rel=1e-5)


def test_decoder_norms_span_all_targets_of_a_layer(toy_adapter):
    transcoder = make_clt(toy_adapter, size=0.0)
    with torch.no_grad():
        transcoder.W_dec["1"][1, 7, 0] = 3.0
        transcoder.W_dec["3"][1, 7, 5] = -4.0
        transcoder.W_dec["3"][0, 7, 5] = 100.0
    assert float(decoder_norms(transcoder, 1)[7]) == 5.0
    assert float(decoder_norms(transcoder, 1).sum()) == 5.0


def test_controls_are_the_nearest_free_features_of_the_same_layer():
    #                 chosen            others
    layers = [0, 0, 1, 0, 0, 1, 1, 0]
    norms = [8.0, 6.0, 5.0, 7.0, 1.0, 50.0, 4.0, 3.0]
    # Feature 0 has the largest norm and takes 7 (feature 3); feature 1 is left with 3 (feature 7); layer 1 has 4 (6).
    assert match_controls(features_of(layers, norms), 3).tolist() == [3, 7, 6]


def test_controls_are_near_by_ratio():
    # 6 to 10 is a factor 1.67, 6 to 3 a factor 2, though 3 is nearer on the number line.
    assert match_controls(features_of([0, 0, 0], [6.0, 3.0, 10.0]), 1).tolist() == [2]


def test_controls_are_refused_when_a_layer_has_too_few_other_features():
    assert match_controls(features_of([0, 1, 1], [1.0, 1.0, 1.0]), 1) is None
    assert match_controls(features_of([0, 0, 0], [1.0, 1.0, 1.0]), 2) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.01, 100.0)), min_size=2, max_size=30), st.data())
def test_controls_are_distinct_unchosen_and_of_the_same_layer(listed, data):
    features = features_of([layer for layer, _ in listed], [norm for _, norm in listed])
    n = data.draw(st.integers(1, len(listed)))
    controls = match_controls(features, n)
    too_few = any(int((features.layer[:n] == layer).sum() > (features.layer[n:] == layer).sum()) for layer in range(3))
    assert (controls is None) == too_few
    if controls is not None:
        assert int(controls.min()) >= n
        assert len(set(controls.tolist())) == n
        assert torch.equal(features.layer[controls], features.layer[:n])


def test_ablating_the_feature_that_holds_the_answer_changes_it_and_the_control_does_not(toy_adapter):
    examples = correct_examples(toy_adapter, 3, answer="Yes")
    [token] = toy_adapter.tokenizer("Yes", add_special_tokens=False)["input_ids"]
    transcoder, last = make_clt(toy_adapter, size=1e-4), str(toy_adapter.n_layers - 1)
    unembedding = toy_adapter.lm_head.weight
    with torch.no_grad():
        # Active at every position, and written along the answer's own direction: without it the answer falls last.
        transcoder.W_enc[last][9] = 0.0
        transcoder.b_enc[last][9] = 50.0
        transcoder.W_dec[last][-1, 9] = 10 * (unembedding[token] - unembedding.mean(0))
    report = steer(toy_adapter, transcoder, examples, SteeringSettings(num_prompts=3, sizes=(1, 2)))
    assert (report.num_prompts, report.num_examples) == (3, 3)
    assert [(r.mlps, r.n) for r in report.results] == [
        ("original", 1),
        ("original", 2),
        ("replaced", 1),
        ("replaced", 2),
    ]
    for result in report.results:
        assert (result.ablated.successes, result.ablated.trials) == (3, 3)
        assert (result.control.successes, result.control.trials) == (0, 3)
        assert result.ablated_margin < 0
        assert result.control_margin == pytest.approx(1, abs=0.05)
        # Nothing else writes as much, and the report shows it.
        assert result.strength_ratio < 0.01


def test_report_equals_ablations_run_one_by_one(toy_adapter):
    transcoder = make_clt(toy_adapter, size=0.4)
    examples = correct_examples(toy_adapter, 4)
    settings = SteeringSettings(num_prompts=4, sizes=(1, 4), max_feature_nodes=40)
    model = ReplacementModel(toy_adapter, transcoder)
    changed, margins = defaultdict(list), defaultdict(list)

    def margin_of(logits, token):
        return float(logits[token] - max(value for i, value in enumerate(logits.tolist()) if i != token))

    for example in examples:
        inputs = toy_adapter.prepare(example.prompt, example.images)
        plain = toy_adapter.forward(inputs)[0, -1]
        token = int(plain.argmax())
        graph = attribute(
            toy_adapter,
            transcoder,
            inputs,
            AttributionSettings(targets=(LogitTargets(tokens=(token,)),), max_feature_nodes=40),
        )
        features = rank_features(graph, model.transcoder)
        for n in (1, 4):
            for side, rows in (("ablated", range(n)), ("control", match_controls(features, n).tolist())):
                changes = [
                    Intervention(layer=int(features.layer[i]), feature=int(features.feature[i]), value=0.0)
                    for i in rows
                ]
                for mlps in ("original", "replaced"):
                    errors = model.record_errors(inputs) if mlps == "replaced" else None
                    logits = model.forward(inputs, changes, errors, mlps=mlps)
                    changed[mlps, n, side].append(int(logits[0, -1].argmax()) != token)
                    margins[mlps, n, side].append(margin_of(logits[0, -1], token) / margin_of(plain, token))
    report = steer(toy_adapter, transcoder, examples, settings)
    assert len(report.results) == 4
    for result in report.results:
        assert result.ablated.successes == sum(changed[result.mlps, result.n, "ablated"])
        assert result.control.successes == sum(changed[result.mlps, result.n, "control"])
        for side, found in (("ablated", result.ablated_margin), ("control", result.control_margin)):
            # Batching changes float32 logits in their last digits.
            assert found == pytest.approx(sum(margins[result.mlps, result.n, side]) / 4, rel=1e-3, abs=1e-3)
    assert any(any(found) for found in changed.values())
    assert steer(toy_adapter, transcoder, examples, settings) == report


def test_wrong_answers_are_skipped_and_too_few_correct_ones_are_an_error(toy_adapter):
    transcoder = make_clt(toy_adapter)
    right = correct_examples(toy_adapter, 2)
    wrong = replace(right[0], answer="There is a red tile on a red background.")
    report = steer(
        toy_adapter, transcoder, [wrong, *right], SteeringSettings(num_prompts=2, sizes=(1,), max_feature_nodes=8)
    )
    assert (report.num_prompts, report.num_examples) == (2, 3)
    with pytest.raises(InputError, match="num_prompts=5: 2 of 3 examples are answered correctly"):
        steer(
            toy_adapter, transcoder, [wrong, *right], SteeringSettings(num_prompts=5, sizes=(1,), max_feature_nodes=8)
        )
    with pytest.raises(InputError, match="no answer"):
        steer(toy_adapter, transcoder, [replace(right[0], answer=None)])


def test_a_size_without_matching_controls_counts_for_neither_side(toy_adapter):
    transcoder = make_clt(toy_adapter, n_features=8)
    settings = SteeringSettings(num_prompts=1, sizes=(1, 32), mlps=("original",), max_feature_nodes=8)
    report = steer(toy_adapter, transcoder, correct_examples(toy_adapter, 1), settings)
    assert [(r.ablated.trials, r.control.trials) for r in report.results][1] == (0, 0)


def test_settings_refuse_sizes_below_one():
    with pytest.raises(ValidationError):
        SteeringSettings(sizes=(0,))
