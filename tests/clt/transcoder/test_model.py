"""The transcoder against a dense formula, its folded form, its shares and its files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clt.checkpoint.manifest import Checksums, save_tensors, write_manifest, write_text
from clt.errors import CheckpointError
from clt.records import ModelIdentity
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare, source_layers, sources_of, target_layers, targets_of
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling
from clt.version import code_version

L, D, F, K, B = 4, 6, 20, 3, 9
IDENTITY = ModelIdentity(name="toy", revision="local", architecture="X", n_layers=L, d_model=D, fingerprint="ab12")


def _transcoder(**changes: object) -> CrossLayerTranscoder:
    config = CLTConfig(**({"n_layers": L, "d_model": D, "n_features": F, "k": K} | changes))  # type: ignore[arg-type]
    scaling = Scaling(
        mean_x=torch.randn(L, D), rms_x=torch.rand(L) + 0.5, mean_y=torch.randn(L, D), rms_y=torch.rand(L) + 0.5
    )
    transcoder = CrossLayerTranscoder(config, scaling, provenance=Provenance(model=IDENTITY, store_id="s1"))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_()
    return transcoder.double().requires_grad_(False)


def _dense_forward(transcoder: CrossLayerTranscoder, x_LBD: Tensor) -> dict[int, Tensor]:
    """The definition, written with dense activations."""
    s = {k: v.double() for k, v in transcoder.scaling.tensors().items()}
    x_std = (x_LBD - s["mean_x"][:, None]) / s["rms_x"][:, None, None]
    if transcoder.config.layer_norm:
        centred = x_LBD - x_LBD.mean(dim=2, keepdim=True)
        x_std = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    z = {}
    for layer in source_layers(transcoder.config):
        pre = torch.relu(x_std[layer] @ transcoder.W_enc[str(layer)].T + transcoder.b_enc[str(layer)])
        kept = pre.topk(K, dim=1)
        z[layer] = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    y = {}
    for target in target_layers(transcoder.config):
        total = transcoder.b_dec[str(target)].expand(B, D)
        for row, source in enumerate(sources_of(transcoder.config, target)):
            total = total + z[source] @ transcoder.W_dec[str(target)][row]
        if transcoder.config.skip:
            total = total + x_std[target] @ transcoder.W_skip[str(target)].T
        y[target] = total * s["rms_y"][target] + s["mean_y"][target]
    return y


def test_repr_names_architecture_and_model() -> None:
    whole = _transcoder(n_targets=2)
    facts = "layers=4, d_model=6, features=20, k=3, targets=2, sparsity=topk, dtype=float64, model=toy"
    assert repr(whole) == f"CrossLayerTranscoder({facts})"
    part = CrossLayerTranscoder(whole.config, whole.scaling, LayerShare(sources=(1,), targets=(1, 2)))
    assert repr(part).endswith("dtype=float32, model=None, own_sources=(1,), own_targets=(1, 2))")


VARIANTS = [
    {},
    {"first_offset": 1},
    {"n_targets": 2},
    {"skip": True},
    {"first_offset": 1, "n_targets": 2, "skip": True},
    {"layer_norm": True, "skip": True},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_dense_definition(variant: dict[str, object]) -> None:
    transcoder = _transcoder(**variant)
    x = torch.randn(L, B, D, dtype=torch.float64)
    expected = _dense_forward(transcoder, x)
    torch.testing.assert_close(
        transcoder(x), torch.stack([expected[t] for t in sorted(expected)]), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_transcoder_is_the_same_function_of_raw_inputs(variant: dict[str, object]) -> None:
    transcoder = _transcoder(**variant)
    x = torch.randn(L, B, D, dtype=torch.float64)
    torch.testing.assert_close(transcoder.folded()(x), transcoder(x), rtol=1e-9, atol=1e-9)


def test_sources_and_targets_are_two_views_of_the_same_pairs() -> None:
    for offset in (0, 1):
        for horizon in (None, 1, 2, 9):
            config = CLTConfig(n_layers=5, d_model=2, n_features=4, k=1, first_offset=offset, n_targets=horizon)  # type: ignore[arg-type]
            pairs = {(s, t) for t in range(5) for s in sources_of(config, t)}
            assert pairs == {(s, t) for s in range(5) for t in targets_of(config, s)}
            assert pairs == {(s, t) for s in range(5) for t in range(5) if 0 <= t - s - offset < (horizon or 5)}


def test_offset_one_leaves_the_first_mlp_without_source_and_the_last_layer_without_encoder() -> None:
    config = CLTConfig(n_layers=3, d_model=2, n_features=4, k=1, first_offset=1)
    assert source_layers(config) == (0, 1) and target_layers(config) == (1, 2)


def test_a_share_starts_from_the_same_weights_as_the_whole() -> None:
    config = CLTConfig(n_layers=L, d_model=D, n_features=F, k=K)
    whole = CrossLayerTranscoder(config, Scaling.identity(L, D), seed=7)
    part = CrossLayerTranscoder(config, Scaling.identity(L, D), LayerShare(sources=(1, 3), targets=(0, 2)), seed=7)
    assert set(part.W_enc) == {"1", "3"} and set(part.W_dec) == {"0", "2"}
    for layer in ("1", "3"):
        assert torch.equal(part.W_enc[layer], whole.W_enc[layer])


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_reproduce_outputs_and_provenance(tmp_path: Path, variant: dict[str, object]) -> None:
    transcoder = _transcoder(**variant).float()
    transcoder.save_pretrained(tmp_path)
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    x = torch.randn(L, B, D)
    assert torch.equal(loaded(x), transcoder(x))
    assert loaded.provenance == transcoder.provenance and loaded.config == transcoder.config
    assert json.loads((tmp_path / "transcoder.json").read_text())["created_by"] == code_version()


def test_a_flipped_bit_in_a_checkpoint_with_manifest_is_refused(tmp_path: Path) -> None:
    _transcoder().float().save_pretrained(tmp_path)
    checksums: Checksums = {}
    for path in sorted(tmp_path.iterdir()):
        write_text(path, path.read_text(), checksums) if path.suffix != ".safetensors" else save_tensors(
            path, load_file(path), checksums
        )
    write_manifest(tmp_path, checksums)
    assert CrossLayerTranscoder.from_pretrained(tmp_path).config.d_model == D
    damaged = tmp_path / "layer_02.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="layer_02"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def _damage_truncate(folder: Path) -> str:
    path = folder / "layer_01.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "layer_01.safetensors"


def _damage_missing(folder: Path) -> str:
    (folder / "layer_02.safetensors").unlink()
    return "layer_02.safetensors"


def _damage_format(folder: Path) -> str:
    card = json.loads((folder / "transcoder.json").read_text())
    (folder / "transcoder.json").write_text(json.dumps(card | {"format": "other/9"}))
    return "other/9"


def _damage_width(folder: Path) -> str:
    card = json.loads((folder / "transcoder.json").read_text())
    card["config"]["d_model"] = D + 1
    (folder / "transcoder.json").write_text(json.dumps(card))
    return "mean_x"


@pytest.mark.parametrize("damage", [_damage_truncate, _damage_missing, _damage_format, _damage_width])
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_place(tmp_path: Path, damage: object) -> None:
    _transcoder().float().save_pretrained(tmp_path)
    place = damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=place) as error:
        CrossLayerTranscoder.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
