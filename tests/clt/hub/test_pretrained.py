"""Transcoders by name: opened lazily, in part, from the hub and to it; saved as a whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from clt.checkpoint import weights
from clt.config import parse_config
from clt.distributed.mesh import Mesh
from clt.errors import CheckpointError, ConfigError, HubError
from clt.evaluation.evaluator import evaluate_store
from clt.hub.settings import TranscoderChoice
from clt.launch.commands.main import app
from clt.records import ActivationBatch, ModelIdentity, TokenTable
from clt.training.deepspeed_engine import joined_job
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.lazy_decoder import MappedDecoder
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

from ...distributed.toy_job import MODEL, toy_config, toy_trainer
from ...hub_stand_in import HubStandIn

L, D, F, K, B = 4, 6, 20, 3, 9
NAME = "alice/clt"
OWN = ["README.md", *(f"layer_0{layer}.safetensors" for layer in range(L)), "scaling.safetensors", "transcoder.json"]
IDENTITY = ModelIdentity(name="toy", revision="r1", architecture="X", n_layers=L, d_model=D, fingerprint="ab12")

VARIANTS: list[dict[str, Any]] = [
    {},
    {"first_offset": 1, "n_targets": 2, "skip": True},
    {"feature_offset": True, "n_targets": 2},
    {"tied_decoders": "target"},
    {"tied_decoders": "source"},
    {"independent": "mean"},
    {"independent": "nearest"},
    {"sparsity": {"kind": "jumprelu"}},
    {"sparsity": {"kind": "topk", "decoder_norm": True}},
]


def make_clt(**changes: Any) -> CrossLayerTranscoder:
    """A random one in float32, in which scaling, biases and decoders all matter."""
    config = parse_config(CLTConfig, {"n_layers": L, "d_model": D, "n_features": F, "k": K} | changes, "test")
    scaling = Scaling(
        mean_x=torch.randn(L, D), rms_x=torch.rand(L) + 0.5, mean_y=torch.randn(L, D), rms_y=torch.rand(L) + 0.5
    )
    transcoder = CrossLayerTranscoder(config, scaling, provenance=Provenance(model=IDENTITY, store_id="s1"))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_()
    return transcoder.requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved transcoder."""
    make_clt().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def lazy(folder: Path, **how: Any) -> CrossLayerTranscoder:
    return CrossLayerTranscoder.from_pretrained(folder, lazy=True, **how)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Lazily


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_lazy_decoders_equal_loaded_ones(tmp_path: Path, variant: dict[str, Any]) -> None:
    transcoder = make_clt(**variant)
    transcoder.save_pretrained(tmp_path)
    opened = lazy(tmp_path)
    assert sum(isinstance(module, MappedDecoder) for module in opened.modules()) == len(transcoder.W_dec)
    x = torch.randn(L, B, D)
    close(opened(x), transcoder(x))
    close(opened.folded()(x), transcoder.folded()(x))
    for target in transcoder.share.targets:
        for source in transcoder.sources_of(target):
            assert torch.equal(opened.decoder(source, target), transcoder.decoder(source, target))
    y, rows = torch.randn(B, D), transcoder.source_rows(transcoder.share.targets[-1])
    codes, last = transcoder.encode(x[list(transcoder.share.sources)]), transcoder.share.targets[-1]
    given = last, codes.values[rows], codes.indices[rows], y, x[last]
    for found, expected in zip(opened.decode_loss_layer(*given), transcoder.decode_loss_layer(*given), strict=True):
        close(found, expected)


def test_folding_leaves_decoders_in_their_files_and_types_can_change(folder: Path) -> None:
    folded = lazy(folder).folded().double()
    assert folded.dtype == torch.float64 and all(isinstance(W, MappedDecoder) for W in folded.W_dec.values())
    x = torch.randn(L, B, D, dtype=torch.float64)
    expected = CrossLayerTranscoder.from_pretrained(folder, dtype=torch.float64)
    close(folded(x), expected(x))
    assert lazy(folder, dtype=torch.bfloat16).decoder(0, 1).dtype == torch.bfloat16


