"""Damaged folders of safetensors formats: one line naming file and key. For torch files see test_vlm_clt_training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clt.checkpoint.manifest import new_folder
from clt.convert import Format
from clt.convert.circuit_tracer import save_circuit_tracer
from clt.convert.crosslayer_coding import save_crosslayer_coding
from clt.convert.formats import load_format
from clt.convert.sparsify import save_sparsify
from clt.errors import CheckpointError, ConfigError
from clt.transcoder.architecture import SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder

from .foreign import D, F, make

JUMP = SparsitySettings(kind="jumprelu")

#: By format: its writer, a weight file of layer 1, its encoder and its bias, and its settings.
PLACES: dict[Format, tuple[Callable[[CrossLayerTranscoder, Path], None], str, str, str, str]] = {
    "circuit_tracer": (save_circuit_tracer, "W_enc_1.safetensors", "W_enc_1", "b_dec_1", "config.yaml"),
    "sparsify": (save_sparsify, "layers.1.mlp/sae.safetensors", "encoder.weight", "b_decs.0", "layers.1.mlp/cfg.json"),
    "crosslayer_coding": (
        save_crosslayer_coding,
        "model.safetensors",
        "encoder_module.encoders.1.weight",
        "decoder_module.decoders.1->1.bias_param",
        "cfg.json",
    ),
}


@pytest.fixture(params=PLACES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Format, Path]:
    """A format and a good folder in it."""
    save = PLACES[request.param][0]
    save(make() if request.param == "sparsify" else make(sparsity=JUMP), tmp_path / "out")
    load_format(request.param, tmp_path / "out")
    return request.param, tmp_path / "out"


def refused(name: Format, folder: Path, *parts: str) -> None:
    """One line that names the parts."""
    with pytest.raises(CheckpointError) as error:
        load_format(name, folder)
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_a_truncated_file_is_named(written: tuple[Format, Path]) -> None:
    name, folder = written
    path = folder / PLACES[name][1]
    path.write_bytes(path.read_bytes()[:-7])
    refused(name, folder, path.name)
    path.write_bytes(b"not a safetensors file at all")
    refused(name, folder, path.name)


def test_a_missing_file_is_named(written: tuple[Format, Path]) -> None:
    name, folder = written
    (folder / PLACES[name][1]).unlink()
    refused(name, folder, "model.safetensors" if name == "crosslayer_coding" else "1")


@pytest.mark.parametrize("text", [None, "{", "[1, 2]", "\0"])
def test_broken_settings_are_named(written: tuple[Format, Path], text: str | None) -> None:
    name, folder = written
    path = folder / PLACES[name][4]
    path.unlink() if text is None else path.write_text(text)
    # A folder without settings is not a layer.
    refused(name, folder, "layer 1 is missing" if text is None and name == "sparsify" else path.name)


def test_odd_settings_never_end_in_a_traceback(written: tuple[Format, Path]) -> None:
    name, folder = written
    path = folder / PLACES[name][4]
    good, refusals = yaml.safe_load(path.read_text()), 0
    for key in [*good, "coalesce_topk", "normalize_io", "per_source_tied"]:
        for odd in (None, "x", -1, 10**12, 2.5, [1], {"a": 1}, True):
            # JSON is YAML too.
            path.write_text(json.dumps(good | {key: odd}))
            try:
                load_format(name, folder)
            except CheckpointError as error:
                assert "\n" not in str(error)
                refusals += 1
    assert refusals > 10


@pytest.mark.parametrize("change", ["width", "features", "rank", "integer", "NaN", "gone", "unknown", "other key"])
def test_a_wrong_tensor_is_named_with_its_file(written: tuple[Format, Path], change: str) -> None:
    name, folder = written
    _, file, encoder, bias, _ = PLACES[name]
    weights = load_file(folder / file)
    changes = {
        "width": (encoder, torch.zeros(F, D + 1)),
        "features": (encoder, torch.zeros(F + 1, D)),
        "rank": (bias, torch.zeros(D, 1)),
        "integer": (bias, torch.zeros(D, dtype=torch.int64)),
        "NaN": (bias, torch.full((D,), torch.nan)),
        "unknown": ("extra", torch.zeros(2)),
    }
    place = bias
    if change in changes:
        place, tensor = changes[change]
        weights[place] = tensor
    else:
        tensor = weights.pop(bias)
        if change == "other key":
            weights[bias.replace("1", "9") if "1" in bias else "b_decs.7"] = tensor
    save_file(weights, folder / file)
    refused(name, folder, Path(file).name, f"'{place}'")


def test_layers_twice_and_missing_are_named(tmp_path: Path) -> None:
    save_circuit_tracer(make(sparsity=JUMP), tmp_path / "out")
    path = tmp_path / "out" / "W_dec_1.safetensors"
    path.with_name("W_dec_01.safetensors").write_bytes(path.read_bytes())
    refused("circuit_tracer", tmp_path / "out", "W_dec_1.safetensors", "layer 1 occurs twice")
    path.with_name("W_dec_01.safetensors").unlink()
    path.unlink()
    refused("circuit_tracer", tmp_path / "out", "layer 1 is missing")
    # The file of another layer under this one's name.
    path.write_bytes(path.with_name("W_dec_2.safetensors").read_bytes())
    refused("circuit_tracer", tmp_path / "out", "W_dec_1.safetensors", "'W_dec_1' is missing")


def test_a_negative_threshold_is_refused(tmp_path: Path) -> None:
    save_circuit_tracer(make(sparsity=JUMP), tmp_path / "out")
    path = tmp_path / "out" / "W_enc_2.safetensors"
    save_file(load_file(path) | {"threshold_2": torch.full((F,), -0.5, dtype=torch.float64)}, path)
    refused("circuit_tracer", tmp_path / "out", "W_enc_2.safetensors", "'threshold_2' is negative")


def test_a_hook_that_is_no_site_is_refused(tmp_path: Path) -> None:
    save_circuit_tracer(make(sparsity=JUMP), tmp_path / "out")
    path = tmp_path / "out" / "config.yaml"
    path.write_text(path.read_text().replace("hook_resid_mid", "ln2.hook_normalized"))
    refused("circuit_tracer", tmp_path / "out", "config.yaml", "feature_input_hook='ln2.hook_normalized'")
    path.write_text("!!python/object/apply:os.mkdir [crater]\n")
    refused("circuit_tracer", tmp_path / "out", "config.yaml")
    assert not Path("crater").exists()


@pytest.mark.parametrize("name", [*PLACES, "vlm_clt_training"])
def test_folders_of_something_else_are_refused(name: Format, tmp_path: Path) -> None:
    refused(name, tmp_path / "nowhere")
    (tmp_path / "README.md").write_text("nothing here")
    refused(name, tmp_path)
    with pytest.raises(ConfigError, match=r"other=1: the format .* does not use it"):
        load_format(name, tmp_path, other=1)


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="half way"), new_folder(target) as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("half way")
    assert not list((tmp_path / "deep").iterdir())
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="out: exists already"), new_folder(target):
        pass
    assert (target / "file").read_text() == "x"
    with pytest.raises(CheckpointError, match="cannot be written"), new_folder(target / "file" / "under"):
        pass
