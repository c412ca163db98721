"""A tiny training job without a store: a teacher network's activations, recomputed from (seed, step) by every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import parse_config
from clt.distributed.job_control import JobControl
from clt.distributed.mesh import Mesh, deal_layers, input_layers
from clt.errors import StoreError
from clt.records import ActivationBatch, ModelIdentity, TokenTable
from clt.training.settings import TrainConfig
from clt.training.trainer import Trainer
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

N_LAYERS, D_MODEL, BATCH_TOKENS = 4, 16, 64
MODEL = ModelIdentity(
    name="toy", revision="local", architecture="Toy", n_layers=N_LAYERS, d_model=D_MODEL, fingerprint="00"
)


def toy_config(output: Path, **overrides: Any) -> TrainConfig:
    """A job of six steps; overrides replace whole top-level keys."""
    tree = {
        "store": "toy",
        "output": str(output),
        "clt": {"n_features": 64, "k": 4},
        "steps": 6,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "auxk": {"dead_after_tokens": 128, "token_fraction": 0.5},
        "data": {"batch_tokens": BATCH_TOKENS},
        "log_every": 2,
        "checkpoint_every": 3,
    }
    return parse_config(TrainConfig, tree | overrides, source="toy")


def architecture(config: TrainConfig) -> CLTConfig:
    """The transcoder's dimensions completed."""
    return CLTConfig.resolve(config.clt, N_LAYERS, D_MODEL)


def toy_scaling() -> Scaling:
    """A scaling that is not the identity."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(2, N_LAYERS, D_MODEL, generator=generator) / 10
    rms = 0.5 + torch.rand(2, N_LAYERS, generator=generator)
    return Scaling(mean_x=mean[0], rms_x=rms[0], mean_y=mean[1], rms_y=rms[1])


def global_batch(step: int, tokens: int = BATCH_TOKENS) -> tuple[Tensor, Tensor]:
    """x and y [N_LAYERS,tokens,D_MODEL] of one step, over all ranks and layers."""
    teacher = torch.Generator().manual_seed(1)
    weights = torch.randn(N_LAYERS, N_LAYERS, D_MODEL, D_MODEL, generator=teacher) / D_MODEL**0.5
    draw = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(N_LAYERS, tokens, D_MODEL, generator=draw)
    y = [sum((x[s] @ weights[s, t]).relu() for s in range(t + 1)) / (t + 1) for t in range(N_LAYERS)]
    return x, torch.stack(y)


class ToyBatches:
    """The `BatchSource` of one rank.

    Args:
        config: architecture.
        share: layers of the rank.
        data_rank: place on the data axis.
        data_size: ranks of the data axis.
        nan_steps: steps whose first token is NaN in the first layer this rank reads, on data rank 0.
        broken_step: step at which reading fails, on data rank 0.
        hanging_step: step at which reading does not come to an end, on this rank.
        defect_step: step at which reading shows a defect, on this rank.
        stop: step at which a stop is requested.
    """

    def __init__(
        self,
        config: CLTConfig,
        share: LayerShare,
        data_rank: int = 0,
        data_size: int = 1,
        nan_steps: tuple[int, ...] = (),
        broken_step: int | None = None,
        hanging_step: int | None = None,
        defect_step: int | None = None,
        stop: tuple[JobControl, int] | None = None,
    ) -> None:
        self.x_layers, self.y_layers = list(input_layers(config, share)), list(share.targets)
        self.data_rank, self.data_size = data_rank, data_size
        self.nan_steps, self.broken_step = nan_steps, broken_step
        self.hanging_step, self.defect_step, self.stop = hanging_step, defect_step, stop
        self.step = 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        while True:
            if self.step == self.broken_step and self.data_rank == 0:
                raise StoreError("units/0003: file is truncated; capture it again")
            if self.step == self.hanging_step:
                time.sleep(3600)
            if self.step == self.defect_step:
                raise ZeroDivisionError("a defect")
            if self.stop is not None and self.step == self.stop[1]:
                self.stop[0].stop_requested = True
            x, y = global_batch(self.step)
            rows = x.shape[1] // self.data_size
            own = slice(self.data_rank * rows, (self.data_rank + 1) * rows)
            x, y = x[self.x_layers, own], y[self.y_layers, own]
            if self.step in self.nan_steps and self.data_rank == 0:
                x[0, 0, 0] = torch.nan
            self.step += 1
            zeros = torch.zeros(rows, dtype=torch.int64)
            # Text and image tokens take turns, over all ranks.
            yield ActivationBatch(x=x, y=y, tokens=_tokens(zeros, torch.arange(own.start, own.stop) % 2))

    def state_dict(self) -> dict[str, Any]:
        """The next step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a step."""
        self.step = state["step"]


def toy_trainer(
    config: TrainConfig,
    mesh: Mesh,
    store_id: str = "toy-store",
    control: JobControl | None = None,
    weights_G: Tensor | None = None,
    **batches: Any,
) -> Trainer:
    """A trainer of this rank; extra arguments go to `ToyBatches`."""
    layout = architecture(config)
    share = deal_layers(layout, mesh.layer_size, mesh.column_size)[mesh.model_rank]
    transcoder = CrossLayerTranscoder(
        layout, toy_scaling(), share, config.seed, Provenance(model=MODEL, store_id=store_id)
    )
    source = ToyBatches(layout, share, mesh.data_rank, mesh.data_size, **batches)
    return Trainer(config, transcoder, source, mesh, progress_bar=False, control=control, weights_G=weights_G)


def _tokens(zeros: Tensor, modality: Tensor) -> TokenTable:
    return TokenTable(
        sample=zeros,
        position=zeros,
        token_id=zeros,
        modality=modality,
        patch_row=zeros,
        patch_col=zeros,
        image=zeros,
    )
