"""Row-sparse Adam: settings, state, and the plain PyTorch update that specifies the Triton kernels.

A row (one feature's vector) is updated in a step only if its feature fired; other rows are neither read nor written.
The moments of a row that missed steps are decayed for all of them at its next update. With beta1 = 0 this is exactly
Adam: a row whose gradient is zero does not change. With beta1 > 0 the moments of an updated row are those of Adam, but
a row changes only when its feature fires, where Adam would still move it by its first moment.

Adam: Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1.

`clt.kernels.common.storage` defines how parameters and moments are stored and rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clt.kernels.common import packed
from clt.kernels.common.dtypes import accumulator
from clt.kernels.common.storage import MOMENT_1, MOMENT_2, PARAM, StoredTensor

#: Rows that the plain update works on at a time.
_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class RowAdam:
    """Settings of row-sparse Adam.

    Attributes:
        learning_rate: step size.
        beta1: decay of the first moment per step; 0 needs no first moment and makes the lazy update exact.
        beta2: decay of the second moment per step.
        eps: added to the root of the second moment.
        seed: of the stochastic rounding, 0 <= seed < 2^31; parameters with equal seeds share their noise.
    """

    learning_rate: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    seed: int = 0

    def __post_init__(self) -> None:
        # The largest float32 below 1: anything nearer would become 1 and divide by zero.
        largest = 1 - 2**-24
        if not 0 <= self.beta1 <= largest or not 0 < self.beta2 <= largest:
            raise ValueError(
                f"beta1={self.beta1}, beta2={self.beta2}: expected 0 <= beta1 < 1, 0 < beta2 < 1 as float32"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: expected 0 <= seed < 2^31")

    def hyper(self, step: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Hyper-parameters of one step, as the kernels read them.

        Args:
            step: number of this step, counted from 1; below 2^24, which float32 still counts exactly.
            device: device of the parameter.
            dtype: dtype of the parameter.

        Returns:
            [9] float32, or float64 for float64 parameters: learning rate, beta1, beta2, eps, 1 - beta1^step,
            1 - beta2^step, log2 beta1 (0 if beta1 is 0), log2 beta2, step.

        Raises:
            ValueError: for a step outside its range.
        """
        if not 1 <= step < 2**24:
            raise ValueError(f"step={step}: expected 1 <= step < 2^24")
        wide = accumulator(dtype)
        # Betas are rounded to the dtype first and the rest is computed from them: 1 - beta is then exact in the kernel.
        beta1, beta2 = (torch.tensor(beta, dtype=wide).item() for beta in (self.beta1, self.beta2))
        log1, log2 = (math.log2(beta) if beta > 0 else 0.0 for beta in (beta1, beta2))
        correction1, correction2 = (1.0 if beta == 0 else -math.expm1(step * math.log(beta)) for beta in (beta1, beta2))
        numbers = [self.learning_rate, beta1, beta2, self.eps, correction1, correction2, log1, log2, step]
        return torch.tensor(numbers, dtype=wide, device=device)


