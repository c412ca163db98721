"""Trains a cross-layer transcoder on an activation store.

    python launch/train.py configs/train/toy.yaml [key=value ...] [--dry-run]
    torchrun --nproc_per_node=2 launch/train.py configs/train/toy.yaml mesh.layer=2

A job whose output folder has a checkpoint goes on from there. `--dry-run` prints the resolved configuration and ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clt.capture.loader import ActivationLoader
from clt.capture.store import open_store
from clt.config import CLTConfig, TrainConfig, config_to_yaml, load_config
from clt.engine import joined_job
from clt.errors import CLTError
from clt.launch.logs import job_rank, set_up_logging
from clt.model import CrossLayerTranscoder, Provenance
from clt.parallel import Mesh, deal_layers, input_layers
from clt.scaling import Scaling
from clt.trainer import Trainer


def train(config: TrainConfig, progress_bar: bool | None = None) -> Path:
    """Trains as one process, or as one rank of the job that torchrun started.

    Args:
        config: the job.
        progress_bar: whether the first rank shows one; by default when standard error is a terminal.

    Returns:
        Folder of the last checkpoint, for `CrossLayerTranscoder.from_pretrained`.

    Raises:
        CLTError: what a user can cause; the same on all ranks.
    """
    store = open_store(config.store)
    architecture = CLTConfig.resolve(config.clt, store.n_layers, store.d_model)
    layers = range(architecture.n_layers)
    x_sites = [f"lm.{layer}.{architecture.read_site}" for layer in layers]
    y_sites = [f"lm.{layer}.mlp_out" for layer in layers]
    scaling = Scaling.from_stats(
        store.stats(x_sites, drop_bos=architecture.drop_bos), store.stats(y_sites, drop_bos=architecture.drop_bos)
    )
    with joined_job():
        mesh = Mesh.create(config.mesh.layer)
        share = deal_layers(architecture, mesh.layer_size)[mesh.layer_rank]
        batches = ActivationLoader(
            store,
            x_sites=[x_sites[layer] for layer in input_layers(architecture, share)],
            y_sites=[y_sites[layer] for layer in share.targets],
            batch_tokens=config.data.batch_tokens,
            window_tokens=config.data.window_tokens,
            seed=config.seed,
            data_rank=mesh.data_rank,
            data_world=mesh.data_size,
            drop_bos=architecture.drop_bos,
        )
        transcoder = CrossLayerTranscoder(
            architecture, scaling, share, config.seed, Provenance(model=store.model, store_id=store.id)
        )
        return Trainer(config, transcoder, batches, mesh, progress_bar).fit()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the job")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, dotted keys")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and end")
    options = parser.parse_args(arguments)
    set_up_logging()
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
        if options.dry_run:
            print(config_to_yaml(config), end="")
            return 0
        folder = train(config)
    except CLTError as error:
        # All ranks raise the same error; the first one tells it.
        if job_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if job_rank() == 0:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
