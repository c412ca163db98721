"""crosslayer-coding's checkpoints against a restatement of its forward pass, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clt.convert.crosslayer_coding import load_crosslayer_coding, save_crosslayer_coding
from clt.errors import CheckpointError, ConfigError
from clt.transcoder.architecture import SparsitySettings

from .foreign import D, F, L, crosslayer_coding, draw, inputs, make, of_all_layers, same

JUMP, RELU = SparsitySettings(kind="jumprelu"), SparsitySettings(kind="relu")

VARIANTS: dict[str, dict[str, Any]] = {
    "jumprelu, skip": {"sparsity": JUMP, "skip": True},
    "relu": {"sparsity": RELU, "read_site": "mlp_in"},
    "later, horizon": {"sparsity": JUMP, "first_offset": 1, "n_targets": 1, "skip": True},
    "tied by source": {"sparsity": JUMP, "tied_decoders": "source"},
    "independent sum": {"sparsity": RELU, "independent": "sum"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_written_transcoder_is_the_same_function_there_and_read_back(variant: dict[str, Any], tmp_path: Path) -> None:
    transcoder, x = make(**variant), inputs()
    save_crosslayer_coding(transcoder, tmp_path / "out")
    same(crosslayer_coding(tmp_path / "out", x), of_all_layers(transcoder, x))
    loaded = load_crosslayer_coding(tmp_path / "out")
    same(loaded(x), of_all_layers(transcoder, x))
    assert loaded.config.read_site == transcoder.config.read_site


FORMS: dict[str, dict[str, Any]] = {
    "free": {},
    "normalised, skip": {"normalization_method": "mean_std", "skip_connection": True},
    "tied by source": {"decoder_tying": "per_source", "normalization_method": "sqrt_d_model", "skip_connection": True},
    "tied by target": {"decoder_tying": "per_target", "normalization_method": "mean_std", "skip_connection": True},
    "relu": {"activation_fn": "relu", "decoder_tying": "per_target"},
    "offsets by source": {"decoder_tying": "per_source", "enable_feature_offset": True},
    "offsets by target": {"decoder_tying": "per_target", "enable_feature_offset": True, "skip_connection": True},
}


def write_checkpoint(folder: Path, form: dict[str, Any]) -> None:
    """A checkpoint of random weights, with feature scales where decoders are tied."""
    settings = {
        "num_features": F,
        "num_layers": L,
        "d_model": D,
        "activation_fn": "jumprelu",
        "normalization_method": "none",
        "decoder_tying": "none",
        "skip_connection": False,
        "mlp_input_template": "transformer.h.{}.mlp.c_fc",
    } | form
    tied = settings["decoder_tying"] != "none"
    places = list(range(L)) if tied else [f"{s}->{t}" for t in range(L) for s in range(t + 1)]
    weights: dict[str, Tensor] = {}
    for i in range(L):
        key = f"encoder_module.encoders.{i}"
        weights |= draw(**{f"{key}.weight": (F, D), f"{key}.bias_param": (F,)})
        if tied:
            weights |= draw(**{f"decoder_module.feature_scale.{i}": (F,)})
            weights |= draw(**{f"decoder_module.feature_offset.{i}": (F,)})
            if not settings.get("enable_feature_offset"):
                weights[f"decoder_module.feature_offset.{i}"].zero_()
    for place in places:
        key = f"decoder_module.decoders.{place}"
        weights |= draw(**{f"{key}.weight": (D, F), f"{key}.bias_param": (D,)})
        if settings["skip_connection"]:
            own = tied or len(set(str(place).split("->"))) == 1
            weights[f"decoder_module.skip_weights.{place}"] = draw(W=(D, D))["W"] * own
    if settings["activation_fn"] == "jumprelu":
        weights |= draw(**{"theta_manager.log_threshold": (L, F)})
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "cfg.json").write_text(json.dumps(settings))
    stats = {
        part: {"mean": torch.randn(D).tolist(), "std": (torch.rand(D) + 0.5).tolist()} for part in ("inputs", "targets")
    }
    (folder / "norm_stats.json").write_text(json.dumps({str(i): stats for i in range(L)}))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_checkpoint_of_theirs_is_read_as_they_read_it(form: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, form)
    transcoder, x = load_crosslayer_coding(tmp_path), inputs()
    same(transcoder(x), crosslayer_coding(tmp_path, x))
    assert transcoder.config.read_site == "mlp_in"
    assert transcoder.config.feature_offset == form.get("enable_feature_offset", False)


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ({"activation_fn": "batchtopk"}, "activation_fn='batchtopk'"),
        ({"decoder_tying": "group"}, "decoder_tying='group'"),
        ({"normalization_method": "other"}, "normalization_method='other'"),
        ({"mlp_input_template": "blocks.{}.other"}, "mlp_input_template=.*--read-site"),
        ({"num_layers": 0}, "'num_layers' is 0"),
        ({"num_features": F + 1}, "encoders.2.weight' has shape"),
    ],
)
def test_settings_without_an_equivalent_are_refused(form: dict[str, Any], place: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    settings = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(settings | form))
    with pytest.raises(CheckpointError, match=place) as error:
        load_crosslayer_coding(tmp_path)
    assert "\n" not in str(error.value)


def test_skips_from_other_layers_are_refused(tmp_path: Path) -> None:
    key = "decoder_module.skip_weights.0->1"
    write_checkpoint(tmp_path, {"skip_connection": True})
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {key: torch.ones_like(weights[key])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{key}' is not zero"):
        load_crosslayer_coding(tmp_path)


def test_statistics_that_are_missing_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"normalization_method": "mean_std"})
    stats = json.loads((tmp_path / "norm_stats.json").read_text())
    del stats["1"]["targets"]["std"]
    (tmp_path / "norm_stats.json").write_text(json.dumps(stats))
    with pytest.raises(CheckpointError, match=r"norm_stats.json: key '1.targets.std'"):
        load_crosslayer_coding(tmp_path)


def test_offsets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clt\.feature_offset: crosslayer-coding does not support"):
        save_crosslayer_coding(make(sparsity=RELU, feature_offset=True), tmp_path / "out")


def test_topk_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to_jumprelu"):
        save_crosslayer_coding(make(), tmp_path / "out")
