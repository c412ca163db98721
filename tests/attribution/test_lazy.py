"""Graphs and replaced outputs of a transcoder whose decoders stay in their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clt.attribution.graphs.attribute import attribute
from clt.attribution.replacement.interventions import Intervention
from clt.attribution.replacement.replacement_model import ReplacementModel, fingerprint
from clt.capture.models.adapter import ModelAdapter
from clt.transcoder.lazy_decoder import MappedDecoder
from clt.transcoder.model import CrossLayerTranscoder


@pytest.mark.parametrize(
    "settings", [{}, {"first_offset": 1, "skip": True}, {"feature_offset": True}, {"tied_decoders": "target"}], ids=str
)
def test_graph_and_interventions_are_those_of_the_loaded_transcoder(
    make_tiny_llama: Callable[[], ModelAdapter],
    make_random_clt: Callable[..., CrossLayerTranscoder],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    adapter = make_tiny_llama()
    make_random_clt(adapter, **settings).save_pretrained(tmp_path)
    loaded, lazy = (
        CrossLayerTranscoder.from_pretrained(tmp_path, dtype=torch.float64, lazy=lazy) for lazy in (False, True)
    )
    inputs = adapter.prepare("t h e q u i c k f o x")
    found, expected = attribute(adapter, lazy, inputs), attribute(adapter, loaded, inputs)
    torch.testing.assert_close(found.edges, expected.edges, rtol=1e-10, atol=1e-12)
    assert fingerprint(lazy) == fingerprint(loaded) == found.clt_fingerprint
    models = ReplacementModel(adapter, lazy), ReplacementModel(adapter, loaded)
    if not lazy.has_variants:
        assert all(isinstance(W_SFD, MappedDecoder) for W_SFD in models[0].transcoder.W_dec.values())
    change = [Intervention(layer=0, feature=1, value=2.0)]
    torch.testing.assert_close(models[0].forward(inputs, change), models[1].forward(inputs, change), rtol=0, atol=1e-10)
