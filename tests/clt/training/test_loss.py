"""Loss, schedules, dead features, scaling and store measures against hand-computed numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clt.errors import StoreError
from clt.evaluation.evaluator import evaluate_store
from clt.records import ActivationBatch, SiteStats, SparseCodes, TokenTable
from clt.training.loss import auxk_error, combine, encode_dead, revival
from clt.training.schedules import active_features, learning_rate
from clt.training.settings import AuxKSettings, OptimizerSettings
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.dead_features import FiringTracker, fired_features, firing_counts
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

L, D, F, K = 2, 3, 6, 2


def _transcoder(**changes: object) -> CrossLayerTranscoder:
    config = CLTConfig(**({"n_layers": L, "d_model": D, "n_features": F, "k": K} | changes))  # type: ignore[arg-type]
    transcoder = CrossLayerTranscoder(config, Scaling.identity(L, D))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_()
    return transcoder.double()


def _dead_codes(transcoder: CrossLayerTranscoder, x_LBD: Tensor, dead_LF: Tensor) -> SparseCodes:
    values, indices = zip(*encode_dead(transcoder, x_LBD, dead_LF, K), strict=True)
    return SparseCodes(values=torch.stack(values), indices=torch.stack(indices), n_features=F)


def _auxk_error(transcoder: CrossLayerTranscoder, codes: SparseCodes, missed_MBD: Tensor) -> Tensor:
    rows = [transcoder.source_rows(layer) for layer in transcoder.share.targets]
    errors = [
        auxk_error(transcoder, layer, codes.values[own], codes.indices[own], missed_BD)[0]
        for layer, own, missed_BD in zip(transcoder.share.targets, rows, missed_MBD, strict=True)
    ]
    return torch.stack(errors)


def test_combine_weighs_the_terms_as_the_settings_say() -> None:
    settings = AuxKSettings(coefficient=0.5, revival=0.25)
    terms = combine(
        torch.tensor([0.2, 0.4]), torch.tensor([1.0, 3.0]), torch.tensor(-2.0), settings, torch.full((2,), 1 / 4)
    )
    assert terms.total.item() == pytest.approx((0.2 + 0.4) / 4 + 0.5 * (1 + 3) / 4 + 0.25 * -2)
    assert terms.auxk.item() == pytest.approx(1.0) and terms.revival.item() == -2.0
    assert combine(torch.tensor([0.2]), None, None, settings, torch.ones(1)).total.item() == pytest.approx(0.2)


def test_encode_dead_selects_among_dead_features_only() -> None:
    transcoder = _transcoder()
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[0, [1, 4]] = True
    codes = _dead_codes(transcoder, torch.randn(L, 40, D, dtype=torch.float64), dead)
    filled = codes.values > 0
    assert set(codes.indices[0][filled[0]].tolist()) == {1, 4}
    assert not filled[1].any()


def test_dead_feature_terms_move_exactly_the_selected_features() -> None:
    transcoder = _transcoder()
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[:, 2] = True
    x, residual = (torch.randn(L, 30, D, dtype=torch.float64) for _ in range(2))
    codes = _dead_codes(transcoder, x, dead)
    (_auxk_error(transcoder, codes, residual).sum() + revival(codes, L)).backward()
    for layer in range(L):
        moved = transcoder.W_enc[str(layer)].grad.abs().sum(dim=1) > 0  # type: ignore[union-attr]
        assert moved.nonzero().flatten().tolist() == [2]
        moved_decoders = transcoder.W_dec[str(layer)].grad.abs().sum(dim=2) > 0  # type: ignore[union-attr]
        assert set(moved_decoders.nonzero()[:, 1].tolist()) == {2}
        assert transcoder.b_dec[str(layer)].grad is None


def test_revival_raises_selected_preactivations() -> None:
    transcoder = _transcoder()
    dead = torch.ones(L, F, dtype=torch.bool)
    x = torch.randn(L, 30, D, dtype=torch.float64)
    before = _dead_codes(transcoder, x, dead)
    revival(before, L).backward()
    with torch.no_grad():
        for parameter in transcoder.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert _dead_codes(transcoder, x, dead).values.mean() > before.values.mean()


def test_auxk_error_is_the_error_of_the_residual_without_bias_or_skip() -> None:
    transcoder = _transcoder(skip=True)
    empty = SparseCodes(
        values=torch.zeros(L, 4, K, dtype=torch.float64), indices=torch.zeros(L, 4, K).int(), n_features=F
    )
    residual = torch.randn(L, 4, D, dtype=torch.float64)
    torch.testing.assert_close(_auxk_error(transcoder, empty, residual), residual.square().mean(dim=(1, 2)))


def _codes(values: list[list[list[float]]], indices: list[list[list[int]]]) -> SparseCodes:
    return SparseCodes(values=torch.tensor(values), indices=torch.tensor(indices).int(), n_features=4)


def test_empty_slots_do_not_fire() -> None:
    codes = _codes([[[0.5, 0.0], [0.1, 0.2]]], [[[3, 0], [1, 3]]])
    assert firing_counts(codes).tolist() == [[0, 1, 0, 2]]
    assert fired_features(codes).tolist() == [[False, True, False, True]]


def test_tracker_counts_tokens_since_a_feature_fired() -> None:
    tracker = FiringTracker(1, 3)
    tracker.update(torch.tensor([[True, False, False]]), 10)
    tracker.update(torch.tensor([[False, True, False]]), 5)
    assert tracker.silent_LF.tolist() == [[5, 0, 15]]
    assert tracker.dead(15).tolist() == [[False, False, True]]


@given(
    step=st.integers(0, 999),
    warmup=st.integers(0, 200),
    decay=st.floats(0, 1),
    rate=st.floats(1e-6, 1.0),
)
def test_learning_rate_stays_between_zero_and_its_peak(step: int, warmup: int, decay: float, rate: float) -> None:
    settings = OptimizerSettings(learning_rate=rate, warmup_steps=warmup, decay_fraction=decay)
    assert 0 < learning_rate(step, 1000, settings) <= rate


def test_schedules_pass_through_their_corners() -> None:
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=3, decay_fraction=0.5, k_start=20, k_anneal_steps=10)
    assert learning_rate(0, 100, settings) == pytest.approx(0.5)
    assert learning_rate(3, 100, settings) == learning_rate(50, 100, settings) == 2.0
    assert learning_rate(75, 100, settings) == pytest.approx(1.0)
    assert [active_features(s, 10, settings) for s in (0, 5, 10, 99)] == [20, 15, 10, 10]


def test_scaling_from_stats_standardises_and_keeps_constant_sites() -> None:
    y = torch.randn(2, 500, D, dtype=torch.float64) * 3 + 1
    mean = y.mean(dim=1)
    rms = (y - mean[:, None]).square().mean(dim=(1, 2)).sqrt()
    rms[1] = 0.0
    scaling = Scaling.from_stats(SiteStats(count=500, mean=mean, rms=rms), SiteStats(count=500, mean=mean, rms=rms))
    standard = scaling.standardise_y(y, (0, 1))
    assert standard[0].square().mean().item() == pytest.approx(1.0, rel=1e-6)
    assert scaling.rms_y[1] == 1
    torch.testing.assert_close(scaling.restore_y(standard, (0, 1)), y)


def _batch(x: torch.Tensor, y: torch.Tensor) -> ActivationBatch:
    zeros = torch.zeros(x.shape[1])
    names = ("sample", "position", "token_id", "modality", "patch_row", "patch_col", "image")
    return ActivationBatch(x=x, y=y, tokens=TokenTable(**dict.fromkeys(names, zeros)))


@pytest.mark.parametrize("variant", [{}, {"first_offset": 1}, {"skip": True}])
def test_store_report_equals_the_definitions(variant: dict[str, object]) -> None:
    transcoder = _transcoder(**variant).float()
    x, y = torch.randn(L, 90, D), torch.randn(L, 90, D) + 5
    report = evaluate_store(transcoder, (_batch(x[:, i : i + 40], y[:, i : i + 40]) for i in range(0, 90, 40)))
    y_hat = transcoder(x)
    for row, target in enumerate(report.fvu):
        y_t = y[target].double()
        expected = (y_hat[row] - y_t).square().sum() / (y_t - y_t.mean(dim=0)).square().sum()
        # The sums run in float64 over float32 reconstructions.
        assert report.fvu[target] == pytest.approx(expected.item(), rel=1e-5)
    codes = transcoder.encode(x[list(report.l0)])
    assert list(report.l0.values()) == pytest.approx((codes.values > 0).sum(dim=(1, 2)).div(90).tolist())
    assert list(report.dead_fraction.values()) == pytest.approx(
        (firing_counts(codes) == 0).double().mean(dim=1).tolist()
    )
    assert report.num_tokens == 90
    assert report.mean_fvu == pytest.approx(sum(report.fvu.values()) / len(report.fvu))


def test_a_store_without_tokens_is_refused() -> None:
    with pytest.raises(StoreError, match="no tokens"):
        evaluate_store(_transcoder(), iter(()))
