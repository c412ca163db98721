"""The frozen model: the model itself without edits, linear in its edits when all parts are frozen, live where not."""

import pytest
import torch

from clt.attribution.replacement.frozen_model import FrozenModel, record
from clt.capture.models.hooks import attach
from clt.errors import GraphError

#: Float64 sums of some hundred terms of size 1 to 100.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(scope="module")
def adapter(make_tiny_llama):
    return make_tiny_llama()


@pytest.fixture(scope="module")
def recording(adapter):
    return record(adapter, adapter.prepare("f r o z e n"), "resid_mid")


@pytest.mark.parametrize("freeze", [("attention", "norms", "mlps"), ("attention",), ("norms",), ()], ids=str)
def test_without_edits_the_logits_are_the_models(adapter, recording, freeze):
    logits = FrozenModel(adapter, recording, freeze).forward()
    torch.testing.assert_close(logits, recording.logits, **EXACT)


def test_with_all_parts_frozen_effects_add_up(adapter, recording):
    frozen = FrozenModel(adapter, recording)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, 7, 24, dtype=torch.float64, generator=generator)

    def effect(extra):
        edits = {site: lambda y, x=x: y + x for site, x in extra.items()}
        return frozen.forward(edits) - recording.logits

    mlp, embed = effect({"lm.0.mlp_out": first}), effect({"lm.embed": second})
    torch.testing.assert_close(effect({"lm.0.mlp_out": first, "lm.embed": second}), mlp + embed, **EXACT)
    torch.testing.assert_close(effect({"lm.0.mlp_out": 2 * first}), 2 * mlp, **EXACT)


def test_a_part_that_is_not_frozen_responds_to_edits(adapter, recording):
    def mlp_change(freeze):
        frozen = FrozenModel(adapter, recording, freeze)
        with attach(frozen.adapter, read=["lm.2.mlp_out", "lm.2.pattern"]) as found:
            frozen.forward({"lm.0.mlp_out": lambda y: y + 1})
        changes = found["lm.2.mlp_out"][0] - recording.mlp_out[2], found["lm.2.pattern"][0] - recording.pattern[2]
        return [bool(change.abs().max() > 1e-3) for change in changes]

    assert mlp_change(("attention", "norms", "mlps")) == [False, False]
    assert mlp_change(("attention", "norms")) == [True, False]
    assert mlp_change(()) == [True, True]


def test_another_dtype_leaves_the_model_as_it_is(make_tiny_llama):
    adapter = make_tiny_llama(dtype=torch.float32)
    recording = record(adapter, adapter.prepare("a b c"), "resid_mid")
    logits = FrozenModel(adapter, recording, dtype=torch.float64).forward()
    assert logits.dtype == torch.float64 and adapter.dtype == torch.float32
    torch.testing.assert_close(logits, recording.logits.double(), rtol=1e-4, atol=1e-4)


def test_an_unknown_part_is_refused(adapter, recording):
    with pytest.raises(GraphError, match="freeze=\\['heads'\\]: unknown; choose among attention, norms, mlps"):
        FrozenModel(adapter, recording, ("heads",))
