"""Comparison of our training with other projects' algorithms: same tokens, steps and number of active features.

`clt bench baselines` prints it. The algorithms of two public trainers of cross-layer transcoders are re-implemented in
plain PyTorch (`eleuther`, `crosslayer`), each with its own normalisation, initial weights, activation, loss, treatment
of dead features and optimizer. Learning rates for language models may not suit a toy, so every algorithm runs with its
published setting, ours with the configured one, and with the best of several trials.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.baselines import crosslayer, eleuther, ours
from benchmarks.baselines.data import BaselineData, prepare_data
from benchmarks.baselines.measure import HeldOut, SeedRun, Setting, Train, measure
from benchmarks.baselines.report import OURS, AlgorithmRow, BaselineReport, How, Trial
from clt.config import load_config
from clt.errors import ConfigError
from clt.launch.bench.common.machine import this_machine
from clt.launch.bench.common.timing import torch_threads
from clt.launch.demo import DemoConfig

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "numpy")
#: Trial multiples of the published learning rates; a toy trains with larger ones than a language model.
ELEUTHER_RATES, CROSSLAYER_RATES = (4.0, 8.0, 16.0), (3.0, 10.0, 30.0)
#: Trial multiples of the configured learning rate, and those of the encoder biases relative to that.
OUR_RATES = ((0.5, 1.0), (2.0, 1.0), (4.0, 1.0), (4.0, 3.0), (4.0, 10.0), (6.4, 10.0))
#: Trial weights of a loss summed over tokens and features, a thousand times a thousand.
DEAD_PENALTIES = (1e-9, 1e-8, 1e-7)


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """Settings of the comparison.

    Attributes:
        config: YAML file of the demo: model, captures and our training.
        folder: folder of the stores `store` and `heldout`; default: a temporary folder with new captures.
        steps: training steps of every algorithm; default: as configured.
        seeds: of weights and read order; one run per algorithm and seed.
        threads: PyTorch threads.
        quick: a few steps of a tiny transcoder: checks that everything runs; its numbers are meaningless.
        only: names of the algorithms compared with ours; default: all.
    """

    config: Path
    folder: Path | None = None
    steps: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    quick: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A training algorithm.

    Attributes:
        name: row of the tables.
        train: trains a transcoder.
        published: its authors' setting, the configured one for ours; None where they give none.
        candidates: settings to try beside the published one.
    """

    name: str
    train: Train
    published: Setting | None
    candidates: tuple[Setting, ...]

    @property
    def trials(self) -> tuple[Setting, ...]:
        """All settings to be tried."""
        return (*(() if self.published is None else (self.published,)), *self.candidates)


def all_algorithms(n_features: int, our_rate: float) -> tuple[Algorithm, ...]:
    """Our algorithm, then those of other projects.

    Args:
        n_features: features per layer, which set one of the published learning rates.
        our_rate: learning rate of our configuration.
    """
    automatic = eleuther.published_learning_rate(n_features)
    fixed = crosslayer.PUBLISHED_LEARNING_RATE
    rates = tuple(Setting(learning_rate=automatic * factor) for factor in ELEUTHER_RATES)
    own = tuple(Setting(learning_rate=our_rate * factor, bias_rate=biases) for factor, biases in OUR_RATES)
    penalised = tuple(replace(rate, dead_penalty=penalty) for rate in rates[:2] for penalty in DEAD_PENALTIES)
    untied, tied = (partial(eleuther.train, tying=tying) for tying in ("none", "target"))
    given = Setting(learning_rate=automatic)
    return (
        Algorithm(name=OURS, train=ours.train_ours, published=Setting(learning_rate=our_rate), candidates=own),
        Algorithm(name="clt-training untied", train=untied, published=given, candidates=rates),
        Algorithm(name="clt-training tied", train=tied, published=given, candidates=rates),
        Algorithm(name="clt-training untied, dead-latent loss", train=untied, published=None, candidates=penalised),
        Algorithm(
            name="crosslayer-coding BatchTopK",
            train=crosslayer.train,
            published=Setting(learning_rate=fixed),
            candidates=tuple(Setting(learning_rate=fixed * factor) for factor in CROSSLAYER_RATES),
        ),
    )


def bench_baselines(settings: BaselineSettings) -> BaselineReport:
    """Runs the comparison in this process.

    Args:
        settings: algorithms, data and steps.

    Returns:
        Held-out measures and speeds.

    Raises:
        CLTError: the configuration is wrong, or capture or training failed.
    """
    _check(settings.only)
    config = load_config(DemoConfig, settings.config)
    seeds = settings.seeds
    if settings.quick:
        config, seeds = _small(config), seeds[:1]
    steps = settings.steps or config.training.steps
    with torch_threads(settings.threads), tempfile.TemporaryDirectory(prefix="clt-bench-") as scratch:
        machine = this_machine(_PACKAGES, Path(scratch))
        data = prepare_data(config, steps, settings.folder or Path(scratch), Path(scratch) / "clt")
        algorithms = all_algorithms(data.architecture.n_features, data.job.optimizer.learning_rate)
        algorithms = tuple(each for each in algorithms if not settings.only or each.name in (OURS, *settings.only))
        if settings.quick:
            algorithms = tuple(replace(each, candidates=each.candidates[:1]) for each in algorithms)
        trials = list(_try(data, algorithms, max(seeds) + 1))
        rows = _compare(data, _setups(algorithms, trials), seeds)
    return BaselineReport(
        machine=machine,
        setting=_words(data, seeds, settings.threads, settings.quick),
        choices=(ours.CHOICES, eleuther.CHOICES, crosslayer.CHOICES),
        trials=tuple(trials),
        rows=rows,
        features=data.architecture.n_layers * data.architecture.n_features,
    )


