"""Setup of a training job from its settings: checks, kernels, engine."""

from __future__ import annotations

import torch

from clt.distributed.mesh import Mesh
from clt.errors import ConfigError
from clt.kernels import ops
from clt.training.deepspeed_engine import DeepSpeedEngine
from clt.training.engine import Engine
from clt.training.objective import Objective
from clt.training.row_adam_engine import RowEngine
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder


def make_engine(config: TrainConfig, objective: Objective, mesh: Mesh) -> Engine:
    """The engine of the job's optimizer.

    Args:
        config: the job, checked by `check_job`.
        objective: of this rank's share, on its device.
        mesh: the processes.
    """
    if config.optimizer.kind == "row_adam":
        return RowEngine(objective, mesh, config.optimizer, config.seed)
    stage = config.zero_stage(mesh.data_size)
    return DeepSpeedEngine(objective, mesh, config.optimizer, stage, config.data.micro_batches)


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype in which the kernels read the weights."""
    return torch.float32 if config.optimizer.weights == "float32" else torch.bfloat16


def choose_kernels(config: TrainConfig, transcoder: CrossLayerTranscoder) -> None:
    """Selects the kernels that the job names for this process.

    Raises:
        ConfigError: they cannot run on the transcoder's device.
    """
    try:
        ops.use_backend(config.kernels)
        ops.backend_of(next(transcoder.parameters()))
    except RuntimeError as error:
        raise ConfigError(f"kernels={config.kernels}: {error}") from None


def check_job(config: TrainConfig, architecture: CLTConfig, data_size: int) -> None:
    """Checks that the settings fit each other and the data axis.

    Args:
        config: the job.
        architecture: its architecture.
        data_size: data-parallel replicas.

    Raises:
        ConfigError: they do not; names the key.
    """
    data = config.data
    if data.batch_tokens % (data_size * data.micro_batches):
        key = f"data.batch_tokens={data.batch_tokens} does not divide over {data_size} data ranks"
        key += f" of {data.micro_batches} micro-batches" if data.micro_batches > 1 else ""
        raise ConfigError(f"{key}; take a multiple of {data_size * data.micro_batches}")
    for key, value in (("auxk.k", config.auxk.k), ("optimizer.k_start", config.optimizer.k_start)):
        if value is not None and value > architecture.n_features:
            raise ConfigError(f"{key}={value} exceeds clt.n_features={architecture.n_features}; lower it")
    if config.optimizer.kind == "row_adam":
        _check_row_adam(config, architecture, data_size)
    elif config.optimizer.weights == "bfloat16_master" and config.mesh.zero_stage == 0:
        raise ConfigError(
            "mesh.zero_stage=0 does not support optimizer.weights=bfloat16_master; set 1 or 2, or "
            "optimizer.weights=float32"
        )


def _check_row_adam(config: TrainConfig, architecture: CLTConfig, data_size: int) -> None:
    key = "optimizer.kind=row_adam"
    if data_size > 1:
        raise ConfigError(
            f"{key} does not support data parallelism ({data_size} replicas requested); raise mesh.layer or "
            "mesh.column, or set optimizer.kind=adam"
        )
    if config.mesh.zero_stage:
        raise ConfigError(f"mesh.zero_stage={config.mesh.zero_stage} is not supported with {key}; remove it")
    if config.data.micro_batches > 1:
        raise ConfigError(
            f"data.micro_batches={config.data.micro_batches} is not supported with {key}, which stores no gradients; "
            "set 1"
        )
    for name, form in (("tied_decoders", architecture.tied_decoders), ("independent", architecture.independent)):
        if form is not None:
            raise ConfigError(f"clt.{name}={form} is not supported with {key}; set optimizer.kind=adam")
    if architecture.sparsity.has_penalty:
        raise ConfigError(
            f"clt.sparsity.kind={architecture.sparsity.kind} is not supported with {key}: its penalty has "
            "gradients for all decoder rows; set optimizer.kind=adam"
        )
