"""circuit-tracer's folders against a restatement of its forward pass, in both directions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from clt.convert.circuit_tracer import load_circuit_tracer, save_circuit_tracer
from clt.errors import ConfigError
from clt.transcoder.architecture import SparsitySettings

from .foreign import D, F, L, circuit_tracer, draw, inputs, make, of_all_layers, same, transcoder_set

JUMP, RELU = SparsitySettings(kind="jumprelu"), SparsitySettings(kind="relu")

VARIANTS: dict[str, dict[str, Any]] = {
    "jumprelu": {"sparsity": JUMP},
    "relu": {"sparsity": RELU, "read_site": "mlp_in"},
    "later layers only": {"sparsity": JUMP, "first_offset": 1},
    "horizon": {"sparsity": JUMP, "n_targets": 2},
    "later, horizon": {"sparsity": RELU, "first_offset": 1, "n_targets": 1},
    "tied by target": {"sparsity": JUMP, "tied_decoders": "target"},
    "tied by source": {"sparsity": RELU, "tied_decoders": "source"},
    "independent mean": {"sparsity": RELU, "independent": "mean"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_written_transcoder_is_the_same_function_there_and_read_back(variant: dict[str, Any], tmp_path: Path) -> None:
    transcoder, x = make(**variant), inputs()
    save_circuit_tracer(transcoder, tmp_path / "out")
    same(circuit_tracer(tmp_path / "out", x), of_all_layers(transcoder, x))
    loaded = load_circuit_tracer(tmp_path / "out")
    same(loaded(x), of_all_layers(transcoder, x))
    assert (
        loaded.config.read_site == transcoder.config.read_site
        and loaded.config.sparsity.kind == transcoder.config.sparsity.kind
    )


def test_a_feature_that_never_fires_stays_silent(tmp_path: Path) -> None:
    transcoder, x = make(sparsity=JUMP), inputs()
    transcoder.log_threshold["1"][2] = torch.inf
    save_circuit_tracer(transcoder, tmp_path / "out")
    same(circuit_tracer(tmp_path / "out", x), transcoder(x))
    assert load_circuit_tracer(tmp_path / "out").log_threshold["1"][2] == torch.inf


def test_zeros_beyond_the_horizon_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        save_circuit_tracer(make(sparsity=RELU, n_targets=1), tmp_path / "out")
    assert "matrices=3 (of 6)" in caplog.text


def write_settings(folder: Path, kind: str, **changes: Any) -> None:
    settings = {
        "model_kind": kind,
        "model_name": "toy/one",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | changes))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_theirs_is_read_as_they_read_it(skip: bool, tmp_path: Path) -> None:
    for i in range(L):
        weights = draw(W_enc=(F, D), b_enc=(F,), b_dec=(D,)) | (draw(W_skip=(D, D)) if skip else {})
        weights["threshold"] = torch.rand(F, dtype=torch.float64)
        save_file({f"{key}_{i}": tensor for key, tensor in weights.items()}, tmp_path / f"W_enc_{i}.safetensors")
        save_file(draw(**{f"W_dec_{i}": (F, L - i, D)}), tmp_path / f"W_dec_{i}.safetensors")
    write_settings(tmp_path, "cross_layer_transcoder")
    transcoder, x = load_circuit_tracer(tmp_path), inputs()
    same(transcoder(x), circuit_tracer(tmp_path, x))
    assert transcoder.config.read_site == "mlp_in" and transcoder.config.skip == skip


def test_a_set_of_single_layer_transcoders_is_read_as_they_read_it(tmp_path: Path) -> None:
    for i in range(L):
        weights = draw(W_enc=(F, D), b_enc=(F,), W_dec=(F, D), b_dec=(D,), W_skip=(D, D))
        weights["activation_function.threshold"] = torch.rand(F, dtype=torch.float64)
        save_file(weights, tmp_path / f"layer_{i}.safetensors")
    write_settings(tmp_path, "transcoder_set", feature_input_hook="ln2.hook_normalized")
    transcoder, x = load_circuit_tracer(tmp_path, read_site="mlp_in"), inputs()
    same(transcoder(x), transcoder_set(tmp_path, x))
    assert transcoder.config.n_targets == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "sparsity.kind=topk.*thresholds first"),
        ({"sparsity": SparsitySettings(kind="batch_topk")}, "sparsity.kind=batch_topk"),
        ({"sparsity": JUMP, "skip": True}, "clt.skip"),
        ({"sparsity": JUMP, "layer_norm": True}, "clt.layer_norm"),
        ({"sparsity": JUMP, "feature_offset": True}, "clt.feature_offset"),
    ],
)
def test_unsupported_settings_are_refused_and_leave_no_files(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=line):
        save_circuit_tracer(make(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())
