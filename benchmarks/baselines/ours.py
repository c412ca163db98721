"""This project's training in `clt bench baselines`: `clt train` in one process."""

from __future__ import annotations

import shutil
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.baselines.data import BaselineData
from benchmarks.baselines.measure import Prediction, Setting, Trained, without_first
from clt.checkpoint.training_output import METRICS_FILE, read_metrics
from clt.launch.train import train
from clt.transcoder.model import CrossLayerTranscoder

CHOICES = (
    "`clt train` in one process: the job of the configuration, TopK of every token and layer, untied decoders, scalar "
    "scale per site from the whole store, encoder rows of norm 1, zero decoders, squared error in standardised units, "
    "AuxK through cross-layer decoders and revival, Adam with warm-up and decay of the configuration, "
    "whose other values were chosen earlier on this toy and are not tuned here"
)


def train_ours(data: BaselineData, seed: int, setting: Setting) -> Trained:
    """Trains a transcoder with `clt train`, checkpoint and logs included.

    Args:
        data: batches and sizes.
        seed: of weights and batches.
        setting: learning rates.

    Raises:
        CLTError: training failed.
    """
    job = replace(
        data.job,
        seed=seed,
        output=data.job.output / f"ours-{seed}",
        optimizer=replace(data.job.optimizer, learning_rate=setting.learning_rate, bias_rate=setting.bias_rate),
    )
    transcoder = CrossLayerTranscoder.from_pretrained(train(job, progress_bar=False))
    reports = read_metrics(job.output / METRICS_FILE)
    # The last report may cover fewer steps.
    speeds = [report["tokens_per_second"] for report in reports if report["step"] % job.log_every == 0]
    shutil.rmtree(job.output)
    return Trained(predict=lambda x_LBD: predict(transcoder, x_LBD), tokens_per_s=without_first(speeds))


def predict(transcoder: CrossLayerTranscoder, x_LBD: Tensor) -> Prediction:
    """Output of a whole transcoder for raw encoder inputs [L,B,D] of all layers."""
    layers = transcoder.share.sources
    codes = transcoder.encode(transcoder.scaling.standardise_x(x_LBD, layers))
    active_LBF = torch.zeros(*codes.values.shape[:2], codes.n_features, dtype=torch.int8)
    # Empty slots add zero to feature 0.
    active_LBF.scatter_add_(2, codes.indices.long(), (codes.values > 0).to(torch.int8))
    return Prediction(
        y_LBD=transcoder.scaling.restore_y(transcoder.decode(codes), transcoder.share.targets),
        active_LBF=active_LBF > 0,
    )
