"""Every rule of sparsity against its definition, and its state for inference and on disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from clt.checkpoint.weights import layer_buffers
from clt.config import parse_config
from clt.distributed.mesh import Mesh
from clt.errors import CheckpointError, ConfigError
from clt.kernels import ops
from clt.records import SparseCodes
from clt.training.deepspeed_engine import joined_job
from clt.training.metrics import read_metrics
from clt.transcoder.architecture import CLTConfig, SparsitySettings, TranscoderSettings
from clt.transcoder.encoding import decoder_squares
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling
from clt.transcoder.sparsity import RULES, Peers, Scores, Selected

from ...distributed.toy_job import toy_config, toy_trainer
from .sparse_cases import KINDS, D, F, K, L, by_definition, dense, make_clt, scores_by_hand


def assert_canonical(values_LBK: Tensor, indices_LBK: Tensor) -> None:
    """Filled slots ascend, empty ones are (0, 0) and last."""
    filled = values_LBK != 0
    assert not (~filled[..., :-1] & filled[..., 1:]).any()
    assert indices_LBK.dtype == torch.int32 and (indices_LBK[~filled] == 0).all()
    ascends = indices_LBK[..., 1:] > indices_LBK[..., :-1]
    assert (ascends | ~filled[..., 1:]).all()


def chosen(selected: Selected, scores_LBF: Tensor) -> Tensor:
    """[L,B,F] mask of filled slots."""
    filled = (selected.scores_LBK != 0).long()
    counts = torch.zeros_like(scores_LBF, dtype=torch.int64)
    return counts.scatter_add_(2, selected.indices_LBK.long(), filled) > 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rule_selects_as_its_definition(kind: str, data: st.DataObject) -> None:
    layers, tokens, n_features = (data.draw(st.integers(1, most)) for most in (3, 5, 9))
    k = data.draw(st.integers(1, n_features))
    # Few values and many zeros: ties everywhere, and often fewer positive scores than places.
    levels = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3e38])
    size = layers * tokens * n_features
    numbers = data.draw(st.lists(levels, min_size=size, max_size=size))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    own_LBF = torch.tensor(numbers, dtype=dtype).view(layers, tokens, n_features)
    scores = Scores(own_LBF=own_LBF, rows=tuple(range(layers)), n_layers=layers, peers=Peers())
    selected = RULES[kind](scores, k)
    assert_canonical(selected.scores_LBK, selected.indices_LBK)
    expected = by_definition(kind, own_LBF, k)
    assert torch.equal(chosen(selected, own_LBF), expected)
    values = own_LBF.gather(2, selected.indices_LBK.long())
    assert torch.equal(selected.scores_LBK, torch.where(selected.scores_LBK != 0, values, 0))


@pytest.mark.parametrize("kind", ["joint_topk", "batch_topk"])
def test_no_place_is_lost_when_all_scores_tie(kind: str) -> None:
    own_LBF = torch.ones(3, 50, 40)
    selected = RULES[kind](Scores(own_LBF=own_LBF, rows=(0, 1, 2), n_layers=3, peers=Peers()), 4)
    mask = chosen(selected, own_LBF)
    assert mask.sum() == 4 * 3 * 50
    assert torch.equal(mask, by_definition(kind, own_LBF, 4))


@pytest.mark.parametrize("kind", ["topk", "joint_topk", "batch_topk"])
def test_token_that_is_not_finite_reaches_the_loss_without_taking_all_slots(kind: str) -> None:
    transcoder = make_clt(kind, decoder_norm=True)
    x = torch.randn(L, 6, D, dtype=torch.float64)
    x[1, 2] = torch.nan
    x[2, 3, 0] = torch.inf
    codes = transcoder.encode(x, peers=Peers())
    assert codes.values[1, 2].isnan().any() and not codes.values[1, 2].isfinite().all()
    assert not codes.values[2, 3].isfinite().all()
    if kind != "topk":
        assert (codes.values[1, 2] != 0).sum() == 1


@pytest.mark.parametrize(("kind", "norm"), [("topk", True), ("joint_topk", False), ("batch_topk", True)])
def test_encode_ranks_by_activation_times_norm_over_all_targets(kind: str, norm: bool) -> None:
    transcoder = make_clt(kind, decoder_norm=norm)
    x = torch.randn(L, 30, D, dtype=torch.float64)
    codes = transcoder.encode(x, peers=Peers())
    pre, scores = scores_by_hand(transcoder, x)
    mask = by_definition(kind, scores, K)
    assert torch.equal(dense(codes) > 0, mask)
    assert not torch.equal(mask, by_definition(kind, pre, K))
    torch.testing.assert_close(dense(codes), torch.where(mask, pre, 0))


def test_topk_without_norm_takes_the_fused_encoder_bit_for_bit() -> None:
    transcoder = make_clt("topk")
    x = torch.randn(L, 30, D, dtype=torch.float64)
    codes = transcoder.encode(x, 3, Peers())
    for layer in range(L):
        values, indices = ops.encode_topk(x[layer], *transcoder.encoder(layer), 3)
        assert torch.equal(codes.values[layer], values) and torch.equal(codes.indices[layer], indices)
    assert not transcoder.log_threshold and not list(transcoder.decoder_norm) and not list(transcoder.threshold)
    assert all(
        weights.eq(0).all() for weights in CrossLayerTranscoder(transcoder.config, transcoder.scaling).W_dec.values()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_activations_are_those_of_the_selected_preactivations(kind: str) -> None:
    transcoder = make_clt(kind, decoder_norm=kind in ("topk", "batch_topk"))
    x = torch.randn(L, 12, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *transcoder.W_enc.values(), *transcoder.b_enc.values()]
    weights = torch.randn(L, 12, F, dtype=torch.float64)
    codes = dense(transcoder.encode(x, peers=Peers()))
    pre = torch.stack([x[i] @ transcoder.W_enc[str(i)].T + transcoder.b_enc[str(i)] for i in range(L)])
    expected = torch.where(codes.detach() > 0, pre, 0)
    ours = torch.autograd.grad((codes * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_encode_selected_passes_gradcheck() -> None:
    x, W, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (6, 3), (6,)))
    pre = ops.preactivations(x, W, b)
    _, indices = ops.select_topk(pre, 2)

    def selected(*leaves: Tensor) -> Tensor:
        found = (leaves[0] @ leaves[1].T + leaves[2]).gather(1, indices.long())
        return ops.encode_selected(*leaves, torch.where(found > 0, found, 0), indices)

    assert torch.autograd.gradcheck(selected, (x, W, b))


def test_decoder_squares_and_their_gradient_are_those_of_autograd() -> None:
    transcoder = make_clt("relu")
    weights = torch.randn(L, F, dtype=torch.float64)
    ours = torch.autograd.grad((decoder_squares(transcoder, Peers()) * weights).sum(), list(transcoder.W_dec.values()))
    total = sum(
        (transcoder.W_dec[str(t)].square().sum(dim=2) * weights[transcoder.source_rows(t)]).sum()
        for t in transcoder.share.targets
    )
    for our, their in zip(ours, torch.autograd.grad(total, list(transcoder.W_dec.values())), strict=True):
        torch.testing.assert_close(our, their)


def test_running_threshold_follows_the_steps_and_decides_outside_of_training() -> None:
    transcoder = make_clt("batch_topk", threshold_decay=0.75)
    steps = [torch.randn(L, 40, D, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(CheckpointError, match="calibrate_threshold"):
        transcoder.encode(steps[0])
    expected = None
    for x in steps:
        smallest = dense(transcoder.encode(x, peers=Peers()))
        threshold = smallest[smallest > 0].min()
        expected = threshold if expected is None else 0.75 * expected + 0.25 * threshold
    assert expected is not None
    torch.testing.assert_close(transcoder.threshold[0], expected.detach())
    x = torch.randn(L, 25, D, dtype=torch.float64)
    pre, _ = scores_by_hand(transcoder, x)
    meant = torch.where(pre > expected, pre, 0)
    torch.testing.assert_close(dense(transcoder.encode(x)), meant)
    transcoder.eval()
    torch.testing.assert_close(dense(transcoder.encode(x, peers=Peers())), meant)
    torch.testing.assert_close(transcoder.threshold[0], expected.detach())
    for layer in range(L):
        values, indices = transcoder.encode_layer(layer, x[layer])
        alone = SparseCodes(values=values[None], indices=indices[None], n_features=F)
        torch.testing.assert_close(dense(alone)[0], meant[layer])


def test_step_that_is_not_finite_leaves_the_running_threshold() -> None:
    transcoder = make_clt("batch_topk")
    transcoder.encode(torch.randn(L, 9, D, dtype=torch.float64), peers=Peers())
    before = transcoder.threshold[0].clone()
    transcoder.encode(torch.full((L, 9, D), torch.nan, dtype=torch.float64), peers=Peers())
    assert torch.equal(transcoder.threshold[0], before)


def test_joint_topk_has_no_layer_by_itself_until_calibrated() -> None:
    transcoder = make_clt("joint_topk")
    x = torch.randn(L, 9, D, dtype=torch.float64)
    assert (transcoder.encode(x).values > 0).sum() == (
        by_definition("joint_topk", scores_by_hand(transcoder, x)[1], K)
    ).sum()
    with pytest.raises(CheckpointError, match=r"joint_topk.*calibrate_threshold") as error:
        transcoder.encode_layer(0, x[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_transcoder_encodes_the_same_bits(kind: str, tmp_path: Path) -> None:
    transcoder = make_clt(kind, torch.float32, decoder_norm=kind in ("topk", "batch_topk"))
    x = torch.randn(L, 20, D)
    transcoder.encode(x, peers=Peers())
    transcoder.save_pretrained(tmp_path)
    again = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert again.config == transcoder.config
    for name, tensor in transcoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) or tensor.isnan().all()
    assert torch.equal(dense(transcoder.encode(x)), dense(again.encode(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_the_scaling_keeps_the_activations(kind: str) -> None:
    transcoder = make_clt(kind, decoder_norm=kind in ("topk", "batch_topk"))
    x = torch.randn(L, 20, D, dtype=torch.float64)
    transcoder.encode(x, peers=Peers())
    transcoder.scaling = Scaling(
        mean_x=torch.randn(L, D).double(),
        rms_x=1 + torch.rand(L).double(),
        mean_y=torch.randn(L, D).double(),
        rms_y=1 + torch.rand(L).double(),
    )
    # Other tokens: a batch's own threshold is one of its scores, and which side rounding puts that score on is open.
    x = torch.randn(L, 20, D, dtype=torch.float64)
    raw = x * transcoder.scaling.rms_x[:, None, None] + transcoder.scaling.mean_x[:, None]
    torch.testing.assert_close(dense(transcoder.folded().encode(raw)), dense(transcoder.encode(x)))


def test_buffers_keep_their_digits_when_the_weights_are_rounded() -> None:
    transcoder = make_clt("batch_topk", torch.bfloat16)
    assert transcoder.threshold[0].dtype == torch.float64
    assert transcoder.W_enc["0"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
def test_about_k_features_are_active_at_the_start(kind: str) -> None:
    config = CLTConfig(n_layers=1, d_model=64, n_features=512, k=16, sparsity=SparsitySettings(kind=kind))  # type: ignore[arg-type]
    transcoder = CrossLayerTranscoder(config, Scaling.identity(1, 64))
    l0 = (transcoder.encode(torch.randn(1, 400, 64)).values > 0).sum() / 400
    # 400 tokens and 512 random directions: a few per cent of noise.
    assert l0.item() == pytest.approx(16, rel=0.1)


def test_a_norm_that_ranks_nothing_is_refused() -> None:
    tree = {"n_features": 8, "k": 2, "sparsity": {"kind": "relu", "decoder_norm": True}}
    with pytest.raises(ConfigError, match="decoder_norm has no meaning for kind=relu"):
        parse_config(TranscoderSettings, tree, "test")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_resumes_to_the_same_bits(kind: str, mesh: Mesh, tmp_path: Path) -> None:
    sparsity = {
        "kind": kind,
        "penalty": 2e-3,
        "penalty_warmup_steps": 20,
        "decoder_norm": kind in ("topk", "batch_topk"),
    }
    job = {"clt": {"n_features": 64, "k": 4, "sparsity": sparsity}, "log_every": 10, "checkpoint_every": 20}
    toy_trainer(toy_config(tmp_path / "whole", steps=40, **job), mesh).fit()
    reports = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert reports[-1]["loss"] < reports[0]["loss"] / 1.3
    assert 0 < reports[-1]["l0/mean"] < 16
    shutil.copytree(tmp_path / "whole" / "step_00000020", tmp_path / "again" / "step_00000020")
    (tmp_path / "again" / "latest").write_text("step_00000020")
    toy_trainer(toy_config(tmp_path / "again", steps=40, **job), mesh).fit()
    for path in (tmp_path / "whole" / "step_00000040").glob("*.safetensors"):
        expected, found = load_file(path), load_file(tmp_path / "again" / "step_00000040" / path.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key].nan_to_num(), found[key].nan_to_num()) for key in expected), path
    trained = CrossLayerTranscoder.from_pretrained(tmp_path / "whole")
    assert (
        set(layer_buffers(trained, 0))
        == {
            "topk": {"decoder_norm"},
            "joint_topk": {"decoder_norm", "threshold"},
            "batch_topk": {"decoder_norm", "threshold"},
            "jumprelu": set(),
            "relu": set(),
        }[kind]
    )
    start = math.log(trained.config.sparsity.threshold)
    assert all((log != start).any() for log in trained.log_threshold.values())
