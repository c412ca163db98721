"""DeepSpeed engine: data-parallel optimisation of one rank's share of the layers.

The only module that imports deepspeed. ZeRO 0, 1 and 2 run over the data axis of a `clt.distributed.mesh.Mesh`, which
is DeepSpeed's `mpu`. For every stage alike, all ranks decide whether a step is finite before the optimizer steps, the
gradient norm is global, and Adam's state exists from the start so that it can be restored.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

# Its functions keep the current process group as default of an argument. PyTorch would import it for the first kernel,
# during the job, whose process group would then stay alive (see `_leave`).
import torch.distributed.nn
from torch import Tensor, nn

from clt.distributed.job_control import JobControl
from clt.distributed.mesh import Mesh
from clt.distributed.rendezvous import meet
from clt.distributed.watchdog import watched
from clt.step_phases import phase
from clt.training.engine import FIRST_MOMENT, SECOND_MOMENT, StepCheck, StepInputs
from clt.training.metrics import Observations
from clt.training.settings import MeshSettings, OptimizerSettings

_MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)
_LARGEST_BUCKET = 500_000_000
_PATIENCE_SECONDS = MeshSettings().timeout_seconds
#: DeepSpeed engines of this process. Hooks of their gradients keep them alive, in cycles that Python does not see.
_engines: weakref.WeakSet[Any] = weakref.WeakSet()

# For `_leave`: the last cycles that hold a process group.
atexit.register(gc.collect)

# DeepSpeed 0.19 calls a collective that torch 2.13 has renamed.
warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated", category=FutureWarning)


@contextmanager
def joined_job(timeout_seconds: float = _PATIENCE_SECONDS, control: JobControl | None = None) -> Iterator[None]:
    """Joins the processes that torchrun started, or makes a job of this process alone; leaves it after the block.

    Args:
        timeout_seconds: longest wait for another rank.
        control: with it, a rank that is lost, hangs or fails ends the job with one line that names it
            (`clt.distributed.watchdog`); the caller increments `control.progress` at least once within the timeout.
    """
    deepspeed = _deepspeed()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    store, rank, world = meet(timeout_seconds)
    with ExitStack() as stack:
        if control is not None and world > 1:
            stack.enter_context(watched(store, rank, world, control, timeout_seconds))
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        stack.callback(_leave, deepspeed)
        yield


def _leave(deepspeed: ModuleType) -> None:
    """Destroys DeepSpeed's engines and the process groups, so that none outlives the interpreter.

    Gloo's threads release tensors under the interpreter's lock. An interpreter that is shutting down ends threads that
    wait for the lock, which aborts the process (exit code 134) after a complete job. A group joins its threads when its
    last reference goes: after this only frames and cycles hold one, and at exit there are no frames.
    """
    while _engines:
        _engines.pop().destroy()
    deepspeed.comm.destroy_process_group()


def local_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class DeepSpeedEngine:
    """Forward, backward and Adam steps of one rank's module: a `clt.training.engine.Engine`.

    Args:
        module: `clt.training.objective.Objective`; the loss is the sum of its outputs over the model group, averaged
            over the data axis.
        mesh: the processes.
        settings: Adam, clipping, and whether weights are bfloat16 beside float32 copies.
        zero_stage: 0, 1 or 2; 0 only without such copies.
        micro_batches: of a step.
    """

    def __init__(
        self, module: nn.Module, mesh: Mesh, settings: OptimizerSettings, zero_stage: int, micro_batches: int = 1
    ) -> None:
        self._mesh = mesh
        self._stage, self._micro_batches = zero_stage, micro_batches
        self._deepspeed = _deepspeed()
        parameters = list(module.parameters())
        biases = [parameter for name, parameter in module.named_parameters() if ".b_enc." in name]
        others = [parameter for name, parameter in module.named_parameters() if ".b_enc." not in name]
        groups = [{"params": biases, "factor": settings.bias_rate}, {"params": others, "factor": 1.0}]
        for parameter in parameters:
            # Every parameter has one owner on the layer axis: DeepSpeed's norm must count it on every rank.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        self._adam = torch.optim.Adam(
            # A rank without sources has no biases.
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self._engine, *_ = self._deepspeed.initialize(
            model=module,
            optimizer=self._adam,
            mpu=mesh,
            config=deepspeed_config(sum(p.numel() for p in parameters), settings, zero_stage, micro_batches),
            dist_init_required=False,
        )
        _engines.add(self._engine)
        self._create_state()
        self._parameter_bytes = sum(parameter.nbytes for parameter in parameters)

    def train_step(
        self, parts: Iterable[StepInputs], learning_rate: float, stop: bool
    ) -> tuple[StepCheck, Observations]:
        """See `clt.training.engine.Engine.train_step`; the loss and all gradients are checked for NaN/inf."""
        losses, seen = [], []
        for number, inputs in enumerate(parts, start=1):
            loss, observed = self._engine(*inputs)
            with phase("backward"):
                self._engine.backward(loss)
            if number < self._micro_batches:
                # Between micro-batches this only counts.
                self._engine.step()
            if number == self._micro_batches or self._stage == 2:
                # DeepSpeed starts its collectives itself, so they are counted here. ZeRO-2 keeps no whole gradients.
                self._mesh.traffic.count("data", "all_reduce", self._parameter_bytes, self._mesh.data_size)
            losses.append(loss.detach())
            seen.append(observed)
        check = self._check(torch.stack(losses).mean(), stop)
        if check.finite:
            for group in self._adam.param_groups:
                group["lr"] = learning_rate * group["factor"]
            self._engine.step()
            if self._stage:
                part = self._parameter_bytes // self._mesh.data_size
                self._mesh.traffic.count("data", "all_gather", part, self._mesh.data_size)
        else:
            self._discard()
        return check, Observations.mean(seen)

    def _check(self, loss: Tensor, stop: bool) -> StepCheck:
        """Agreement of all ranks, after the backward pass, on whether the step is finite."""
        norms = torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in self._gradients()]).double()
        # ZeRO-1 and 2 split the gradients over the data axis; without ZeRO every replica holds all of them.
        copies = self._mesh.data_size if self._stage == 0 else 1
        return agree(self._mesh, loss, norms.square().sum() / copies, stop)

    def _discard(self) -> None:
        """Drops the gradients without changing weights and moments."""
        if self._stage == 0:
            self._engine.zero_grad()
            # DeepSpeed counts micro-batches in `step`, to know which one completes the next step.
            self._engine.micro_steps += 1
            return
        # DeepSpeed drops reduced gradients and resets its buffers in a step that is not finite.
        for gradient in self._gradients():
            gradient.fill_(math.nan)
        self._engine.step()

    def weights(self, parameter: Tensor) -> Tensor:
        """See `clt.training.engine.Engine.weights`: the float32 copy of a bfloat16 parameter."""
        if self._stage == 0:
            return parameter.detach()
        whole: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return whole.view_as(parameter)

    def optimizer_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """See `clt.training.engine.Engine.optimizer_state`."""
        if self._stage == 0:
            return {key: self._adam.state[parameter][key] for key in _MOMENTS}
        read = self._deepspeed.utils.safe_get_full_optimizer_state
        return {key: read(parameter, key) for key in _MOMENTS}

    @torch.no_grad()
    def restore(self, parameter: Tensor, weights: Tensor, state: Mapping[str, Tensor]) -> None:
        """See `clt.training.engine.Engine.restore`."""
        parameter.copy_(weights)
        if self._stage == 0:
            for key in _MOMENTS:
                self._adam.state[parameter][key].copy_(state[key])
            return
        self._deepspeed.utils.safe_set_full_fp32_param(parameter, weights)
        for key in _MOMENTS:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, state[key], key)

    @property
    def adam_steps(self) -> int:
        """Steps that Adam has taken."""
        return int(next(iter(self._adam.state.values()))["step"])

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(steps)

    def _gradients(self) -> list[Tensor]:
        """Reduced gradients of this rank's optimizer step."""
        if self._stage == 0:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return [gradient for group in self._engine.optimizer.averaged_gradients.values() for gradient in group]

    def _create_state(self) -> None:
        """Creates Adam's state before the first step: DeepSpeed cannot restore a state that does not exist."""
        for group in self._adam.param_groups:
            for p in group["params"]:
                self._adam.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
                self._adam.state[p] |= {key: torch.zeros_like(p) for key in _MOMENTS}
        if self._stage:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def agree(mesh: Mesh, loss: Tensor, gradient_square: Tensor, stop: bool) -> StepCheck:
    """Agreement of all ranks on a step: one all-reduce, one host sync.

    Args:
        mesh: the processes.
        loss: scalar, this rank's share.
        gradient_square: scalar, this rank's share of the squared gradient norm.
        stop: whether a stop was requested on this rank.

    Returns:
        Loss, gradient norm, whether both are finite, and whether any rank requested a stop.
    """
    requested = gradient_square.new_full((), float(stop))
    sums = torch.stack([loss.detach().double() / mesh.data_size, gradient_square.double(), requested.double()])
    total_loss, square, stops = mesh.all_reduce(sums, "world").tolist()
    finite = math.isfinite(total_loss) and math.isfinite(square)
    norm = math.sqrt(square) if finite else math.inf
    return StepCheck(finite=finite, loss=total_loss, gradient_norm=norm, stop=stops > 0)


def deepspeed_config(
    n_parameters: int, settings: OptimizerSettings, zero_stage: int, micro_batches: int = 1
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        n_parameters: parameters of this rank.
        settings: Adam, clipping, dtype of the weights.
        zero_stage: 0, 1 or 2.
        micro_batches: of a step.

    Returns:
        The dict that `deepspeed.initialize` takes.
    """
    bucket = min(n_parameters, _LARGEST_BUCKET)
    return {
        # DeepSpeed does not see batches, and only needs consistent numbers.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": sys.maxsize,
        # Left out, it would clip at 1.0.
        "gradient_clipping": settings.gradient_clip,
        "bf16": {"enabled": settings.weights == "bfloat16_master"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
            "overlap_comm": False,
            # ZeRO-2 on gloo fails with it.
            "reduce_scatter": torch.cuda.is_available(),
        },
    }


def _deepspeed() -> ModuleType:
    """The deepspeed module, set to this device and not to compile a shared-memory op at run time."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible

    compatible["deepspeed_shm_comm"] = False
    return deepspeed
