"""DeepSpeed behind one small interface: data-parallel optimisation of one rank's share of the layers.

The only module that imports deepspeed. ZeRO 0, 1 and 2 run over the data axis of a `clt.parallel.Mesh`, which DeepSpeed
knows as its `mpu`. What DeepSpeed 0.19 leaves open is settled here, alike for every stage: whether a step is finite is
decided by all ranks before the optimizer moves, the gradient norm is global, and Adam's state exists from the start so
that it can be restored.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clt.config import MeshSettings, OptimizerSettings
from clt.faults import JobControl
from clt.meeting import meet
from clt.parallel import Mesh
from clt.watch import watched

#: Names of Adam's moments, as torch and DeepSpeed call them.
MOMENTS = ("exp_avg", "exp_avg_sq")

_LARGEST_BUCKET = 500_000_000
_PATIENCE_SECONDS = MeshSettings().timeout_seconds

# DeepSpeed 0.19 calls a collective that torch 2.13 has renamed; users of this project cannot change that.
warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated", category=FutureWarning)


@dataclass(frozen=True, kw_only=True)
class StepCheck:
    """What all ranks know of a step before the optimizer moves.

    Attributes:
        finite: loss and gradients are finite on every rank.
        loss: the loss over all tokens and targets.
        gradient_norm: global norm before clipping.
        stop: a rank has been told to stop.
    """

    finite: bool
    loss: float
    gradient_norm: float
    stop: bool


@contextmanager
def joined_job(timeout_seconds: float = _PATIENCE_SECONDS, control: JobControl | None = None) -> Iterator[None]:
    """Joins the processes that torchrun started, or makes a job of this process alone; leaves it at the end.

    Args:
        timeout_seconds: how long a rank may let the others wait.
        control: with it, a rank that is lost, hangs or fails ends the job with one line that names it (`clt.watch`);
            the caller raises `control.progress` at least once within the timeout.
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
        stack.callback(deepspeed.comm.destroy_process_group)
        yield


def local_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class Engine:
    """Forward, backward and Adam steps of one rank's module.

    Args:
        module: its forward returns a tuple whose first entry is this rank's share of the loss: the loss is their sum
            over the layer axis, averaged over the data axis.
        mesh: the processes.
        settings: Adam and clipping.
        zero_stage: 0, 1 or 2.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, settings: OptimizerSettings, zero_stage: int) -> None:
        self._mesh = mesh
        self._stage = zero_stage
        self._deepspeed = _deepspeed()
        parameters = list(module.parameters())
        for parameter in parameters:
            # Every parameter has one owner on the layer axis: DeepSpeed's norm must count it on every rank.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        self._adam = torch.optim.Adam(
            parameters, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
        )
        self._engine, *_ = self._deepspeed.initialize(
            model=module,
            optimizer=self._adam,
            mpu=mesh,
            config=deepspeed_config(sum(p.numel() for p in parameters), settings, zero_stage),
            dist_init_required=False,
        )
        self._create_state()

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of this rank's share of the loss, and the mean of the gradients over the data axis."""
        self._engine.backward(loss)

    def check(self, loss: Tensor, stop: bool = False) -> StepCheck:
        """Asks all ranks, after `backward`, whether the step may be taken; one all-reduce, one host sync.

        Args:
            loss: this rank's share.
            stop: whether this rank has been told to stop.
        """
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self._gradients()]).double()
        # ZeRO-1 and 2 split the gradients over the data axis; without ZeRO every replica holds all of them.
        copies = self._mesh.data_size if self._stage == 0 else 1
        told = norms.new_full((), float(stop))
        sums = torch.stack([loss.detach().double() / self._mesh.data_size, norms.square().sum() / copies, told])
        total_loss, square, stops = self._mesh.all_reduce(sums, "world").tolist()
        finite = math.isfinite(total_loss) and math.isfinite(square)
        norm = math.sqrt(square) if finite else math.inf
        return StepCheck(finite=finite, loss=total_loss, gradient_norm=norm, stop=stops > 0)

    def step(self, learning_rate: float) -> None:
        """Clips the gradients and takes an Adam step."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def discard(self) -> None:
        """Forgets the gradients; weights and moments stay as they are."""
        if self._stage == 0:
            self._engine.zero_grad()
            return
        # DeepSpeed's own way to drop reduced gradients and reset its buffers is a step it finds to be not finite.
        for gradient in self._gradients():
            gradient.fill_(math.nan)
        self._engine.step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Adam's moments of a parameter in full; all ranks of the data axis must call it."""
        if self._stage == 0:
            return {key: self._adam.state[parameter][key] for key in MOMENTS}
        read = self._deepspeed.utils.safe_get_full_optimizer_state
        return {key: read(parameter, key) for key in MOMENTS}

    @torch.no_grad()
    def restore(self, parameter: Tensor, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Sets a parameter and its moments.

        Args:
            parameter: of the module.
            value: new weights, of its shape.
            moments: tensors of its shape by the names in `MOMENTS`.
        """
        parameter.copy_(value)
        if self._stage == 0:
            for key in MOMENTS:
                self._adam.state[parameter][key].copy_(moments[key])
            return
        self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        for key in MOMENTS:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, moments[key], key)

    @property
    def adam_steps(self) -> int:
        """Steps that Adam has taken; its bias correction depends on them."""
        return int(next(iter(self._adam.state.values()))["step"])

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(steps)

    def _gradients(self) -> list[Tensor]:
        """Reduced gradients that this rank would step with."""
        if self._stage == 0:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return [gradient for group in self._engine.optimizer.averaged_gradients.values() for gradient in group]

    def _create_state(self) -> None:
        """Adam's state before the first step: DeepSpeed cannot set what does not exist, nor reach `step`."""
        for group in self._adam.param_groups:
            for p in group["params"]:
                self._adam.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
                self._adam.state[p] |= {key: torch.zeros_like(p) for key in MOMENTS}
        if self._stage:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def deepspeed_config(n_parameters: int, settings: OptimizerSettings, zero_stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours.

    Args:
        n_parameters: parameters of this rank.
        settings: Adam and clipping.
        zero_stage: 0, 1 or 2.

    Returns:
        The dict that `deepspeed.initialize` takes.
    """
    bucket = min(n_parameters, _LARGEST_BUCKET)
    return {
        # Batches are ours: DeepSpeed only needs consistent numbers.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": sys.maxsize,
        # Left out, it would clip at 1.0.
        "gradient_clipping": settings.gradient_clip,
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
    """The deepspeed module, told which device to use and not to compile a shared-memory op at run time."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible

    compatible["deepspeed_shm_comm"] = False
    return deepspeed