@dataclass(kw_only=True)
class RowAdamState:
    """Moments of one parameter [..,F,D].

    Attributes:
        v_RD: [..,F,D] second moments as of each row's last touch; float32, bfloat16 or uint8 codes, float64 for
            float64 parameters.
        m_RD: [..,F,D] first moments of the same dtype; None iff beta1 is 0.
        last_step_R: [..,F] int32 step of the last touch, 0 for never.
        seed: of the stochastic rounding.
        v_exponents_RG: [..,F,G] uint8 exponents of the codes' groups; None iff the moments are not codes.
        m_exponents_RG: likewise of the first moments.
    """

    v_RD: Tensor
    m_RD: Tensor | None
    last_step_R: Tensor
    seed: int
    v_exponents_RG: Tensor | None = None
    m_exponents_RG: Tensor | None = None

    @classmethod
    def zeros(cls, param: Tensor, settings: RowAdam, dtype: torch.dtype | None = None) -> RowAdamState:
        """State before the first step.

        Args:
            param: [..,F,D] parameter.
            settings: of the optimizer.
            dtype: of the moments: bfloat16, uint8, or None for float32 (float64 for a float64 parameter).

        Raises:
            ValueError: for another dtype.
        """
        wide = accumulator(param.dtype)
        dtype = dtype or wide
        if dtype != wide and not (dtype in (torch.bfloat16, torch.uint8) and wide == torch.float32):
            narrow = ", torch.bfloat16 or torch.uint8" if wide == torch.float32 else ""
            raise ValueError(f"moments of {dtype} for a parameter of {param.dtype}; expected {wide}{narrow}")

        def zeros(width: int) -> Tensor:
            return torch.zeros((*param.shape[:-1], width), dtype=dtype, device=param.device)

        d, groups = param.shape[-1], packed.n_groups(param.shape[-1])
        has_m, has_exponents = settings.beta1 > 0, dtype == torch.uint8
        return cls(
            v_RD=zeros(d),
            m_RD=zeros(d) if has_m else None,
            last_step_R=torch.zeros(param.shape[:-1], dtype=torch.int32, device=param.device),
            seed=settings.seed,
            v_exponents_RG=zeros(groups) if has_exponents else None,
            m_exponents_RG=zeros(groups) if has_exponents and has_m else None,
        )

    def tensors(self) -> list[Tensor]:
        """The tensors of the state, as custom operators take them: `from_tensors` reverses it."""
        tensors = (self.last_step_R, self.v_RD, self.v_exponents_RG, self.m_RD, self.m_exponents_RG)
        return [tensor for tensor in tensors if tensor is not None]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor], seed: int) -> RowAdamState:
        """The state whose `tensors` and seed these are; shares memory."""
        last_step_R, *moments = tensors
        has_exponents = moments[0].dtype == torch.uint8
        width = 1 + has_exponents
        second, first = moments[:width], moments[width:]
        return cls(
            v_RD=second[0],
            m_RD=first[0] if first else None,
            last_step_R=last_step_R,
            seed=seed,
            v_exponents_RG=second[1] if has_exponents else None,
            m_exponents_RG=first[1] if has_exponents and first else None,
        )

    def moments(self) -> dict[str, Tensor]:
        """The moments as of each row's last touch, as checkpoints hold them.

        Returns:
            "exp_avg_sq" and, with beta1 above 0, "exp_avg": [..,F,D] float32, float64 for float64 parameters; they
            share memory with the state where it holds just that.
        """
        wide = accumulator(self.v_RD.dtype)
        return {name: tensor.read(slice(None), wide).view_as(self.v_RD) for name, tensor in self._stored().items()}

    def load(self, moments: Mapping[str, Tensor], last_step_R: Tensor) -> None:
        """Sets the moments: exact for those that `moments` returned, rounded to nearest for others.

        Args:
            moments: by the names of `moments`, [..,F,D].
            last_step_R: [..,F] step of each row's last touch.

        Raises:
            ValueError: for other names or shapes.
        """
        stored = self._stored()
        shapes = {name: tuple(moment.shape) for name, moment in moments.items()}
        wanted = {name: tuple(self.v_RD.shape) for name in stored}
        if shapes != wanted or last_step_R.shape != self.last_step_R.shape:
            raise ValueError(
                f"moments {shapes} with steps {tuple(last_step_R.shape)} do not fit this state; expected {wanted}"
            )
        for name, tensor in stored.items():
            moment = moments[name].to(self.v_RD.device, accumulator(self.v_RD.dtype))
            tensor.write(slice(None), moment.reshape(tensor.numbers_RD.shape))
        self.last_step_R.copy_(last_step_R)

    def _stored(self) -> dict[str, StoredTensor]:
        """The moments by their names in checkpoints."""
        stored = {"exp_avg_sq": StoredTensor.of(self.v_RD, self.v_exponents_RG, MOMENT_2)}
        if self.m_RD is not None:
            stored["exp_avg"] = StoredTensor.of(self.m_RD, self.m_exponents_RG, MOMENT_1)
        return stored

    def touch(self, touched_R: Tensor, hyper: Tensor) -> None:
        """Records that the touched rows [..,F] were updated at the step of `hyper`; no host synchronisation."""
        torch.where(touched_R, hyper[8].int(), self.last_step_R, out=self.last_step_R)


def _decay(log2_beta: Tensor, steps: Tensor) -> Tensor:
    """beta ** steps, rounded once."""
    return torch.exp2(steps.double() * log2_beta.double()).to(steps.dtype)


def row_adam_(param: Tensor, grad: Tensor, state: RowAdamState, hyper: Tensor, touched: Tensor) -> None:
    """Adam step on the touched rows of a parameter, in place.

    Args:
        param: [..,F,D] parameter, contiguous; float32, float64 or bfloat16 (rounded stochastically).
        grad: [..,F,D] gradient; untouched rows are not read.
        state: moments of the parameter; moved to this step for touched rows.
        hyper: [9] from `RowAdam.hyper`.
        touched: [..,F] bool, rows to update.
    """
    d = param.shape[-1]
    last_R, grad_RD, stored = state.last_step_R.view(-1), grad.reshape(-1, d), state._stored()
    tables = (StoredTensor.of(param, None, PARAM), stored["exp_avg_sq"], stored.get("exp_avg"))
    # A few rows at a time, so that intermediate results stay in the cache.
    for rows in touched.reshape(-1).nonzero()[:, 0].split(_ROWS):
        missed_R1 = (hyper[8] - last_R[rows].to(hyper.dtype))[:, None]
        _update_rows(*tables, grad_RD[rows], rows, missed_R1, hyper, state.seed)
    state.touch(touched, hyper)


def _update_rows(
    param: StoredTensor,
    second: StoredTensor,
    first: StoredTensor | None,
    grad: Tensor,
    rows: Tensor,
    missed_R1: Tensor,
    hyper: Tensor,
    seed: int,
) -> None:
    """Adam step on some rows that were last touched so many steps ago."""
    learning_rate, beta1, beta2, eps, correction1, correction2, log1, log2, _ = hyper.unbind()
    wide = hyper.dtype
    direction = grad = grad.to(wide)
    v = second.read(rows, wide).mul_(_decay(log2, missed_R1)).add_((grad * grad).mul_(1.0 - beta2))
    second.write_stochastically(rows, v, hyper, seed)
    if first is not None:
        direction = first.read(rows, wide) * _decay(log1, missed_R1) + (1.0 - beta1) * grad
        first.write_stochastically(rows, direction, hyper, seed)
    # Through float64: the vectorised float32 root of PyTorch is sometimes off by a unit in the last place.
    root = v.double().sqrt_().to(wide)
    rescale = 1.0 / correction2.double().sqrt().to(wide)
    step_RD = torch.div(direction, root.mul_(rescale).add_(eps)).mul_(learning_rate / correction1)
    param.write_stochastically(rows, param.read(rows, wide) - step_RD, hyper, seed)
