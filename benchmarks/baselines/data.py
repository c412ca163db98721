"""Data of `clt bench baselines`: two stores, captured once, and their batches.

Training batches come from the loader of `clt train`, so that every algorithm sees the same tokens in the same order.
The held-out tokens are shuffled once and split into equal batches, since BatchTopK depends on the tokens of a batch; a
quarter is for choosing settings, the rest for the report.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from clt.capture.models.sites import decoder_sites
from clt.capture.planning import CaptureConfig
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.run import capture_store
from clt.capture.sources.examples import SourceSettings, ToySource
from clt.errors import ConfigError
from clt.launch.activations import open_activations
from clt.launch.demo import HELDOUT_SEED, TRAIN_SEED, DemoConfig
from clt.records import ActivationBatch
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig

#: Steps per measurement of speed; the first window includes set-up and does not count.
WINDOW_STEPS = 20
_READ_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """Raw activations of B tokens.

    Attributes:
        x_LBD: encoder inputs.
        y_LBD: MLP outputs.
    """

    x_LBD: Tensor
    y_LBD: Tensor


@dataclass(frozen=True, kw_only=True)
class ChannelMoments:
    """Mean and standard deviation of every channel of L sites over the training tokens.

    Attributes:
        mean_LD: float32.
        std_LD: float32; 1 for a constant channel.
    """

    mean_LD: Tensor
    std_LD: Tensor


@dataclass(frozen=True, kw_only=True)
class BaselineData:
    """Batches and sizes of a comparison.

    Attributes:
        job: our training job, which defines store, steps and batches for all algorithms.
        architecture: of our transcoder.
        x: moments of the encoder inputs.
        y: moments of the MLP outputs.
        validation: held-out batches for choosing settings.
        test: held-out batches for the report.
        train_tokens: training tokens after filters.
    """

    job: TrainConfig
    architecture: CLTConfig
    x: ChannelMoments
    y: ChannelMoments
    validation: tuple[RawBatch, ...]
    test: tuple[RawBatch, ...]
    train_tokens: int

    def batches(self, seed: int) -> Iterator[RawBatch]:
        """The batches of a seed, one per step, as `clt train` reads them in one process."""
        source = open_activations(replace(self.job, seed=seed))
        x_sites, y_sites = _sites(self.architecture)
        loader = source.batches(x_sites, y_sites, _filter(self.job, self.architecture), 0, 1)
        for batch in islice(loader, self.job.steps):
            yield RawBatch(x_LBD=batch.x, y_LBD=batch.y)

    def first_batch(self, seed: int) -> RawBatch:
        """The first batch of a seed, from which some algorithms initialise biases and scales."""
        return next(self.batches(seed))


def prepare_data(config: DemoConfig, steps: int, folder: Path, output: Path) -> BaselineData:
    """Captures the stores unless they are complete, and reads the held-out tokens.

    Args:
        config: sizes of the captures, and our training.
        steps: steps of every algorithm.
        folder: folder of `store` and `heldout`, such as the demo's output.
        output: output folder of our training.

    Raises:
        ConfigError: the other algorithms do not support this kind of transcoder.
        CLTError: capture failed, or a store is damaged.
    """
    settings = config.training.clt
    _check(config)
    stores = []
    for name, prompts, seed in (
        ("store", config.train_prompts, TRAIN_SEED),
        ("heldout", config.heldout_prompts, HELDOUT_SEED),
    ):
        source = SourceSettings(toy=ToySource(n=prompts, seed=seed))
        store = CaptureConfig(model=str(config.model), output=str(folder / name), source=source, seed=config.seed)
        capture_store(store, progress=sys.stderr.isatty())
        stores.append(open_store(str(folder / name)))
    model = stores[0].model
    architecture = CLTConfig.resolve(settings, model.n_layers, model.d_model)
    job = TrainConfig(
        store=str(folder / "store"),
        output=output,
        steps=steps,
        clt=settings,
        optimizer=config.training.optimizer,
        auxk=config.training.auxk,
        data=config.training.data,
        log_every=min(WINDOW_STEPS, steps),
        checkpoint_every=steps,
    )
    x_sites, y_sites = _sites(architecture)
    where = _filter(job, architecture)
    x, y, train_tokens = _moments(iterate_store(stores[0], x_sites, y_sites, _READ_TOKENS, where=where))
    heldout = list(iterate_store(stores[1], x_sites, y_sites, _READ_TOKENS, where=TokenFilter(drop_bos=True)))
    x_LBD, y_LBD = (torch.cat([getattr(batch, side) for batch in heldout], dim=1) for side in ("x", "y"))
    validation, test = _split(x_LBD, y_LBD, config.training.data.batch_tokens)
    return BaselineData(
        job=job,
        architecture=architecture,
        x=x,
        y=y,
        validation=validation,
        test=test,
        train_tokens=train_tokens,
    )


def _check(config: DemoConfig) -> None:
    """The other algorithms write to all layers from the own one on, without skip connection, at a given L0."""
    transcoder = config.training.clt
    for key, value, wanted in (
        ("sparsity.kind", transcoder.sparsity.kind, "topk"),
        ("n_targets", transcoder.n_targets, None),
        ("first_offset", transcoder.first_offset, 0),
        ("skip", transcoder.skip, False),
    ):
        if value != wanted:
            raise ConfigError(f"training.clt.{key}={value}: the comparison supports only {wanted}; remove the key")


def _sites(architecture: CLTConfig) -> tuple[list[str], list[str]]:
    layers = range(architecture.n_layers)
    return decoder_sites(layers, architecture.read_site), decoder_sites(layers, "mlp_out")


def _filter(job: TrainConfig, architecture: CLTConfig) -> TokenFilter:
    return TokenFilter(modalities=job.data.modalities, drop_bos=architecture.drop_bos, norm_cap=job.data.norm_cap)


def _moments(batches: Iterator[ActivationBatch]) -> tuple[ChannelMoments, ChannelMoments, int]:
    """Moments of x and y, and the number of tokens."""
    count, sums = 0, [torch.zeros(()) for _ in range(4)]
    for batch in batches:
        count += batch.x.shape[1]
        new = [part for side in (batch.x.double(), batch.y.double()) for part in (side.sum(1), side.square().sum(1))]
        sums = [old + part for old, part in zip(sums, new, strict=True)]
    return channel_moments(count, sums[0], sums[1]), channel_moments(count, sums[2], sums[3]), count


def channel_moments(count: int, sum_LD: Tensor, square_LD: Tensor) -> ChannelMoments:
    """Moments from sums over tokens, float64.

    Args:
        count: tokens.
        sum_LD: sum of each channel.
        square_LD: sum of the squares of each channel.
    """
    mean_LD = sum_LD / count
    variance_LD = square_LD / count - mean_LD.square()
    varies_LD = variance_LD > 1e-12 * square_LD / count
    std_LD = torch.where(varies_LD, variance_LD.clamp(min=0).sqrt(), 1)
    return ChannelMoments(mean_LD=mean_LD.float(), std_LD=std_LD.float())


def _split(x_LBD: Tensor, y_LBD: Tensor, batch_tokens: int) -> tuple[tuple[RawBatch, ...], tuple[RawBatch, ...]]:
    """Validation and test batches, split before shuffling so that tokens of one image stay on one side."""
    total = x_LBD.shape[1]
    parts = []
    for start, stop in ((0, total // 4), (total // 4, total)):
        order = start + torch.randperm(stop - start, generator=torch.Generator().manual_seed(0))
        places = order.tensor_split(-(-len(order) // batch_tokens))
        parts.append(tuple(RawBatch(x_LBD=x_LBD[:, place], y_LBD=y_LBD[:, place]) for place in places))
    return parts[0], parts[1]
