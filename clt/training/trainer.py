"""Training of a cross-layer transcoder: batches of activations in, checkpoints and metrics out.

In a step every rank encodes its sources, the ranks exchange codes, every rank decodes its targets, and the summed
squared error goes backward the same way; then all ranks agree whether the step is finite and take or skip it together.
Activations come from any `BatchSource`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from clt.distributed.code_exchange import CodeExchange
from clt.distributed.job_control import JobControl
from clt.distributed.mesh import Mesh, deal_layers
from clt.errors import CheckpointError, NonFiniteError, StoreError
from clt.evaluation.evaluator import Evaluator, evaluate_all
from clt.records import ActivationBatch
from clt.training.checkpoints import Checkpoints, Progress, step_folder
from clt.training.deepspeed_engine import local_device
from clt.training.engine import StepCheck, StepInputs
from clt.training.job_setup import check_job, choose_kernels, make_engine, weight_dtype
from clt.training.metrics import MetricsWindow, MetricsWriter, Observations, TrainingMetrics
from clt.training.objective import Objective
from clt.training.schedules import active_features, learning_rate, penalty_weight
from clt.training.settings import TrainConfig
from clt.training.weight_average import WeightAverage
from clt.transcoder.dead_features import FiringTracker
from clt.transcoder.model import CrossLayerTranscoder

log = logging.getLogger(__name__)

#: A job ends after this many consecutive steps without a finite loss and gradient.
MOST_SKIPPED_STEPS = 10


class BatchSource(Protocol):
    """Endless batches of this rank's tokens and layers, from a position that can be saved.

    `x` holds the layers `clt.distributed.mesh.input_layers` of the rank's share and `y` its targets, both raw and
    ascending. Ranks of a model group get the same tokens; ranks of the data axis get different tokens, equally many.
    """

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Batches from the current position on."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch taken, in plain values; the same on all ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved position."""


