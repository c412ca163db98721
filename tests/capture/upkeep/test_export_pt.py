"""`.pt` layouts of the vlm-clt-training format: the files hold exactly the values of the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.store.schema import SiteGroup
from clt.capture.upkeep.export_pt import export_activations, export_samples
from clt.capture.writing.writer import StoreWriter
from clt.errors import CheckpointError, ConfigError, NonFiniteError, StoreError
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

from ..stores import identity, make_plan, make_spec, make_store, unit_data

#: Units of 64 rows hold the samples 0-3, 4-5 and 6-8.
LENGTHS = (20, 3, 17, 20, 40, 24, 1, 30, 5)


def make_layers(path: Path, n_layers: int = 4, lengths: Sequence[int] = LENGTHS, **changes: Any) -> ActivationStore:
    sites = tuple(f"lm.{layer}.{kind}" for kind in ("resid_mid", "mlp_out") for layer in range(n_layers))
    groups = (SiteGroup(name="lm", sites=sites, width=4),)
    return make_store(path, lengths, model=identity(n_layers=n_layers), groups=groups, **changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_layers(tmp_path_factory.mktemp("export") / "store")


def load(path: Path) -> dict[str, Any]:
    contents: dict[str, Any] = torch.load(path, weights_only=True)
    return contents


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")}


def test_layer_files_hold_the_values_of_the_store_sample_by_sample(store: ActivationStore, tmp_path: Path) -> None:
    report = export_activations(store, tmp_path / "pt", n_targets=2, batch_samples=1)
    assert names(tmp_path / "pt") == {
        f"L{layer}/batch_{i}_{p}.pt" for layer in range(3) for i in range(9) for p in "xy"
    }
    assert report.files == report.written == 54 and report.samples == 9
    for sample in range(9):
        view = store.sample(sample, store.sites)
        for layer in range(3):
            x = load(tmp_path / "pt" / f"L{layer}" / f"batch_{sample}_x.pt")
            y = load(tmp_path / "pt" / f"L{layer}" / f"batch_{sample}_y.pt")
            assert torch.equal(x["x"][0], view.acts[layer]) and x["x"].shape == (1, LENGTHS[sample], 4)
            assert x["sample_ids"] == [f"sample-{sample}"] and bool(x["mask"].all())
            assert set(y) == {"y", "targets", "n_targets"}
            for offset, target in enumerate(y["targets"]):
                assert torch.equal(target[0], view.acts[4 + layer + 1 + offset])
            assert torch.equal(y["y"], y["targets"][0])


def test_targets_beyond_the_last_layer_are_absent(store: ActivationStore, tmp_path: Path) -> None:
    export_activations(store, tmp_path / "pt", n_targets=16)
    counts = {layer: load(tmp_path / "pt" / f"L{layer}" / "batch_0_y.pt") for layer in range(3)}
    assert {layer: (y["n_targets"], len(y["targets"])) for layer, y in counts.items()} == {
        0: (3, 3),
        1: (2, 2),
        2: (1, 1),
    }
    assert not (tmp_path / "pt" / "L3").exists()


def test_a_single_target_is_stored_alone(store: ActivationStore, tmp_path: Path) -> None:
    export_activations(store, tmp_path / "pt", n_targets=1)
    assert set(load(tmp_path / "pt" / "L0" / "batch_0_y.pt")) == {"y"}


def test_batches_cross_units_and_are_padded_on_the_right(store: ActivationStore, tmp_path: Path) -> None:
    assert [unit.n_samples for unit in store.units] == [4, 2, 3]
    export_activations(store, tmp_path / "pt", batch_samples=5)
    seen = []
    for number, samples in enumerate((range(5), range(5, 9))):
        x = load(tmp_path / "pt" / "L1" / f"batch_{number}_x.pt")
        y = load(tmp_path / "pt" / "L1" / f"batch_{number}_y.pt")
        assert x["mask"].sum(1).tolist() == [LENGTHS[sample] for sample in samples]
        for row, sample in enumerate(samples):
            view, length = store.sample(sample, store.sites), LENGTHS[sample]
            assert torch.equal(x["x"][row, :length], view.acts[1])
            assert torch.equal(y["targets"][1][row, :length], view.acts[4 + 3])
            assert not x["x"][row, length:].any() and not y["y"][row, length:].any()
        seen += x["sample_ids"]
    assert seen == [f"sample-{sample}" for sample in range(9)]


def test_a_file_is_no_larger_than_its_tensors(store: ActivationStore, tmp_path: Path) -> None:
    # torch.save writes the whole storage of a view; a slice of a unit would include the unit.
    export_activations(store, tmp_path / "pt", n_targets=2)
    # 20 tokens of width 4 in float32, 1.5 kB of zip and pickle per file.
    assert (tmp_path / "pt" / "L0" / "batch_0_x.pt").stat().st_size < 20 * 4 * 4 + 2000
    # "y" is the first target and shares its storage.
    assert (tmp_path / "pt" / "L0" / "batch_0_y.pt").stat().st_size < 2 * 20 * 4 * 4 + 2000


def test_bfloat16_is_exported_bit_by_bit_and_int8_as_float32(tmp_path: Path) -> None:
    for kind, expected in (("bfloat16", torch.bfloat16), ("int8", torch.float32)):
        store = make_layers(tmp_path / kind, store_dtype=kind)
        export_activations(store, tmp_path / f"{kind}-pt")
        x = load(tmp_path / f"{kind}-pt" / "L2" / "batch_4_x.pt")["x"]
        assert x.dtype == expected and torch.equal(x[0], store.sample(4, ["lm.2.resid_mid"]).acts[0])


def test_values_that_do_not_fit_into_float16_are_an_error(store: ActivationStore, tmp_path: Path) -> None:
    export_activations(store, tmp_path / "half", dtype="float16", n_targets=1, batch_samples=9)
    assert load(tmp_path / "half" / "L0" / "batch_0_x.pt")["x"].dtype == torch.float16
    spec, plan = make_spec(), make_plan((3, 4))
    data = unit_data((3, 4), range(2), spec)
    data.acts["lm"][3:] *= 1e5
    writer = StoreWriter(tmp_path / "large", spec, plan)
    writer.commit(0, data)
    writer.finalize()
    with pytest.raises(NonFiniteError, match=r"sample 1 \('sample-1'\): a value does not fit into float16; use"):
        export_activations(open_store(tmp_path / "large"), tmp_path / "never", dtype="float16")


def test_an_interrupted_export_resumes(store: ActivationStore, tmp_path: Path) -> None:
    out = tmp_path / "pt"
    export_activations(store, out, batch_samples=5)
    before = {name: (out / name).read_bytes() for name in names(out)}
    (out / "L1" / "batch_1_y.pt").unlink()
    # A partial file, as left by a killed process.
    (out / "L1" / ".batch_1_y.pt.0123.partial").write_bytes(b"PK")
    report = export_activations(store, out, batch_samples=5)
    assert report.written == 1 and {name: (out / name).read_bytes() for name in names(out)} == before
    assert not list(out.rglob("*.partial"))
    assert export_activations(store, out, batch_samples=5).written == 0


def test_a_folder_in_use_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("%")
    with pytest.raises(StoreError, match=r"mine: is not empty and holds no export; choose another folder"):
        export_activations(store, tmp_path / "mine")
    export_activations(store, tmp_path / "pt")
    for again in (
        lambda: export_activations(store, tmp_path / "pt", n_targets=2),
        lambda: export_activations(make_layers(tmp_path / "other", seed=1), tmp_path / "pt"),
        lambda: export_samples(store, tmp_path / "pt"),
    ):
        with pytest.raises(StoreError, match=r"pt: holds another export, see export.json; choose another folder"):
            again()


def test_unusable_settings_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_targets=0"):
        export_activations(store, tmp_path / "pt", n_targets=0)
    with pytest.raises(StoreError, match="site 'mlp_in' is not stored; it holds resid_mid"):
        export_activations(store, tmp_path / "pt", read_site="mlp_in")
    with pytest.raises(ConfigError, match="one layer"):
        export_activations(make_layers(tmp_path / "one", n_layers=1), tmp_path / "pt")
    assert not (tmp_path / "pt").exists()


def test_sample_files_pool_over_all_tokens_but_the_first(store: ActivationStore, tmp_path: Path) -> None:
    export_samples(store, tmp_path / "pt")
    assert names(tmp_path / "pt") == {f"sample_{i:04d}.pt" for i in range(9)}
    for sample in range(9):
        contents = load(tmp_path / "pt" / f"sample_{sample:04d}.pt")
        acts = store.sample(sample, [f"lm.{layer}.resid_mid" for layer in range(4)]).acts[:, 1:]
        assert list(contents["activations"]) == list(contents["mean"]) == [0, 1, 2, 3]
        assert contents["meta"]["id"] == f"sample-{sample}" and contents["meta"]["tokens"] == LENGTHS[sample] - 1
        for layer in range(4):
            if LENGTHS[sample] == 1:
                assert not contents["activations"][layer].any() and not contents["mean"][layer].any()
            else:
                assert torch.equal(contents["activations"][layer], acts[layer].amax(0))
                assert torch.equal(contents["mean"][layer], acts[layer].mean(0))
    assert json.loads((tmp_path / "pt" / "export.json").read_text())["store"] == store.id


@pytest.fixture
def transcoder_folder(tmp_path: Path) -> Path:
    """Twelve features, three active per token, none in the last layer."""
    config = CLTConfig(n_layers=4, d_model=4, n_features=12, k=3, first_offset=1)
    scaling = Scaling(mean_x=torch.randn(4, 4), rms_x=torch.rand(4) + 1, mean_y=torch.zeros(4, 4), rms_y=torch.ones(4))
    transcoder = CrossLayerTranscoder(config, scaling, seed=3, provenance=Provenance(model=identity(n_layers=4)))
    transcoder.save_pretrained(tmp_path / "clt")
    return tmp_path / "clt"


def test_sample_files_of_a_transcoder_pool_its_features(
    store: ActivationStore, tmp_path: Path, transcoder_folder: Path
) -> None:
    export_samples(store, tmp_path / "pt", transcoder=transcoder_folder)
    transcoder = CrossLayerTranscoder.from_pretrained(transcoder_folder)
    for sample in (0, 4, 8):
        contents = load(tmp_path / "pt" / f"sample_{sample:04d}.pt")
        assert list(contents["activations"]) == [0, 1, 2] and contents["meta"]["clt"] == str(transcoder_folder)
        acts = store.sample(sample, [f"lm.{layer}.resid_mid" for layer in range(3)]).acts[:, 1:]
        codes = transcoder.encode(transcoder.scaling.standardise_x(acts, (0, 1, 2)))
        dense = torch.zeros(3, acts.shape[1], 12).scatter_add(2, codes.indices.long(), codes.values)
        for layer in range(3):
            assert torch.equal(contents["activations"][layer], dense[layer].amax(0))
            # float32, sums in another order
            torch.testing.assert_close(contents["mean"][layer], dense[layer].mean(0), atol=1e-6, rtol=1e-5)


def test_a_transcoder_of_another_model_is_refused(
    store: ActivationStore, tmp_path: Path, transcoder_folder: Path
) -> None:
    transcoder = CrossLayerTranscoder.from_pretrained(transcoder_folder)
    transcoder.provenance = Provenance(model=identity(n_layers=4, fingerprint="e" * 64))
    transcoder.save_pretrained(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"foreign: trained on random .*use a transcoder of that model"):
        export_samples(store, tmp_path / "pt", transcoder=tmp_path / "foreign")
    with pytest.raises(ConfigError, match="reads resid_mid"):
        export_samples(store, tmp_path / "pt", transcoder=transcoder_folder, read_site="mlp_in")
    assert not (tmp_path / "pt").exists()
