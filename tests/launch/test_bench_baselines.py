"""Comparison with other projects: every formula of their algorithms on hand-computed tensors, and one quick run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks.baselines import crosslayer, eleuther, ours
from benchmarks.baselines.data import ChannelMoments, RawBatch, channel_moments
from benchmarks.baselines.measure import HeldOut, Prediction, SeedRun, Setting, learn, measure
from benchmarks.baselines.report import AlgorithmRow, BaselineReport, Trial
from benchmarks.baselines.run import all_algorithms, best_trial
from clt.errors import ConfigError
from clt.evaluation.evaluator import evaluate_store
from clt.launch.bench.checkout import load_benchmarks
from clt.launch.bench.common.machine import this_machine
from clt.launch.commands.main import app
from clt.records import ActivationBatch, TokenTable
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

TINY = CLTConfig(n_features=3, k=1, n_layers=2, d_model=2)


def _batch(x: list[list[list[float]]], y: list[list[list[float]]]) -> RawBatch:
    return RawBatch(x_LBD=torch.tensor(x), y_LBD=torch.tensor(y))


#: Norms of x: 5 and 15 in layer 0, 2 and 2 in layer 1; of y: 1 and 3, and 10 and 30.
FIRST = _batch(
    [[[3.0, 4.0], [9.0, 12.0]], [[2.0, 0.0], [0.0, 2.0]]],
    [[[1.0, 0.0], [0.0, 3.0]], [[6.0, 8.0], [18.0, 24.0]]],
)


def clt_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "baselines", *map(str, words)])


def test_eleuther_scales_and_biases_come_from_the_first_batch() -> None:
    coders = eleuther.Coders(TINY, "none", FIRST, seed=0)
    assert coders.scale_x == pytest.approx([math.sqrt(2) / 10, math.sqrt(2) / 2])
    assert coders.scale_y == pytest.approx([math.sqrt(2) / 2, math.sqrt(2) / 20])
    # The mean output, in units of the scale; pairs of different layers have their own bias of zero.
    assert coders.b_dec["0_0"].tolist() == pytest.approx([0.5 / math.sqrt(2), 1.5 / math.sqrt(2)])
    assert coders.b_dec["1_1"].tolist() == pytest.approx([12 * math.sqrt(2) / 20, 16 * math.sqrt(2) / 20])
    assert not coders.b_dec["0_1"].any() and not any(W.any() for W in coders.W_dec.values())
    for W_FD in coders.W_enc:
        assert W_FD.abs().max() <= 1 / math.sqrt(2)
    # Pre-activations of the mean input are zero.
    for layer, x_BD in enumerate(FIRST.x_LBD):
        pre_F = coders.W_enc[layer] @ x_BD.mean(dim=0) * coders.scale_x[layer] + coders.b_enc[layer]
        assert pre_F.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def _set(coders: eleuther.Coders) -> None:
    """Features (x0, x1, -x0) of inputs whose scale is 1, two features of layer 0 in use."""
    coders.scale_x, coders.scale_y = [1.0, 1.0], [1.0, 2.0]
    with torch.no_grad():
        for W_FD, b_F in zip(coders.W_enc, coders.b_enc, strict=True):
            W_FD.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
            b_F.zero_()
        for b_D in coders.b_dec.values():
            b_D.zero_()
        for number, W_FD in enumerate(coders.W_dec.values(), start=1):
            W_FD.fill_(number)
        for values_F in coders.post_enc.values():
            values_F.fill_(0.5)


def test_eleuther_keeps_the_largest_of_each_token_and_decodes_the_sum_over_sources() -> None:
    coders = eleuther.Coders(TINY, "none", FIRST, seed=0)
    _set(coders)
    x_BD = torch.tensor([[3.0, 4.0], [-5.0, -6.0]])
    code = coders.encode(0, x_BD)
    assert code.indices_BK.tolist() == [[1], [2]] and code.values_BK.tolist() == [[4.0], [5.0]]
    # The chosen ones are left out of what the loss for dead features sees, negative ones are not.
    assert code.inactive_BF.tolist() == [[3.0, 0.0, -3.0], [-5.0, -6.0, 0.0]]
    codes = [code, coders.encode(1, torch.tensor([[-1.0, -2.0], [0.0, 7.0]]))]
    # Decoders 0_0, 0_1, 1_1 hold 1, 2, 3, and every active feature gets 0.5 more: 4.5 and 5.5 from layer 0, 1.5 and
    # 7.5 from layer 1, whose outputs are divided by the scale 2.
    assert coders.decode(0, codes).tolist() == [[4.5, 4.5], [5.5, 5.5]]
    assert coders.decode(1, codes).tolist() == [[(9 + 4.5) / 2] * 2, [(11 + 22.5) / 2] * 2]


def test_eleuther_tied_decoders_scale_contributions_of_other_layers() -> None:
    coders = eleuther.Coders(TINY, "target", FIRST, seed=0)
    assert list(coders.W_dec) == ["0_0", "1_1"]
    _set(coders)
    codes = [coders.encode(layer, torch.tensor([[3.0, 4.0]])) for layer in range(2)]
    # The scale of another layer's features starts at zero, that of the own layer's at one.
    assert coders.decode(1, codes).tolist() == [[2 * 4.5 / 2] * 2]
    with torch.no_grad():
        coders.post_scale["0_1"].fill_(0.1)
    assert coders.decode(1, codes)[0].tolist() == pytest.approx([2 * (4.5 + 0.45) / 2] * 2)


def test_eleuther_loss_is_the_sum_of_fvu_and_of_inactive_preactivations_by_decoder_norm() -> None:
    y_BD = torch.tensor([[0.0, 2.0], [4.0, 4.0]])
    # Errors 1 + 4, deviations from (2, 3): 4 + 1 + 4 + 1.
    assert float(eleuther.fvu(torch.tensor([[1.0, 2.0], [4.0, 2.0]]), y_BD)) == pytest.approx(5 / 10)
    W_FD = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    pre_BF = torch.tensor([[1.0, -2.0], [0.0, 3.0]], requires_grad=True)
    loss = eleuther.dead_latent_loss(pre_BF, W_FD)
    assert loss.item() == -(1 * 5 + 1 * 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert pre_BF.grad is not None and pre_BF.grad.tolist() == [[-5, -2], [-5, -2]]
    coders = eleuther.Coders(TINY, "none", FIRST, seed=0)
    _set(coders)
    with torch.no_grad():
        parts = [coders.encode(layer, x_BD) for layer, x_BD in enumerate(FIRST.x_LBD)]
        fvus = sum(float(eleuther.fvu(coders.decode(t, parts), y_BD)) for t, y_BD in enumerate(FIRST.y_LBD))
        # Inactive pre-activations sum to (12, 0, -12) in layer 0 and to (0, 0, -2) in layer 1, whose own decoder holds
        # 3 everywhere.
        dead = -(12 - 12) * math.sqrt(2) - (-2) * 3 * math.sqrt(2)
        assert float(coders.loss(FIRST, 0.0)) == pytest.approx(fvus)
        assert float(coders.loss(FIRST, 0.1)) == pytest.approx(fvus + 0.1 * dead)


def test_schedules_and_published_rates_are_those_of_the_authors() -> None:
    assert eleuther.published_learning_rate(1024) == pytest.approx(8e-4)
    assert [eleuther.rate_factor(step, 2, 6) for step in range(7)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert [crosslayer.rate_factor(step, 10) for step in (0, 7, 8, 9)] == [1, 1, 1, 0.5]
    tried = {each.name: each.trials for each in all_algorithms(1024, 1e-3)}
    assert [setting.learning_rate for setting in tried["clt-training untied"]] == pytest.approx(
        [8e-4, 3.2e-3, 6.4e-3, 1.28e-2]
    )
    assert [str(setting) for setting in tried["ours"]][-2:] == ["lr 0.004, biases x10", "lr 0.0064, biases x10"]
    assert [setting.learning_rate for setting in tried["crosslayer-coding BatchTopK"]] == pytest.approx(
        [3e-4, 9e-4, 3e-3, 9e-3]
    )


def test_crosslayer_ranks_by_z_score_over_all_layers_and_keeps_raw_values() -> None:
    # Feature 0 of layer 0 is large and hardly varies; -1 of feature 1 stands out among values of -5.
    pre_LBF = torch.tensor([[[100.0, -5.0], [101.0, -5.0], [100.0, -1.0]], [[0.0, 1.0], [0.0, 1.2], [9.0, 0.8]]])
    # z: 101 is 2/sqrt(3), as is -1 and 9; 1.2 is 1. The three largest of the batch are these ties, not 100.
    kept_LBF = crosslayer.batch_topk(pre_LBF, 1)
    assert (pre_LBF * kept_LBF).tolist() == [
        [[0.0, 0.0], [101.0, 0.0], [0.0, -1.0]],
        [[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]],
    ]
    assert int(crosslayer.batch_topk(torch.randn(2, 30, 40), 5).sum()) == 5 * 30


def test_crosslayer_dead_features_are_chosen_regardless_of_sign() -> None:
    pre_BF = torch.tensor([[5.0, -1.0, 0.5, -3.0], [4.0, 2.0, -2.0, -1.0]])
    dead_F = torch.tensor([False, True, False, True])
    assert crosslayer.dead_codes(pre_BF, dead_F).tolist() == [[0, -1, 0, -3], [0, 2, 0, -1]]


@pytest.fixture
def transcoder() -> crosslayer.CrosslayerTranscoder:
    """Two layers of two features that read one channel each; decoders 1 (0 to 0), 2 (0 to 1) and 3 (1 to 1)."""
    config = CLTConfig(n_features=2, k=1, n_layers=2, d_model=2)
    x = ChannelMoments(mean_LD=torch.tensor([[1.0, 2.0], [0.0, 0.0]]), std_LD=torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    y = ChannelMoments(mean_LD=torch.tensor([[0.0, 1.0], [0.0, 0.0]]), std_LD=torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    made = crosslayer.CrosslayerTranscoder(config, crosslayer.Units.of(x), crosslayer.Units.of(y), seed=0)
    assert all(W_FD.abs().max() <= 1 / math.sqrt(2) for W_FD in made.W_enc)
    assert all(W_ND.abs().max() <= 1 / math.sqrt(4) for W_ND in made.W_dec)
    with torch.no_grad():
        for W_FD in made.W_enc:
            W_FD.copy_(torch.eye(2))
        made.W_dec[0].fill_(1)
        made.W_dec[1].copy_(torch.tensor([[2.0, 2.0], [2.0, 2.0], [3.0, 3.0], [3.0, 3.0]]))
    return made


def test_crosslayer_standardises_channels_and_adds_a_bias_per_pair(transcoder: crosslayer.CrosslayerTranscoder) -> None:
    with torch.no_grad():
        transcoder.b_dec[1].copy_(torch.tensor([[0.1, 0.1], [0.2, 0.2]]))
    # (4 - 1) / 1 and (6 - 2) / 2.
    pre_LBF, _ = transcoder.encode(torch.tensor([[[4.0, 6.0], [1.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]))
    assert pre_LBF.tolist() == [[[3, 2], [0, 0]], [[1, 1], [0, 0]]]
    y_LBD = transcoder.decode(torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]))
    # 3 x 1 in units of (2, 1) around (0, 1); 3 x 2 + 1 x 3 + 0.3 in units of (1, 3).
    assert y_LBD[0].tolist() == [[6, 4]] and y_LBD[1, 0].tolist() == pytest.approx([9.3, 27.9])


def test_crosslayer_loss_is_mse_in_raw_units_with_preactivation_and_auxk_terms(
    transcoder: crosslayer.CrosslayerTranscoder,
) -> None:
    x = [[[4.0, 6.0], [1.0, 0.0]], [[-1.0, 1.0], [2.0, 0.0]]]
    batch = _batch(x, [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    with torch.no_grad():
        pre_LBF, kept_LBF = transcoder.encode(batch.x_LBD)
        codes_LBF = pre_LBF * kept_LBF
        found_LBD = transcoder.decode(codes_LBF)
        mse = float(found_LBD.square().sum()) / 4
        # Negative pre-activations are -1 of layer 0 and -1 of layer 1, among eight.
        expected = mse + 3e-6 * 2 / 8
        loss, fired_LF = transcoder.loss(batch, torch.zeros(2, 2, dtype=torch.bool))
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert fired_LF.tolist() == (codes_LBF > 1e-6).any(dim=1).tolist()
        dead_LF = torch.tensor([[False, False], [True, False]])
        loss, _ = transcoder.loss(batch, dead_LF)
        # Feature 0 of layer 1 is -1 and 2: times 3, in units of (1, 3), against what is missing of layer 1.
        aux_BD = torch.tensor([[-3.0, -9.0], [6.0, 18.0]])
        missing = float((aux_BD + found_LBD[1]).square().mean())
        assert float(loss) == pytest.approx(expected + missing / 32, rel=1e-6)


def test_moments_are_per_channel_and_a_constant_channel_keeps_unit_one() -> None:
    values_ND = torch.tensor([[1.0, 1e3], [3.0, 1e3]], dtype=torch.float64)
    moments = channel_moments(2, values_ND.sum(dim=0)[None], values_ND.square().sum(dim=0)[None])
    assert moments.mean_LD.tolist() == [[2, 1000]] and moments.std_LD.tolist() == [[1, 1]]


def test_held_out_measures_are_sums_over_all_batches() -> None:
    y_LBD = torch.tensor([[[0.0], [2.0], [4.0]]])
    batches = [RawBatch(x_LBD=y_LBD[:, :2], y_LBD=y_LBD[:, :2]), RawBatch(x_LBD=y_LBD[:, 2:], y_LBD=y_LBD[:, 2:])]

    def predict(x_LBD: torch.Tensor) -> Prediction:
        # Off by one everywhere; of three features one is active where x > 1, another always.
        active = torch.stack([x_LBD[..., 0] > 1, torch.ones_like(x_LBD[..., 0]).bool(), x_LBD[..., 0] > 9], dim=2)
        return Prediction(y_LBD=x_LBD + 1, active_LBF=active)

    assert measure(predict, batches) == HeldOut(fvu=(3 / 8,), l0=(5 / 3,), dead_fraction=(pytest.approx(1 / 3),))  # type: ignore[arg-type]


def test_ours_is_measured_as_everywhere_else_in_the_project() -> None:
    torch.manual_seed(0)
    config = CLTConfig(n_features=20, k=4, n_layers=2, d_model=8)
    scaling = Scaling(
        mean_x=torch.randn(2, 8),
        rms_x=torch.tensor([2.0, 0.5]),
        mean_y=torch.randn(2, 8),
        rms_y=torch.tensor([3.0, 0.1]),
    )
    made = CrossLayerTranscoder(config, scaling)
    for W_dec in made.W_dec.values():
        torch.nn.init.normal_(W_dec, std=0.1)
    x_LBD, y_LBD = torch.randn(2, 2, 60, 8)
    zeros = torch.zeros(60, dtype=torch.int16)
    tokens = TokenTable(
        sample=zeros.long(),
        position=zeros.int(),
        token_id=zeros.int(),
        modality=zeros.to(torch.uint8),
        patch_row=zeros,
        patch_col=zeros,
        image=zeros,
    )
    expected = evaluate_store(made, [ActivationBatch(x=x_LBD, y=y_LBD, tokens=tokens)])
    found = measure(lambda x: ours.predict(made, x), [RawBatch(x_LBD=x_LBD, y_LBD=y_LBD)])
    # The reference sums in standardised units; both in float64 from float32 reconstructions.
    assert found.fvu == pytest.approx(list(expected.fvu.values()), rel=1e-5)
    assert found.l0 == pytest.approx(list(expected.l0.values()))
    assert found.dead_fraction == pytest.approx(list(expected.dead_fraction.values()))


def test_speed_leaves_the_first_window_out() -> None:
    class Idle:
        steps = 0

        def step(self, batch: RawBatch) -> None:
            self.steps += 1

        def predict(self, x_LBD: torch.Tensor) -> Prediction:
            raise AssertionError

    def batches(n: int) -> Iterator[RawBatch]:
        return (FIRST for _ in range(n))

    idle = Idle()
    assert len(learn(idle, batches(65)).tokens_per_s) == 2 and idle.steps == 65
    assert len(learn(Idle(), batches(3)).tokens_per_s) == 1


def test_best_trial_is_the_one_with_least_error_that_is_a_number() -> None:
    settings = [Setting(learning_rate=rate) for rate in (1.0, 2.0, 3.0)]
    trials = [
        Trial(name="a", setting=setting, fvu=error, dead_fraction=0)
        for setting, error in zip(settings, (math.nan, 0.2, 0.3), strict=True)
    ]
    assert best_trial([*trials, Trial(name="b", setting=settings[0], fvu=0.1, dead_fraction=0)], "a") == settings[1]


def test_claims_compare_means_over_seeds_with_every_other_algorithm() -> None:
    def row(name: str, fvus: tuple[float, ...], dead: float) -> AlgorithmRow:
        runs = (
            SeedRun(
                seed=seed,
                heldout=HeldOut(fvu=(fvu, fvu), l0=(4, 4), dead_fraction=(dead, dead)),
                tokens_per_s=(9, 7, 1),
            )
            for seed, fvu in enumerate(fvus)
        )
        return AlgorithmRow(name=name, how="tuned", setting=Setting(learning_rate=1), runs=tuple(runs))

    report = BaselineReport(
        machine=this_machine((), Path()),
        setting="",
        choices=(),
        trials=(),
        rows=(row("ours", (0.1, 0.3), 0), row("one", (0.4, 0.4), 0.1), row("two", (0.1, 0.1), 0)),
        features=100,
    )
    assert report.rows[0].tokens_per_s == (9, 7)
    assert [(round(entry.measured or 0, 6), entry.ok) for entry in report.claims] == [
        (0.5, True),
        (2, False),
        (round(1 / 11, 6), True),
        (1, True),
    ]


def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    config = Path(__file__).resolve().parents[2] / "configs" / "demo" / "toy.yaml"
    skipping = tmp_path / "skip.yaml"
    skipping.write_text(config.read_text().replace("k: 16", "k: 16\n    skip: true"))
    for words, message in (
        (("--config", tmp_path / "none.yaml"), "none.yaml: no such configuration file"),
        (("--config", skipping), "training.clt.skip=True: the comparison supports only False; remove the key"),
        (("--only", "nobody"), "--only 'nobody': the algorithms are ours, clt-training untied"),
        (("--json", "/proc/none/report.json"), "/proc/none/report.json: cannot be written"),
    ):
        result = clt_command("--quick", *words)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1 and message in result.stderr, result.stderr


def test_command_trains_all_algorithms_on_the_same_data_and_writes_the_report(tmp_path: Path) -> None:
    result = clt_command("--quick", "--json", tmp_path / "new" / "report.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| claim |") and "Quick: the numbers are meaningless." in result.stdout
    tree = json.loads((tmp_path / "new" / "report.json").read_text())
    assert tree["machine"]["packages"] and tree["rows"][0]["name"] == "ours"
    assert {row["name"] for row in tree["rows"]} == {each.name for each in all_algorithms(64, 1e-3)}
    for row in tree["rows"]:
        (run,) = row["runs"]
        assert f"| {row['name']} | {row['how']}: " in result.stdout
        # Four features of each of four layers, on every token or on average.
        assert sum(run["heldout"]["l0"]) == pytest.approx(16, rel=0.01)
        assert all(speed > 0 for speed in run["tokens_per_s"])
        assert all(math.isfinite(value) for value in run["heldout"]["fvu"])


def test_wheel_without_benchmarks_raises_an_error_that_names_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks")
    with pytest.raises(ConfigError, match="benchmarks: not found; this comparison needs a checkout"):
        load_benchmarks("benchmarks.baselines.run", tmp_path)