class Trainer:
    """Trains a transcoder; construct it on every rank, then call `fit`.

    Args:
        config: the job.
        transcoder: this rank's share, with its initial weights.
        batches: this rank's activations.
        mesh: the processes.
        progress_bar: whether the first rank shows one; by default when standard error is a terminal.
        evaluators: run every `evaluation.every` steps, on all ranks.
        weights_G: [G] weight of a token of each modality in the loss, mean 1 (`clt.training.loss.modality_weights`);
            None: 1.
        control: requests a stop, and counts progress.

    Raises:
        ConfigError: the settings do not fit each other or the mesh; names the key.
    """

    def __init__(
        self,
        config: TrainConfig,
        transcoder: CrossLayerTranscoder,
        batches: BatchSource,
        mesh: Mesh,
        progress_bar: bool | None = None,
        evaluators: Sequence[Evaluator] = (),
        control: JobControl | None = None,
        weights_G: Tensor | None = None,
    ) -> None:
        check_job(config, transcoder.config, mesh.data_size)
        device = local_device()
        self._config = config
        self._mesh = mesh
        self._batches = batches
        self._evaluators = evaluators
        self._control = control or JobControl()
        self._weights_G = None if weights_G is None else weights_G.to(device)
        self.transcoder = transcoder.to(device, weight_dtype(config))
        choose_kernels(config, transcoder)
        exchange = CodeExchange(mesh, deal_layers(transcoder.config, mesh.layer_size, mesh.column_size))
        objective = Objective(transcoder, exchange, config.auxk)
        self._engine = make_engine(config, objective, mesh)
        decay = config.optimizer.ema_decay
        self._average = WeightAverage(transcoder, decay) if decay else None
        self._tracker = FiringTracker(len(transcoder.share.sources), transcoder.config.n_features)
        self._tracker.silent_LF = self._tracker.silent_LF.to(device)
        self._checkpoints = Checkpoints(config, transcoder, self._engine, self._tracker, mesh, self._average)
        self._progress = Progress(batches=batches.state_dict())
        self._bar = sys.stderr.isatty() if progress_bar is None else progress_bar

    def fit(self) -> Path:
        """Trains to the last step, from the newest checkpoint of the output folder when there is one.

        When any rank's `control` requests a stop, the current step is the last of this run.

        Returns:
            Folder of the last checkpoint.

        Raises:
            NonFiniteError: ten steps in a row had a loss or gradient that is not finite.
            CheckpointError: a checkpoint or report cannot be written, or a checkpoint cannot be read or belongs to
                another job; the last good checkpoint stays.
            StoreError: the batches cannot be read.
        """
        config = self._config
        self._resume()
        self._window = MetricsWindow(self.transcoder.config, self.transcoder.share, self._tracker.silent_LF.device)
        batches = iter(self._batches)
        first = self._progress.step
        evaluate_every = config.evaluation.every if config.evaluation is not None else config.steps
        hidden = not (self._bar and self._mesh.is_first)
        with self._reports() as writer, tqdm(total=config.steps, initial=first, disable=hidden, unit="step") as bar:
            while self._progress.step < config.steps:
                sent = self._mesh.traffic.by_axis()
                with self._mesh.together(StoreError):
                    batch = next(batches)
                    self._control.progress += 1
                check = self._train_step(batch)
                self._window.add_traffic(self._mesh.traffic.by_axis() - sent)
                step, last = self._progress.step, self._progress.step == config.steps
                if last or step % config.log_every == 0:
                    metrics = self._measure(check)
                    with self._reporting():
                        if writer is not None:
                            writer.write(metrics)
                if last or check.stop or step % config.checkpoint_every == 0:
                    self._save(check)
                if check.stop:
                    break
                if self._evaluators and (last or step % evaluate_every == 0):
                    self._evaluate(writer)
                bar.set_postfix(loss=f"{check.loss:.4g}", refresh=False)
                bar.update()
        return config.output / step_folder(self._progress.step)

    def _train_step(self, batch: ActivationBatch) -> StepCheck:
        """One batch forward and backward; the optimizer steps if all ranks found the step finite."""
        done, settings = self._progress, self._config.optimizer
        rate = learning_rate(done.step, self._config.steps, settings)
        check, seen = self._engine.train_step(self._parts(batch), rate, self._control.stop_requested)
        tokens = batch.y.shape[1] * self._mesh.data_size
        self._window.add_tokens(tokens)
        if check.finite:
            self._observe(seen, check, tokens)
        self._progress = replace(
            done,
            step=done.step + 1,
            tokens=done.tokens + tokens,
            adam_steps=done.adam_steps + check.finite,
            skipped_steps=done.skipped_steps + (not check.finite),
            skipped_in_a_row=0 if check.finite else done.skipped_in_a_row + 1,
        )
        self._control.progress += 1
        self._end_after_skipped_steps()
        return check

    def _parts(self, batch: ActivationBatch) -> Iterator[StepInputs]:
        """The micro-batches of a batch."""
        done, device = self._progress, self._tracker.silent_LF.device
        k = active_features(done.step, self.transcoder.config.k, self._config.optimizer)
        penalty = penalty_weight(done.step, self.transcoder.config.sparsity)
        dead_LF, tokens = self._dead_features(), batch.y.shape[1] // self._config.data.micro_batches
        for start in range(0, batch.y.shape[1], tokens):
            own = slice(start, start + tokens)
            weights_B = self._token_weights(batch.tokens.modality[own])
            yield StepInputs(batch.x[:, own].to(device), batch.y[:, own].to(device), k, dead_LF, penalty, weights_B)

    def _observe(self, seen: Observations, check: StepCheck, tokens: int) -> None:
        """Counts a step that was taken."""
        if self._average is not None:
            self._average.update(self._engine.adam_steps)
        fired_LF = self._mesh.all_reduce(seen.fired_LF.to(torch.uint8), "data", dist.ReduceOp.MAX)
        self._tracker.update(fired_LF > 0, tokens)
        self._window.add(seen, check.loss)

    def _dead_features(self) -> Tensor | None:
        """[L_own,F] bool for the auxiliary loss, or None while no feature of any rank can be dead."""
        auxk = self._config.auxk
        if auxk.coefficient == 0 or self._progress.tokens < auxk.dead_after_tokens:
            return None
        return self._tracker.dead(auxk.dead_after_tokens)

    def _token_weights(self, modality_B: Tensor) -> Tensor | None:
        """[B] weight of each token in the mean over these tokens, or None where all are the same."""
        if self._weights_G is None:
            return None
        return self._weights_G[modality_B.to(self._weights_G.device).long()] / len(modality_B)

    def _end_after_skipped_steps(self) -> None:
        done = self._progress
        if done.skipped_in_a_row < MOST_SKIPPED_STEPS:
            return
        raise NonFiniteError(
            f"{self._config.output}: loss or gradients were not finite in {MOST_SKIPPED_STEPS} steps in a row, up to "
            f"step {done.step}; lower optimizer.learning_rate, or check store={self._config.store} for NaN"
        )

    def _measure(self, check: StepCheck) -> TrainingMetrics:
        done, settings = self._progress, self._config.optimizer
        dead_LF = self._tracker.dead(self._config.auxk.dead_after_tokens)
        return TrainingMetrics(
            step=done.step,
            tokens=done.tokens,
            averages=self._window.close(dead_LF.double().mean(dim=1), self._mesh),
            learning_rate=learning_rate(done.step - 1, self._config.steps, settings),
            k=active_features(done.step - 1, self.transcoder.config.k, settings),
            gradient_norm=check.gradient_norm,
            skipped_steps=done.skipped_steps,
        )

    def _evaluate(self, writer: MetricsWriter | None) -> None:
        """Evaluates the weights, or the EMA weights if kept; after the checkpoint, so that a failure costs no steps."""
        started = time.perf_counter()
        with nullcontext() if self._average is None else self._average.in_place():
            evaluation = evaluate_all(self._evaluators, self.transcoder, self._mesh, self._control)
        seconds = time.perf_counter() - started
        self._window.leave_out(seconds)
        if evaluation is None:
            log.info("step=%d evaluation stopped on request", self._progress.step)
            return
        with self._reporting():
            if writer is not None:
                writer.write_evaluation(self._progress.step, evaluation)
        self._control.progress += 1
        log.info("step=%d evaluation_seconds=%.1f", self._progress.step, seconds)

    @contextmanager
    def _reports(self) -> Iterator[MetricsWriter | None]:
        """The first rank's reports; None on the others."""
        writer = None
        with self._reporting():
            if self._mesh.is_first:
                writer = MetricsWriter(self._config.output, self._progress.step)
        try:
            yield writer
        except BaseException:
            # Raise the error that ended the job, not that its reports cannot be closed for the same reason.
            with suppress(OSError):
                if writer is not None:
                    writer.close()
            raise
        with self._reporting():
            if writer is not None:
                writer.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Raises an error of the first rank's reports on all ranks."""
        with self._mesh.together(CheckpointError):
            try:
                yield
            except OSError as error:
                raise CheckpointError(
                    f"{self._config.output}: reports cannot be written ({error.strerror or error}); fix that and "
                    "start the job again, it resumes from its last checkpoint"
                ) from None

    def _resume(self) -> None:
        progress = self._checkpoints.resume()
        if progress is None:
            log.info("training from scratch: steps=%d output=%s", self._config.steps, self._config.output)
            return
        self._progress = progress
        self._batches.load_state_dict(dict(progress.batches))
        log.info("resuming: step=%d/%d output=%s", progress.step, self._config.steps, self._config.output)

    def _save(self, check: StepCheck) -> None:
        folder = self._checkpoints.save(replace(self._progress, batches=self._batches.state_dict()))
        self._control.progress += 1
        log.info("step=%d/%d loss=%.4g checkpoint=%s", self._progress.step, self._config.steps, check.loss, folder)
