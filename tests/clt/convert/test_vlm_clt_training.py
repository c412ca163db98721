"""The vlm-clt-training format: read, written, measured, and never executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.convert.files import read_pickled
from clt.convert.vlm_clt_training import load_vlm_clt_training, save_vlm_clt_training
from clt.errors import CheckpointError, ConfigError, StoreError
from clt.records import ActivationBatch, TokenTable
from clt.transcoder.architecture import SparsitySettings

from .foreign import D, F, K, L, draw, inputs, make, of_all_layers, same, vlm_clt_training

RELU = SparsitySettings(kind="relu")


def batches(n: int = 2) -> list[ActivationBatch]:
    names = ("sample", "position", "token_id", "modality", "patch_row", "patch_col", "image")
    table = TokenTable(**dict.fromkeys(names, torch.zeros(9, dtype=torch.int64)))
    return [ActivationBatch(x=inputs(), y=inputs(), tokens=table) for _ in range(n)]


def write_folder(folder: Path, n_targets: int, prefix: str = "", dtype: torch.dtype = torch.float64) -> None:
    """Files of random weights, as their training leaves them."""
    for layer in range(L - 1):
        shapes: dict[str, tuple[int, ...]] = {"enc.0.weight": (D,), "enc.0.bias": (D,), "enc.1.weight": (F, D)}
        shapes |= {"enc.1.bias": (F,), "dec.weight": (n_targets * D, F), "dec.bias": (n_targets * D,)}
        state = {f"{prefix}{key}": tensor.to(dtype) for key, tensor in draw(**shapes).items()}
        notes = {"steps": 5, "final_l0_pct": 12.0, "dead_features": 0, "dead_pct": 0.0, "final_rec_loss": 0.1}
        tree = {"layer": layer, "hidden_dim": D, "feature_dim": F, "state_dict": state, "training_metadata": notes}
        torch.save(tree | {"mlp_to_clt_mapping": torch.zeros(D, F)}, folder / f"transcoder_L{layer}.pt")


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize(("n_targets", "prefix"), [(1, ""), (2, "_orig_mod."), (5, "")])
def test_a_folder_of_theirs_is_read_as_they_read_it(n_targets: int, prefix: str, k: int | None, tmp_path: Path) -> None:
    write_folder(tmp_path, n_targets, prefix)
    transcoder, x = load_vlm_clt_training(tmp_path, k=k), inputs()
    same(of_all_layers(transcoder, x), vlm_clt_training(tmp_path, x, k))
    config = transcoder.config
    assert (config.n_layers, config.n_targets, config.first_offset, config.read_site) == (L, n_targets, 1, "mlp_in")
    transcoder.float().save_pretrained(tmp_path / "native")
    same(
        of_all_layers(type(transcoder).from_pretrained(tmp_path / "native"), x.float()),
        of_all_layers(transcoder, x.float()),
    )


def test_bfloat16_weights_are_read_as_the_numbers_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path, 2, dtype=torch.bfloat16)
    transcoder, x = load_vlm_clt_training(tmp_path), inputs()
    assert transcoder.dtype == torch.float32
    torch.testing.assert_close(
        of_all_layers(transcoder.double(), x), vlm_clt_training(tmp_path, x), rtol=1e-5, atol=1e-5
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "joint topk": {},
    "joint relu, horizon": {"sparsity": RELU, "n_targets": 1},
    "tied": {"tied_decoders": "target"},
    "sum": {"independent": "sum"},
    "mean": {"independent": "mean", "sparsity": RELU},
    "nearest": {"independent": "nearest", "n_targets": 2},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_written_transcoder_is_read_back_and_has_the_same_sums_there(variant: dict[str, Any], tmp_path: Path) -> None:
    transcoder, x = make(first_offset=1, layer_norm=True, read_site="mlp_in", **variant), inputs()
    save_vlm_clt_training(transcoder, tmp_path / "out", batches())
    loaded = load_vlm_clt_training(tmp_path / "out")
    same(loaded(x), transcoder(x))
    if transcoder.config.independent in (None, "sum"):
        k = K if transcoder.config.sparsity.kind == "topk" else None
        same(vlm_clt_training(tmp_path / "out", x, k), of_all_layers(transcoder, x))


def test_mapping_and_metrics_by_hand(tmp_path: Path) -> None:
    transcoder, data = make(first_offset=1, layer_norm=True, sparsity=RELU, n_targets=1), batches()
    save_vlm_clt_training(transcoder, tmp_path / "out", data)
    for layer in range(L - 1):
        x, y = (torch.cat([getattr(batch, part) for batch in data], dim=1) for part in "xy")
        normed = torch.nn.functional.layer_norm(x[layer], (D,))
        z = torch.relu(normed @ transcoder.W_enc[str(layer)].T + transcoder.b_enc[str(layer)])
        tree = torch.load(tmp_path / "out" / f"mapping_L{layer}.pt", weights_only=True)
        for feature in range(F):
            fired = z[:, feature] > 0
            mean = y[layer + 1][fired].abs().mean(dim=0) if fired.any() else torch.zeros(D, dtype=torch.float64)
            same(tree["mlp_to_clt_mapping"][:, feature], mean)
        saved = torch.load(tmp_path / "out" / f"transcoder_L{layer}.pt", weights_only=True)
        assert torch.equal(tree["decoder_weights"], saved["state_dict"]["dec.weight"])
        summary = json.loads((tmp_path / "out" / f"metrics_L{layer}.json").read_text())["summary"]
        assert summary["final_l0_pct"] == pytest.approx(100 * float((z > 0).double().mean()))
        assert summary["dead_features"] == int((~(z > 0).any(dim=0)).sum())
        error = (of_all_layers(transcoder, x)[layer + 1] - y[layer + 1]).square().mean()
        # Only the next layer is a target, so that a source alone is the whole.
        assert saved["training_metadata"]["final_rec_loss"] == pytest.approx(float(error))


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm": False},
        {"first_offset": 0},
        {"skip": True},
        {"feature_offset": True},
        {"sparsity": SparsitySettings(kind="jumprelu")},
    ],
)
def test_unsupported_settings_are_refused_and_leave_no_files(changes: dict[str, Any], tmp_path: Path) -> None:
    transcoder = make(**({"first_offset": 1, "layer_norm": True} | changes))
    with pytest.raises(ConfigError, match=f"clt.{next(iter(changes))}"):
        save_vlm_clt_training(transcoder, tmp_path / "out", batches())
    with pytest.raises(StoreError, match="no tokens"):
        save_vlm_clt_training(make(first_offset=1, layer_norm=True), tmp_path / "out", [])
    assert not list(tmp_path.iterdir())


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_bomb_does_not_run(inside: bool, tmp_path: Path) -> None:
    folder, crater = tmp_path / "clt", tmp_path / "crater"
    folder.mkdir()
    write_folder(folder, 1)
    path = folder / "transcoder_L1.pt"
    tree = torch.load(path, weights_only=True)
    torch.save({**tree, "extra": Bomb(crater)} if inside else Bomb(crater), path)
    with pytest.raises(CheckpointError, match=r"transcoder_L1.pt: contains more than tensors") as error:
        load_vlm_clt_training(folder)
    assert not crater.exists() and "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), old=st.booleans())
def test_flipped_bytes_are_refused_or_do_not_matter(data: st.DataObject, old: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        torch.save({"layer": 1, "state": {"a": torch.ones(3)}}, path, _use_new_zipfile_serialization=not old)
        contents = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, min(len(contents), 500) - 1), min_size=1, max_size=8)):
            contents[place] = data.draw(st.integers(0, 255))
        path.write_bytes(contents)
        try:
            assert isinstance(read_pickled(path), dict)
        except CheckpointError as error:
            assert "file.pt" in str(error) and "\n" not in str(error)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _rewrite(path: Path, **changes: Any) -> None:
    tree = torch.load(path, weights_only=True)
    state = tree["state_dict"] | {key: value for key, value in changes.items() if "." in key}
    torch.save(tree | {"state_dict": state} | {k: v for k, v in changes.items() if "." not in k}, path)


DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (_truncate, r"transcoder_L1.pt: "),
    "empty": (lambda path: path.write_bytes(b""), r"transcoder_L1.pt: "),
    "missing": (lambda path: path.rename(path.with_name("transcoder_L2.pt")), r"layer 1 is missing"),
    "twice": (lambda path: path.with_name("transcoder_L01.pt").write_bytes(path.read_bytes()), r"layer 1 occurs twice"),
    "renamed": (lambda path: _rewrite(path, layer=0), r"transcoder_L1.pt: key 'layer' is 0"),
    "shape": (
        lambda path: _rewrite(path, **{"dec.bias": torch.zeros(3)}),
        r"transcoder_L1.pt: key 'dec.bias' has shape",
    ),
    "width": (
        lambda path: _rewrite(path, **{"enc.1.weight": torch.zeros(F, 5)}),
        r"L1.pt: key 'enc.1.weight' has shape",
    ),
    "NaN": (lambda path: _rewrite(path, **{"enc.1.bias": torch.full((F,), torch.nan)}), r"'enc.1.bias' has NaN"),
    "type": (lambda path: _rewrite(path, **{"enc.1.bias": [0.0]}), r"key 'enc.1.bias' is list"),
    "unknown": (lambda path: _rewrite(path, **{"gate.weight": torch.zeros(3)}), r"key 'gate.weight' is not supported"),
    "no weights": (lambda path: _rewrite(path, state_dict=None), r"key 'state_dict' is missing"),
}


@pytest.mark.parametrize(("damage", "place"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_place(damage: Any, place: str, tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    damage(tmp_path / "transcoder_L1.pt")
    with pytest.raises(CheckpointError, match=place) as error:
        load_vlm_clt_training(tmp_path)
    assert "\n" not in str(error.value)
