"""Held-out measures by modality, the density of features, and both in the job's files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clt.distributed.job_control import JobControl
from clt.distributed.mesh import Mesh
from clt.evaluation.density_plot import density_figure, pixels
from clt.evaluation.evaluator import Evaluation, LayerHistograms, StoreReport, evaluate_all, evaluate_store
from clt.evaluation.heldout_sums import RATE_EDGES
from clt.records import ActivationBatch, Modality, TokenTable
from clt.training.deepspeed_engine import joined_job
from clt.training.metrics import MetricsWriter, read_metrics
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.dead_features import firing_counts
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

L, D, F, K, B = 3, 6, 12, 3, 80


def _transcoder() -> CrossLayerTranscoder:
    config = CLTConfig(n_layers=L, d_model=D, n_features=F, k=K, first_offset=1)
    transcoder = CrossLayerTranscoder(config, Scaling.identity(L, D)).requires_grad_(False)
    for parameter in transcoder.W_dec.values():
        parameter.normal_()
    # A feature that never fires.
    transcoder.b_enc["0"][4] = -100.0
    return transcoder


def _data() -> tuple[ActivationBatch, torch.Tensor]:
    """Text, image and one image_special token; image tokens have another mean."""
    modality = torch.full((B,), int(Modality.TEXT), dtype=torch.uint8)
    modality[30:-1], modality[-1] = Modality.IMAGE, Modality.IMAGE_SPECIAL
    y = torch.randn(L, B, D) + 4.0 * (modality == Modality.IMAGE)[None, :, None]
    names = ("sample", "position", "token_id", "patch_row", "patch_col", "image")
    tokens = TokenTable(**dict.fromkeys(names, torch.zeros(B)), modality=modality)
    return ActivationBatch(x=torch.randn(L, B, D), y=y, tokens=tokens), modality


@pytest.fixture
def found() -> tuple[CrossLayerTranscoder, ActivationBatch, torch.Tensor, StoreReport]:
    """A transcoder, its data and the report."""
    transcoder, (batch, modality) = _transcoder(), _data()
    halves = [
        ActivationBatch(x=batch.x[:, part], y=batch.y[:, part], tokens=batch.tokens.select(part))
        for part in (slice(0, 50), slice(50, B))
    ]
    return transcoder, batch, modality, evaluate_store(transcoder, halves)


def test_modalities_have_their_own_tokens_and_their_own_mean(
    found: tuple[CrossLayerTranscoder, ActivationBatch, torch.Tensor, StoreReport],
) -> None:
    transcoder, batch, modality, report = found
    y_hat, codes = transcoder(batch.x), transcoder.encode(batch.x[:2])
    assert set(report.modalities) == {"text", "image", "image_special"}
    for name in ("text", "image"):
        rows, part = modality == Modality[name.upper()], report.modalities[name]
        assert part.num_tokens == int(rows.sum())
        for row, target in enumerate((1, 2)):
            y_t = batch.y[target, rows].double()
            expected = (y_hat[row, rows] - y_t).square().sum() / (y_t - y_t.mean(dim=0)).square().sum()
            # Float64 sums over float32 reconstructions.
            assert part.fvu[target] == pytest.approx(float(expected), rel=1e-5)
        assert list(part.l0.values()) == pytest.approx((codes.values[:, rows] > 0).sum(2).double().mean(1).tolist())
    # One token does not vary.
    assert report.modalities["image_special"].fvu == {}
    assert sum(part.num_tokens for part in report.modalities.values()) == report.num_tokens == B


def test_density_counts_every_feature_once(
    found: tuple[CrossLayerTranscoder, ActivationBatch, torch.Tensor, StoreReport],
) -> None:
    transcoder, batch, _, report = found
    fired = firing_counts(transcoder.encode(batch.x[:2]))
    density = report.density
    assert density.edges == RATE_EDGES and (density.edges[0], density.edges[-1]) == (-7.0, 0.0)
    for layer in (0, 1):
        assert sum(density.counts[layer]) + density.outside[layer] == F
        assert density.outside[layer] == int((fired[layer] == 0).sum()) == round(report.dead_fraction[layer] * F)
        rates = np.log10(fired[layer][fired[layer] > 0].double().numpy() / B)
        assert list(density.counts[layer]) == np.histogram(rates, RATE_EDGES)[0].tolist()
    assert density.outside[0] >= 1


def test_evaluation_reaches_tensorboard_and_json_lines(
    tmp_path: Path, found: tuple[CrossLayerTranscoder, ActivationBatch, torch.Tensor, StoreReport]
) -> None:
    evaluation = found[3].evaluation()
    # Nothing varies in one token, so there is no mean either.
    assert math.isnan(evaluation.scalars["heldout/image_special/fvu/mean"])
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write_evaluation(7, evaluation)
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["step"] == 7 and "heldout/image_special/fvu/mean" not in line
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert line["heldout/text/l0/layer_01"] == found[3].modalities["text"].l0[1]
    assert line["heldout/density/edges"] == list(RATE_EDGES)
    assert line["heldout/density/layer_00"] == list(found[3].density.counts[0])
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    board.Reload()
    assert set(board.Tags()["scalars"]) == {key for key, value in line.items() if isinstance(value, float | int)} - {
        "step"
    }
    assert board.Tags()["histograms"] == ["heldout/density/layer_00", "heldout/density/layer_01"]
    histogram = board.Histograms("heldout/density/layer_00")[0].histogram_value
    assert histogram.num == sum(found[3].density.counts[0]) and (histogram.min, histogram.max) == (-7.0, 0.0)
    (image,) = board.Images("heldout/density/all_layers")
    assert image.step == 7 and image.width > 600
    assert json.dumps(line)


@pytest.mark.parametrize("layers", [(0,), (1, 2, 5, 7), tuple(range(48))])
def test_density_figure_shows_the_share_of_a_layers_features(layers: tuple[int, ...]) -> None:
    bins = len(RATE_EDGES) - 1
    counts = {layer: tuple(97 if column == 9 else 1 for column in range(bins)) for layer in layers}
    outside = {layer: 124 * layer for layer in layers}
    figure = density_figure(
        LayerHistograms(quantity="rate", edges=RATE_EDGES, counts=counts, outside=outside), "a title"
    )
    heat, bars, colours = figure.axes
    assert heat.get_title() == "a title" and heat.get_xlabel() == "rate" and colours.get_ylabel()
    (mesh,) = heat.collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == list(RATE_EDGES)
    expected = np.array([counts[layer] for layer in layers]) / (124 * (1 + np.array(layers)))[:, None]
    assert np.allclose(np.asarray(mesh.get_array()), expected)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([layer / (1 + layer) for layer in layers])
    # The first layer is at the top; every label is at its layer's row.
    assert heat.get_ylim() == (len(layers) - 0.5, -0.5)
    labels = {int(label.get_position()[1]): int(label.get_text()) for label in heat.get_yticklabels()}
    assert labels == {row: layers[row] for row in labels} and labels[0] == layers[0]
    height, width, channels = pixels(figure).shape
    assert width == 900 and height >= 300 and channels == 3


def test_density_figure_of_features_that_never_fire_has_no_colour() -> None:
    empty = LayerHistograms(quantity="rate", edges=(0.0, 1.0), counts={0: (0,)}, outside={0: 5})
    figure = density_figure(empty, "")
    assert pixels(figure).size and np.asarray(figure.axes[0].collections[0].get_array()).sum() == 0


def test_evaluators_leave_the_mode_alone_are_joined_and_can_be_stopped() -> None:
    transcoder, seen = _transcoder().train(), []

    def one(transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
        seen.append((transcoder.training, torch.is_grad_enabled()))
        return Evaluation(scalars={"a": 1.0})

    def other(transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
        between()
        return Evaluation(scalars={"b": 2.0})

    control = JobControl()
    with joined_job():
        mesh = Mesh.create(1)
        assert evaluate_all([one, other], transcoder, mesh, control) == Evaluation(scalars={"a": 1.0, "b": 2.0})
        assert seen == [(False, False)] and transcoder.training and control.progress == 1
        assert evaluate_all([one], transcoder.eval(), mesh, control) == Evaluation(scalars={"a": 1.0})
        assert not transcoder.training
        control.stop_requested = True
        # A stop ends the evaluation at the next piece of work, and leaves the mode alone as well.
        assert evaluate_all([other, one], transcoder.train(), mesh, control) is None
        assert transcoder.training and len(seen) == 2
