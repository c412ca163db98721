"""Trains a cross-layer transcoder on an activation store.

    python launch/train.py configs/train/toy.yaml [key=value ...] [--dry-run]
    torchrun --nproc_per_node=2 launch/train.py configs/train/toy.yaml mesh.layer=2

A job whose output folder has a checkpoint continues from there. SIGTERM or Ctrl-C makes it write one after the current
step and exit with code 0. `--dry-run` prints the resolved configuration and exits. `clt train` is the same job in one
process.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path

from clt.attribution.evaluation.during_training import make_evaluators, open_heldout
from clt.capture.models.sites import decoder_sites
from clt.capture.reading.token_filter import TokenFilter
from clt.distributed.job_control import JobControl, stop_on_signals
from clt.distributed.mesh import Mesh, check_world, deal_layers, input_layers
from clt.launch.activations import open_activations
from clt.launch.logs import job_rank, job_world
from clt.launch.script import JobCommand, run_job
from clt.training.deepspeed_engine import joined_job
from clt.training.loss import modality_weights
from clt.training.settings import TrainConfig
from clt.training.trainer import Trainer
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

log = logging.getLogger(__name__)


def train(config: TrainConfig, progress_bar: bool | None = None, control: JobControl | None = None) -> Path:
    """Trains as one process, or as one rank of the job that torchrun started.

    Args:
        config: the job.
        progress_bar: whether rank 0 shows one; None: if standard error is a terminal.
        control: requests an early end; see `train_until_stopped`.

    Returns:
        Folder of the last checkpoint, for `CrossLayerTranscoder.from_pretrained`.

    Raises:
        CLTError: an error of the user; the same on all ranks.
    """
    if config.clt.independent is not None and job_rank() == 0:
        log.warning(
            "clt.independent=%s: each source layer alone reconstructs the whole output of its targets, and the sum of "
            "sources counts it many times; remove clt.independent to train sources jointly",
            config.clt.independent,
        )
    activations = open_activations(config)
    model = activations.model
    heldout = open_heldout(config, model, activations.id)
    architecture = CLTConfig.resolve(config.clt, model.n_layers, model.d_model)
    layers = range(architecture.n_layers)
    x_sites = decoder_sites(layers, architecture.read_site)
    y_sites = decoder_sites(layers, "mlp_out")
    where = TokenFilter(
        modalities=config.data.modalities, drop_bos=architecture.drop_bos, norm_cap=config.data.norm_cap
    )
    scaling = Scaling.from_stats(activations.stats(x_sites, where), activations.stats(y_sites, where))
    weights_G = modality_weights(config.data.token_weights, activations.token_counts(where).tolist())
    control = control or JobControl()
    # Before the ranks meet: each can find this error alone.
    check_world(job_world(), config.mesh.layer, config.mesh.column)
    with joined_job(config.mesh.timeout_seconds, control):
        mesh = Mesh.create(config.mesh.layer, config.mesh.column)
        share = deal_layers(architecture, mesh.layer_size, mesh.column_size)[mesh.model_rank]
        batches = activations.batches(
            [x_sites[layer] for layer in input_layers(architecture, share)],
            [y_sites[layer] for layer in share.targets],
            where,
            mesh.data_rank,
            mesh.data_size,
        )
        transcoder = CrossLayerTranscoder(
            architecture, scaling, share, config.seed, Provenance(model=model, store_id=activations.id)
        )
        evaluators = make_evaluators(config, model, heldout, architecture, share, mesh)
        return Trainer(config, transcoder, batches, mesh, progress_bar, evaluators, control, weights_G).fit()


def train_until_stopped(config: TrainConfig) -> Path:
    """Trains until the last step, or until SIGTERM or SIGINT; see `train`."""
    with stop_on_signals() as control:
        return train(config, control=control)


COMMAND = JobCommand(
    name="clt train",
    summary="Trains a transcoder; prints the folder of its last checkpoint.",
    settings=TrainConfig,
    run=train_until_stopped,
)

main = partial(run_job, COMMAND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