def test_gradients_of_activations_pass_through_decoders_in_their_files(folder: Path) -> None:
    gradients = []
    for transcoder in (lazy(folder), CrossLayerTranscoder.from_pretrained(folder)):
        values = torch.rand(L, B, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
        indices = torch.arange(K, dtype=torch.int32).expand(L, B, K).contiguous()
        transcoder.decode_layer(L - 1, values, indices).square().sum().backward()
        assert values.grad is not None
        gradients.append(values.grad)
    close(*gradients)


def test_evaluation_is_the_same(folder: Path) -> None:
    tokens = TokenTable(
        **dict.fromkeys((field.name for field in fields(TokenTable)), torch.zeros(40, dtype=torch.int64))
    )
    batch = ActivationBatch(x=torch.randn(L, 40, D), y=torch.randn(L, 40, D), tokens=tokens)
    found, expected = (evaluate_store(transcoder, [batch]) for transcoder in (lazy(folder), make_clt_from(folder)))
    assert found.l0 == expected.l0
    assert found.fvu == pytest.approx(expected.fvu, rel=1e-5)


def make_clt_from(folder: Path) -> CrossLayerTranscoder:
    return CrossLayerTranscoder.from_pretrained(folder)


def test_lazy_transcoder_can_be_saved_even_in_place_but_not_trained(folder: Path) -> None:
    before = load_file(folder / "layer_03.safetensors")
    opened = lazy(folder)
    opened.save_pretrained(folder)
    after = load_file(folder / "layer_03.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(opened.decoder(0, 3), before["W_dec"][0])
    with pytest.raises(ConfigError, match=r"lazy=True.*cannot be trained"):
        opened.requires_grad_()


_MEMORY = """
import re, sys, torch
from clt.transcoder.model import CrossLayerTranscoder

def peak():
    # Of this process alone: getrusage starts with the peak of the parent.
    return int(re.search("VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1]) << 10

def decode(clt):
    S = len(clt.sources_of(3))
    clt.decode_layer(3, torch.rand(S, 8, 4), torch.randint(clt.config.n_features, (S, 8, 4), dtype=torch.int32))

CrossLayerTranscoder.from_pretrained(sys.argv[2], lazy=True)
decode(CrossLayerTranscoder.from_pretrained(sys.argv[2]))
start = peak()
decode(CrossLayerTranscoder.from_pretrained(sys.argv[1], lazy=True))
opened = peak()
CrossLayerTranscoder.from_pretrained(sys.argv[1])
print(opened - start, peak() - start)
"""


def test_lazy_transcoder_needs_memory_only_for_encoders_and_decoded_rows(folder: Path, tmp_path: Path) -> None:
    config = CLTConfig(n_layers=16, d_model=128, n_features=3000, k=4)
    large = CrossLayerTranscoder(config, Scaling.identity(16, 128)).requires_grad_(False)
    decoders = sum(W.nbytes for W in large.W_dec.values())
    encoders = sum(W.nbytes for W in large.W_enc.values())
    for W in large.W_dec.values():
        W.fill_(0.5)
    large.save_pretrained(tmp_path / "large")
    del large
    words = [sys.executable, "-c", _MEMORY, tmp_path / "large", folder]
    result = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    opened, loaded = map(int, result.stdout.split())
    assert decoders > 200e6 and encoders < 25e6
    # Encoders, one layer's file of pages, and what the system reads around the rows of one target.
    assert opened < 0.25 * decoders
    assert loaded > decoders


# ---------------------------------------------------------------------------------------------------------------------
# In part


def test_some_layers_are_a_share(folder: Path) -> None:
    whole = make_clt_from(folder)
    (folder / "layer_00.safetensors").unlink()
    part = CrossLayerTranscoder.from_pretrained(folder, layers=[3, 1])
    assert part.share.sources == part.share.targets == (1, 3) and set(part.W_enc) == set(part.W_dec) == {"1", "3"}
    assert torch.equal(part.W_dec["3"], whole.W_dec["3"])
    codes = whole.encode(torch.randn(L, B, D))
    assert torch.equal(
        part.decode_layer(3, codes.values, codes.indices), whole.decode_layer(3, codes.values, codes.indices)
    )


@pytest.mark.parametrize("layers", [[], [4], [-1, 0]])
def test_layers_that_there_are_not_are_refused(folder: Path, layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"layers=.*0 to 3"):
        CrossLayerTranscoder.from_pretrained(folder, layers=layers)


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(pytest.fail))


def _change(path: Path, **tensors: Tensor) -> None:
    save_file(load_file(path) | tensors, path)


DAMAGE = {
    "truncated": (_truncate, "not a readable safetensors file"),
    "pickle": (_pickle, "not a readable safetensors file"),
    "shape": (lambda path: _change(path, W_dec=torch.zeros(2, F, D + 1)), r"'W_dec' has shape \(2, 20, 7\)"),
    "kind": (lambda path: _change(path, W_dec=torch.zeros(2, F, D, dtype=torch.int64)), "'W_dec' is torch.int64"),
    "missing": (lambda path: path.unlink(), "file is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("is_lazy", [False, True])
def test_bad_files_are_named_in_one_line(folder: Path, damage: str, is_lazy: bool) -> None:
    act, words = DAMAGE[damage]
    act(folder / "layer_01.safetensors")
    with pytest.raises(CheckpointError, match=rf"layer_01\.safetensors: .*{words}") as error:
        CrossLayerTranscoder.from_pretrained(folder, lazy=is_lazy)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def test_a_failed_save_leaves_the_old_transcoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = weights.write_tensors

    def full(path: Path, tensors: Any) -> None:
        if path.name == "layer_02.safetensors":
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(weights, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"saved: cannot be written .*No space"):
        make_clt().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_only_a_transcoder_is_replaced(folder: Path) -> None:
    new = make_clt(skip=True)
    new.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == OWN and make_clt_from(folder).config == new.config
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'notes\.txt'; use a new folder"):
        new.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_model_card_describes_the_transcoder_and_its_training(tmp_path: Path) -> None:
    with joined_job():
        toy_trainer(toy_config(tmp_path / "job"), Mesh.create(1)).fit()
    trained = CrossLayerTranscoder.from_pretrained(tmp_path / "job")
    facts = trained.provenance.training
    reports = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert facts is not None and facts.steps == 6 and facts.fvu == reports[-1]["fvu/mean"] and not facts.held_out
    trained.save_pretrained(tmp_path / "clt")
    card = (tmp_path / "clt" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vlm-clt\ntags:\n")
    for words in (MODEL.name, MODEL.fingerprint, "toy-store", "topk, k = 4", "| Steps | 6 |", f"{facts.tokens:,}"):
        assert words in card
    assert f"| FVU, training tokens | {facts.fvu:.4g} |" in card
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "clt").provenance == trained.provenance
    report = {"step": 6, "heldout/fvu/mean": 0.25, "heldout/l0/mean": 3.5, "heldout/dead_fraction/mean": 0.5}
    with (tmp_path / "job" / "metrics.jsonl").open("a") as lines:
        lines.write("".join(json.dumps(report | {"step": step}) + "\n" for step in (6, 7)))
    measured = CrossLayerTranscoder.from_pretrained(tmp_path / "job").provenance.training
    assert measured is not None and measured.held_out and (measured.fvu, measured.l0) == (0.25, 3.5)


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def test_transcoder_is_loaded_from_the_hub_and_a_folder_of_its_name_takes_precedence(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoder = make_clt()
    commit = transcoder.push_to_hub(NAME)
    assert sorted(hub.tree(NAME, kind="model")) == OWN and hub.repositories[f"model:{NAME}"].private
    assert hub.history(NAME, kind="model")[-1] == {"transcoder.json"}
    x = torch.randn(L, B, D)
    for name in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        assert torch.equal(CrossLayerTranscoder.from_pretrained(name)(x), transcoder(x))
    close(CrossLayerTranscoder.from_pretrained(NAME, lazy=True, revision=commit)(x), transcoder(x))
    assert transcoder.push_to_hub(NAME) == commit

    monkeypatch.chdir(tmp_path)
    other = make_clt()
    other.save_pretrained(NAME)
    assert torch.equal(CrossLayerTranscoder.from_pretrained(NAME)(x), other(x))
    with pytest.raises(ConfigError, match=r"revision=main: alice/clt is a folder"):
        CrossLayerTranscoder.from_pretrained(NAME, revision="main")


def test_only_the_layers_asked_for_travel_and_only_once(hub: HubStandIn) -> None:
    make_clt().push_to_hub(NAME)
    hub.requests.clear()
    CrossLayerTranscoder.from_pretrained(NAME, layers=[2])
    assert hub.fetched() == ["layer_02.safetensors", "scaling.safetensors", "transcoder.json"]
    hub.requests.clear()
    CrossLayerTranscoder.from_pretrained(NAME, layers=[1, 2])
    assert hub.fetched() == ["layer_01.safetensors"]


def test_cached_files_need_no_network(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    transcoder, x = make_clt(), torch.randn(L, B, D)
    transcoder.push_to_hub(NAME)
    make_from_hub = CrossLayerTranscoder.from_pretrained
    make_from_hub(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(make_from_hub(NAME)(x), transcoder(x)) and not hub.requests


def test_training_output_is_pushed_without_its_job(hub: HubStandIn, tmp_path: Path) -> None:
    with joined_job():
        toy_trainer(toy_config(tmp_path / "job"), Mesh.create(1)).fit()
    result = CliRunner().invoke(app, ["push", str(tmp_path / "job"), NAME, "--public", "--revision", "six"])
    assert result.exit_code == 0 and result.stdout.startswith(f"{NAME}: commit "), result.output
    assert sorted(hub.tree(NAME, "six", "model")) == OWN and not hub.repositories[f"model:{NAME}"].private
    fetched = CrossLayerTranscoder.from_pretrained(f"{NAME}@six")
    trained, x = CrossLayerTranscoder.from_pretrained(tmp_path / "job"), torch.randn(4, B, 16)
    assert torch.equal(fetched(x), trained(x)) and fetched.provenance == trained.provenance
    assert b"| Steps | 6 |" in (hub.tree(NAME, "six", "model")["README.md"] or b"")


def test_bytes_that_changed_on_the_way_are_refused_and_not_kept(hub: HubStandIn) -> None:
    make_clt().push_to_hub(NAME)
    hub.damaged.add("layer_01.safetensors")
    with pytest.raises(HubError, match=r"alice/clt: 'layer_01\.safetensors' does not match its hash.*; run again"):
        CrossLayerTranscoder.from_pretrained(NAME)
    hub.damaged.clear()
    assert CrossLayerTranscoder.from_pretrained(NAME).config.d_model == D


def test_refusals_of_the_hub_are_one_line_with_the_remedy(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: str, name: str, **how: Any) -> None:
        with pytest.raises((HubError, ConfigError), match=words) as error:
            CrossLayerTranscoder.from_pretrained(name, **how)
        assert "\n" not in str(error.value)

    refused("alice/clt: no such model repository.*HF_TOKEN.*no folder of this name", NAME)
    transcoder = make_clt_from(folder)
    transcoder.push_to_hub(NAME)
    refused("no revision 'v9'", f"{NAME}@v9")
    refused("names another revision", f"{NAME}@v9", revision="v8")
    refused(r"no 'average_00\.safetensors'", NAME, averaged=True)
    with pytest.raises(HubError, match=r"has a different file.*another repository"):
        make_clt().push_to_hub(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(HubError, match="HF_TOKEN"):
        transcoder.push_to_hub("alice/other")
    result = CliRunner().invoke(app, ["push", str(folder), "alice/other"])
    assert result.exit_code == 2 and "HF_TOKEN" in result.stderr
    # A refused connection is tried again for half a minute by the library.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("cannot be reached; check the network", "alice/third")


def test_folder_that_is_missing_is_no_name_of_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    for name in (tmp_path / "none", "none", "./none", "runs/toy/clt"):
        with pytest.raises(CheckpointError, match=r"transcoder\.json: no such file"):
            CrossLayerTranscoder.from_pretrained(name)
    assert not hub.requests


def test_settings_name_a_folder_or_a_repository(hub: HubStandIn, tmp_path: Path) -> None:
    transcoder, x = make_clt(), torch.randn(L, B, D)
    commit = transcoder.push_to_hub(NAME)
    transcoder.save_pretrained(tmp_path / "clt")
    for tree in ({"clt": str(tmp_path / "clt")}, {"clt": NAME}, {"clt": NAME, "clt_revision": commit}):
        assert torch.equal(parse_config(TranscoderChoice, tree, "job").load_transcoder()(x), transcoder(x))
    lazy = TranscoderChoice(clt=NAME, clt_lazy=True).load_transcoder(layers=[2])
    assert isinstance(lazy.decoder_matrix(2), MappedDecoder) and lazy.share.targets == (2,)

    def refused(words: str, error: type[Exception] = ConfigError, **keys: Any) -> None:
        with pytest.raises(error, match=words) as found:
            TranscoderChoice(**keys).load_transcoder()
        assert "\n" not in str(found.value)

    refused(r"clt=runs/toy/clt: no such folder, and not a repository name", clt="runs/toy/clt")
    refused(r"clt_revision=v1: clt=.*/clt is a folder", clt=str(tmp_path / "clt"), clt_revision="v1")
    refused(r"alice/none: no such model repository.*no folder of this name", HubError, clt="alice/none")
