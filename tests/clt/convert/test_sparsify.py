"""Runs of sparsify and clt-training against a restatement of their forward pass, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clt.convert.sparsify import load_sparsify, save_sparsify
from clt.errors import CheckpointError, ConfigError

from .foreign import D, F, K, L, draw, inputs, make, same, sparsify

VARIANTS: dict[str, dict[str, Any]] = {
    "free": {},
    "single layers": {"n_targets": 1, "read_site": "mlp_in"},
    "horizon, skip": {"n_targets": 2, "skip": True},
    "tied by target": {"tied_decoders": "target", "skip": True},
    "independent nearest": {"independent": "nearest"},
    "offsets": {"feature_offset": True, "n_targets": 2, "skip": True},
    "offsets of single layers": {"feature_offset": True, "n_targets": 1},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_written_transcoder_is_the_same_function_there_and_read_back(variant: dict[str, Any], tmp_path: Path) -> None:
    transcoder, x = make(**variant), inputs()
    save_sparsify(transcoder, tmp_path / "out")
    same(sparsify(tmp_path / "out", x), transcoder(x))
    loaded = load_sparsify(tmp_path / "out")
    same(loaded(x), transcoder(x))
    assert (loaded.config.read_site, loaded.config.k) == (transcoder.config.read_site, K)


FORMS: dict[str, dict[str, Any]] = {
    "free, doubled keys": {"post_encoder_scale": True},
    "single layers": {"n_targets": 0, "skip_connection": True},
    "normalised, divided": {"normalize_io": True, "divide_cross_layer": True, "skip_connection": True},
    "tied by source": {"per_source_tied": True, "post_encoder_scale": True, "normalize_io": True},
    "concat": {"coalesce_topk": "concat", "post_encoder_scale": True, "skip_connection": True},
    "per layer": {"coalesce_topk": "per-layer", "normalize_io": True},
}
#: Theirs by default: a constant that active features add to their activations.
FORMS |= {f"{name}, offsets": form | {"train_post_encoder": True} for name, form in FORMS.items()}


def write_run(folder: Path, form: dict[str, Any], horizon: int = 2) -> None:
    """A run of random weights whose sources write to two layers, their own first."""
    for layer in range(L):
        n_targets = form.get("n_targets", min(horizon, L - layer))
        coalesced = form.get("coalesce_topk", "none")
        weights = draw(**{"encoder.weight": (F, D), "encoder.bias": (F,)})
        for j in range(max(1, n_targets)):
            several = f"s.{j}" if n_targets else ""
            own = draw(b_dec=(D,)) if coalesced == "none" else {}
            if coalesced == "none" and not form.get("per_source_tied"):
                own |= draw(W_dec=(F, D))
            if form.get("skip_connection") and coalesced == "none":
                own["W_skip"] = torch.zeros(D, D, dtype=torch.float64) if j else draw(W=(D, D))["W"]
            if form.get("post_encoder_scale"):
                own |= draw(post_enc_scale=(F,))
            own |= draw(post_enc=(F,))
            if not form.get("train_post_encoder"):
                own["post_enc"].zero_()
            weights |= {f"{key}{several}": tensor for key, tensor in own.items()}
        if coalesced != "none":
            blocks = 1 if coalesced == "concat" else min(layer, horizon) + 1
            weights |= draw(W_dec=(blocks * F, D), b_dec=(D,))
            if form.get("skip_connection"):
                weights |= draw(W_skip=(D, D))
        elif form.get("per_source_tied"):
            weights |= draw(W_dec=(F, D))
        elif n_targets:
            # A parameter under two names, as torch saves it.
            weights["W_dec"] = weights["W_decs.0"].clone()
        if form.get("normalize_io"):
            weights |= {key: (torch.rand(1) + 1).double() for key in ("in_norm", "out_norm")}
        path = folder / f"layers.{layer}.mlp"
        path.mkdir(parents=True)
        save_file(weights, path / "sae.safetensors")
        settings = {"activation": "topk", "k": K, "transcode": True, "d_in": D, "n_targets": n_targets}
        (path / "cfg.json").write_text(json.dumps(settings | form))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_run_of_theirs_is_read_as_they_read_it(form: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path, form)
    transcoder, x = load_sparsify(tmp_path), inputs()
    same(transcoder(x), sparsify(tmp_path, x))
    assert transcoder.config.read_site == "mlp_in"
    assert transcoder.config.feature_offset == form.get("train_post_encoder", False)


@pytest.mark.parametrize(
    ("hooks", "site"),
    [([], "mlp_in"), ([f"model.layers.{i}.post_attention_layernorm" for i in range(L)], "resid_mid")],
)
def test_read_site_comes_from_the_run(hooks: list[str], site: str, tmp_path: Path) -> None:
    write_run(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps({"hookpoints_in": hooks}))
    assert load_sparsify(tmp_path).config.read_site == site
    assert load_sparsify(tmp_path, read_site="resid_pre").config.read_site == "resid_pre"


def change_settings(folder: Path, layer: int = 1, **changes: Any) -> None:
    path = folder / f"layers.{layer}.mlp" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"activation": "groupmax"}, "activation='groupmax'"),
        ({"transcode": False}, "transcode=False"),
        ({"topk_coalesced": True}, "topk_coalesced=True"),
        ({"secondary_target_tied": True}, "secondary_target_tied=True"),
        ({"coalesce_topk": "group"}, "coalesce_topk='group'"),
        ({"k": K + 1}, f"k={K + 1}"),
        ({"n_targets": 3}, "n_targets=3"),
    ],
)
def test_settings_without_an_equivalent_are_refused(changes: dict[str, Any], place: str, tmp_path: Path) -> None:
    write_run(tmp_path, {})
    change_settings(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=place) as error:
        load_sparsify(tmp_path)
    assert "layers.1.mlp" in str(error.value) and "\n" not in str(error.value)


def test_skips_from_other_layers_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, {"skip_connection": True})
    path = tmp_path / "layers.0.mlp" / "sae.safetensors"
    weights = load_file(path)
    save_file(weights | {"W_skips.1": torch.ones_like(weights["W_skips.1"])}, path)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.*'W_skips.1' is not zero"):
        load_sparsify(tmp_path)


def test_offsets_of_another_size_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, {"train_post_encoder": True})
    path = tmp_path / "layers.0.mlp" / "sae.safetensors"
    save_file(load_file(path) | draw(**{"post_encs.1": (F + 1,)}), path)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.*'post_encs.1' has shape \(7,\)"):
        load_sparsify(tmp_path)


def test_two_folders_of_one_layer_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, {})
    (tmp_path / "layers.1.mlp").rename(tmp_path / "h.2.mlp")
    with pytest.raises(CheckpointError, match="layer 2 occurs twice"):
        load_sparsify(tmp_path)


@pytest.mark.parametrize("changes", [{"first_offset": 1}, {"layer_norm": True}, {"read_site": "resid_pre"}])
def test_unsupported_settings_are_refused_and_leave_no_files(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"clt.{next(iter(changes))}"):
        save_sparsify(make(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())
