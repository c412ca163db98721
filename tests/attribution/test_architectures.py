"""Every supported architecture: MLPs replaced with recorded errors, and attribution that works or gives a reason."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.faithfulness import check_edges
from clt.attribution.replacement.replacement_model import ReplacementModel
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.errors import ModelError

from ..capture.tiny_models import IMAGE_PROCESSORS, MODELS, make_adapter, prompt_for

#: Norms, caps or streams that attribution does not linearise yet, and the words of the error.
REFUSED = {
    "qwen3_vl": "residual stream after layer 0",
    "gemma3": "Gemma3RMSNorm",
    "gemma2": "Gemma2RMSNorm",
    "gemma3_text": "Gemma3RMSNorm",
    "gpt2": "LayerNorm",
}


def question(name: str, adapter: ModelAdapter) -> PromptInputs:
    if name not in IMAGE_PROCESSORS:
        return adapter.prepare("what is the blue cat ?")
    return adapter.prepare(prompt_for(name, "what is red ?", 1), [Image.linear_gradient("L").resize((64, 32))])


@pytest.mark.parametrize("name", list(MODELS))
def test_recorded_errors_make_the_replacement_model_the_model(name, make_random_clt):
    adapter = make_adapter(name)
    batch = adapter.collate([question(name, adapter), adapter.prepare("the cat")])
    replacement = ReplacementModel(adapter, make_random_clt(adapter, drop_bos=True))
    errors = replacement.record_errors(batch)
    with torch.no_grad():
        expected = adapter.forward(batch)
    real = batch.real_mask
    found = replacement.forward(batch, errors=errors)
    torch.testing.assert_close(found[real], expected[real], atol=5e-5, rtol=1e-5)
    assert (replacement.forward(batch)[real] - expected[real]).abs().max() > 0.1, "without errors they differ"


@pytest.mark.parametrize("name", list(MODELS))
def test_edges_equal_interventions_or_attribution_is_an_error(name, make_random_clt):
    adapter = make_adapter(name)
    inputs, transcoder = question(name, adapter), make_random_clt(adapter)
    settings = AttributionSettings(max_feature_nodes=8)
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]) as error:
            attribute(adapter, transcoder, inputs, settings)
        assert "\n" not in str(error.value)
        return
    graph = attribute(adapter, transcoder, inputs, settings)
    # Every row sums to its value: nothing that acts is missing. float32.
    scale = graph.edges.abs().sum(1)
    assert ((graph.edges.sum(1) - graph.row_values).abs() <= 1e-4 * scale).all()
    report = check_edges(adapter, transcoder, inputs, graph, n_edges=12, per_kind=3)
    # The graph is float32, the interventions run in float64.
    assert max(report.max_rel_error, report.column_max_rel_error) <= 1e-5
    # LLaVA's image processor crops the centre.
    expected = [] if name not in IMAGE_PROCESSORS else [(16, 0, 48, 32) if name == "llava" else (0, 0, 64, 32)]
    assert [image.box for image in graph.images] == expected
