"""Targets of a prompt: selection, weights, inputs, and refused ones."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.attribution.graphs.sources import Sources
from clt.attribution.graphs.targets import FeatureTarget, LogitDifference, LogitTargets, resolve_targets
from clt.attribution.replacement.frozen_model import record
from clt.attribution.replacement.linear_model import LinearModel
from clt.errors import GraphError

PROMPT = "w h i c h t o k e n"


@pytest.fixture(scope="module")
def adapter(make_tiny_llama):
    return make_tiny_llama()


@pytest.fixture(scope="module")
def resolve(adapter, make_random_clt):
    """A function from settings to targets of one prompt, and the logits of that prompt."""
    inputs = adapter.prepare(PROMPT, answer="x y")
    transcoder = make_random_clt(adapter, drop_bos=True, first_offset=1).folded()
    sources = Sources(LinearModel(adapter, record(adapter, inputs, "resid_mid")), transcoder, inputs.tokens.select(0))

    def run(*settings):
        return resolve_targets(adapter, inputs, sources, settings)

    run.logits = sources.linear.recording.logits
    run.sources = sources
    return run


def test_default_targets_are_the_likeliest_tokens_before_the_answer(resolve):
    found = resolve(LogitTargets())
    last = len(PROMPT.split())
    assert {item.target.position for item in found} == {last}
    probabilities = resolve.logits[last].softmax(0).sort(descending=True)
    tokens = [item.target.token_id for item in found]
    assert tokens == probabilities.indices[: len(tokens)].tolist()
    assert [item.target.probability for item in found] == pytest.approx(probabilities.values[: len(tokens)].tolist())


@given(probability=st.floats(0.01, 1.0), most=st.integers(1, 40))
def test_likeliest_tokens_are_the_smallest_set_that_holds_the_probability(resolve, probability, most):
    found = resolve(LogitTargets(probability=probability, max_targets=most))
    held = [item.target.probability for item in found]
    assert len(found) <= most
    assert sum(held[:-1]) < probability
    assert len(found) == min(most, 28) or sum(held) >= probability - 1e-12


def test_weights_are_probabilities_over_their_sum_and_one_for_other_targets(resolve):
    logits = [item.target for item in resolve(LogitTargets(tokens=("a", "b", "c")))]
    total = sum(target.probability for target in logits)
    assert total < 1
    assert [target.weight for target in logits] == pytest.approx([target.probability / total for target in logits])
    mixed = [item.target for item in resolve(LogitDifference(token="a", minus="b"), FeatureTarget(layer=0, feature=3))]
    assert [target.weight for target in mixed] == [0.5, 0.5]
    assert all(math.isnan(target.probability) for target in mixed)


def test_tokens_are_named_by_text_or_id_at_any_position(resolve, adapter):
    by_text = resolve(LogitTargets(tokens=("q",), position=4))[0].target
    by_id = resolve(LogitTargets(tokens=(18,), position=-10))[0].target
    assert by_text == by_id
    assert (by_text.label, by_text.token_id, by_text.position, by_text.layer) == ("q", 18, 4, adapter.n_layers)


def test_logit_readout_is_relative_to_the_mean_and_its_value_is_the_models(resolve):
    readout = resolve(LogitTargets(tokens=("q",), position=4))[0].readout
    expected = resolve.logits[4, 18] - resolve.logits[4].mean()
    torch.testing.assert_close(readout.value[0], expected)
    final = resolve.sources.linear.recording.final[4]
    torch.testing.assert_close(readout.vector[0] @ final + readout.constant[0], expected)


def test_difference_readout_is_the_difference_of_two_logits(resolve):
    item = resolve(LogitDifference(token="q", minus="r", position=4))[0]
    torch.testing.assert_close(item.readout.value[0], resolve.logits[4, 18] - resolve.logits[4, 19])
    final = resolve.sources.linear.recording.final[4]
    torch.testing.assert_close(item.readout.vector[0] @ final + item.readout.constant[0], item.readout.value[0])
    assert (item.target.label, item.target.token_id, item.target.minus_token_id) == ("q - r", 18, 19)


def test_feature_readout_is_the_pre_activation_of_the_scaled_transcoder(resolve, adapter, make_random_clt):
    item = resolve(FeatureTarget(layer=1, feature=7, position=5))[0]
    transcoder = make_random_clt(adapter, drop_bos=True, first_offset=1)
    x_SD = transcoder.scaling.standardise_x(resolve.sources.linear.recording.read[1][None], (1,))[0]
    expected = x_SD[5] @ transcoder.W_enc["1"][7] + transcoder.b_enc["1"][7]
    torch.testing.assert_close(item.readout.value[0], expected)
    assert (item.target.label, item.target.layer, item.target.feature) == ("feature 1.7", 1, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((LogitTargets(tokens=("zzzz",)),), r"'zzzz' is not in the vocabulary"),
        ((LogitTargets(tokens=("a b",)),), r"'a b' is 2 tokens \['a', 'b'\]"),
        ((LogitTargets(tokens=(28,)),), r"target token 28: vocabulary ids are 0\.\.27"),
        ((LogitTargets(tokens=(-1,)),), "target token -1"),
        ((LogitTargets(position=14),), "target position 14: outside of the prompt, which has 14 tokens"),
        ((LogitTargets(tokens=("a", 2)),), "'a' at position 10 occurs twice"),
        ((FeatureTarget(layer=0, feature=1), FeatureTarget(layer=0, feature=1, position=10)), "occurs twice"),
        ((LogitDifference(token="a", minus=2),), "with itself"),
        ((FeatureTarget(layer=2, feature=1),), r"features 0\.\.19 in layers 0\.\.1"),
        ((FeatureTarget(layer=0, feature=20),), r"feature 0\.20"),
        ((FeatureTarget(layer=0, feature=1, position=0),), "does not act at position 0"),
        ((), "targets: there are none"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_in_one_line(resolve, settings, message):
    with pytest.raises(GraphError, match=message) as error:
        resolve(*settings)
    assert "\n" not in str(error.value)