def _check(only: Sequence[str]) -> None:
    # Names do not depend on these rates.
    names = [each.name for each in all_algorithms(1, 1.0)]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only '{name}': the algorithms are {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """An algorithm with a setting, to be run with all seeds."""

    name: str
    how: How
    train: Train
    setting: Setting


def _try(data: BaselineData, algorithms: Sequence[Algorithm], seed: int) -> Iterator[Trial]:
    for algorithm in algorithms:
        for setting in algorithm.trials:
            trained = algorithm.train(data, seed, setting)
            heldout = measure(trained.predict, data.validation)
            fvu, dead = heldout.mean_fvu, heldout.mean_dead
            log.info("bench trial: %s (%s) fvu=%.5f dead_fraction=%.4f", algorithm.name, setting, fvu, dead)
            yield Trial(name=algorithm.name, setting=setting, fvu=fvu, dead_fraction=dead)


def best_trial(trials: Sequence[Trial], name: str) -> Setting:
    """The setting of an algorithm with the lowest FVU; NaN is never the best."""
    own = [entry for entry in trials if entry.name == name]
    return min(own, key=lambda entry: math.inf if math.isnan(entry.fvu) else entry.fvu).setting


def _setups(algorithms: Sequence[Algorithm], trials: Sequence[Trial]) -> list[_Setup]:
    setups = []
    for each in algorithms:
        tuned = best_trial(trials, each.name)
        if each.published is not None:
            given: How = "configured" if each.name == OURS else "published"
            also: How = "configured, also best" if each.name == OURS else "published, also best"
            how = also if tuned == each.published else given
            setups.append(_Setup(name=each.name, how=how, train=each.train, setting=each.published))
        if tuned != each.published:
            setups.append(_Setup(name=each.name, how="tuned", train=each.train, setting=tuned))
    return setups


def _compare(data: BaselineData, setups: Sequence[_Setup], seeds: Sequence[int]) -> tuple[AlgorithmRow, ...]:
    """Runs all algorithms with one seed before the next, so that other load affects all of them alike."""
    runs: list[list[SeedRun]] = [[] for _ in setups]
    for seed in seeds:
        for setup, own in zip(setups, runs, strict=True):
            trained = setup.train(data, seed, setup.setting)
            heldout = measure(trained.predict, data.test)
            own.append(SeedRun(seed=seed, heldout=heldout, tokens_per_s=trained.tokens_per_s))
            _log_run(setup, own[-1], heldout)
    return tuple(
        AlgorithmRow(name=setup.name, how=setup.how, setting=setup.setting, runs=tuple(own))
        for setup, own in zip(setups, runs, strict=True)
    )


def _log_run(setup: _Setup, run: SeedRun, heldout: HeldOut) -> None:
    log.info(
        "bench seed %d: %s (%s) fvu=%.5f l0=%.2f dead_fraction=%.4f tokens_per_s=%.0f",
        run.seed,
        setup.name,
        setup.setting,
        heldout.mean_fvu,
        heldout.total_l0,
        heldout.mean_dead,
        max(run.tokens_per_s),
    )


def _small(config: DemoConfig) -> DemoConfig:
    training = config.training
    return replace(
        config,
        train_prompts=30,
        heldout_prompts=10,
        training=replace(
            training,
            steps=4,
            clt=replace(training.clt, n_features=64, k=4),
            data=replace(training.data, batch_tokens=256),
        ),
    )


def _words(data: BaselineData, seeds: Sequence[int], threads: int, quick: bool) -> str:
    job, sizes = data.job, data.architecture
    validation, test = (sum(b.x_LBD.shape[1] for b in part) for part in (data.validation, data.test))
    return (
        f"{'Quick: the numbers are meaningless. ' if quick else ''}{sizes.n_layers} layers of width {sizes.d_model}, "
        f"{sizes.n_features} features and k = {sizes.k} per layer; "
        f"{data.train_tokens:,} tokens, {job.steps:,} steps of {job.data.batch_tokens:,}, the same batches for all; "
        f"{test:,} held-out tokens, and {validation:,} others for choosing settings; seeds "
        f"{', '.join(map(str, seeds))}; one process, {threads} thread{'s' if threads > 1 else ''} of PyTorch, float32. "
        f"tokens/s: windows of {job.log_every} steps of these runs, reading the store included."
    )
