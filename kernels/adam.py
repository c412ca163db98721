"""Row-sparse Adam: settings, state and the plain PyTorch meaning that the Triton kernels are held to.

A row (one feature's vector) is touched in a step when its feature fired; only touched rows are read and written. The
moments of a row that missed steps are decayed for all of them at its next touch. With beta1 = 0 that is Adam itself:
a row whose gradient is zero does not move. With beta1 > 0 the moments of a touched row are those of Adam, but a row
moves only when it is touched, where Adam would let it drift on old momentum.

Adam: Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1.

Numbers kept as bfloat16 are rounded stochastically, because an update smaller than half a unit in the last place
would be lost by rounding to nearest. The noise is a hash of seed, step, element number and tensor: no generator state,
and the same bits wherever it is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clt.kernels.dtypes import accumulator

#: Streams of noise: which tensor is rounded, below 4.
PARAM, MOMENT_1, MOMENT_2 = 0, 1, 2

#: Multipliers of the hash, below 2^31 so that int64 products with 32-bit numbers do not overflow.
MULTIPLIER_1, MULTIPLIER_2, MULTIPLIER_3 = 0x21F0AAAD, 0x735A2D97, 0x31848BAB

#: Rows that the plain update works on at a time.
_ROWS = 128

_LOW_32 = 0xFFFFFFFF


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
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: want 0 <= beta1 < 1, 0 < beta2 < 1 as float32")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: want 0 <= seed < 2^31")

    def hyper(self, step: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The numbers of one step as the kernels read them.

        Args:
            step: number of this step, counted from 1; below 2^24, which float32 still counts exactly.
            device: where the parameter lies.
            dtype: dtype of the parameter.

        Returns:
            [9] float32, or float64 for float64 parameters: learning rate, beta1, beta2, eps, 1 - beta1^step,
            1 - beta2^step, log2 beta1 (0 if beta1 is 0), log2 beta2, step.

        Raises:
            ValueError: for a step outside its range.
        """
        if not 1 <= step < 2**24:
            raise ValueError(f"step={step}: want 1 <= step < 2^24")
        wide = accumulator(dtype)
        # The betas are what the dtype can hold, and the rest follows from those: 1 - beta is then exact in the kernel.
        beta1, beta2 = (torch.tensor(beta, dtype=wide).item() for beta in (self.beta1, self.beta2))
        log1, log2 = (math.log2(beta) if beta > 0 else 0.0 for beta in (beta1, beta2))
        correction1, correction2 = (1.0 if beta == 0 else -math.expm1(step * math.log(beta)) for beta in (beta1, beta2))
        numbers = [self.learning_rate, beta1, beta2, self.eps, correction1, correction2, log1, log2, step]
        return torch.tensor(numbers, dtype=wide, device=device)


@dataclass(kw_only=True)
class RowAdamState:
    """Moments of one parameter [..,F,D].

    Attributes:
        v_RD: [..,F,D] second moments as of each row's last touch; float32 or bfloat16, float64 for float64 parameters.
        m_RD: [..,F,D] first moments of the same dtype; None iff beta1 is 0.
        last_step_R: [..,F] int32 step of the last touch, 0 for never.
        seed: of the stochastic rounding.
    """

    v_RD: Tensor
    m_RD: Tensor | None
    last_step_R: Tensor
    seed: int

    @classmethod
    def zeros(cls, param: Tensor, settings: RowAdam, dtype: torch.dtype | None = None) -> RowAdamState:
        """State before the first step.

        Args:
            param: [..,F,D] parameter.
            settings: of the optimizer.
            dtype: of the moments: bfloat16, or None for float32 (float64 for a float64 parameter).

        Raises:
            ValueError: for another dtype.
        """
        wide = accumulator(param.dtype)
        dtype = dtype or wide
        if dtype != wide and not (dtype == torch.bfloat16 and wide == torch.float32):
            raise ValueError(f"moments of {dtype} for a parameter of {param.dtype}: want {wide}, or torch.bfloat16")
        shape, device = param.shape, param.device
        return cls(
            v_RD=torch.zeros(shape, dtype=dtype, device=device),
            m_RD=torch.zeros(shape, dtype=dtype, device=device) if settings.beta1 > 0 else None,
            last_step_R=torch.zeros(shape[:-1], dtype=torch.int32, device=device),
            seed=settings.seed,
        )

    def touch(self, touched_R: Tensor, hyper: Tensor) -> None:
        """Records that the touched rows [..,F] were updated at the step of `hyper`; no host synchronisation."""
        torch.where(touched_R, hyper[8].int(), self.last_step_R, out=self.last_step_R)


def mix(x: Tensor) -> Tensor:
    """Bijection of 32-bit integers, held in int64, in which every input bit flips every output bit half the time.

    Source: shifts and multipliers found by https://github.com/skeeto/hash-prospector.
    """
    x = ((x ^ (x >> 16)) * MULTIPLIER_1) & _LOW_32
    x = ((x ^ (x >> 15)) * MULTIPLIER_2) & _LOW_32
    return x ^ (x >> 15)


def noise(offset: Tensor, step: Tensor, seed: int, stream: int) -> Tensor:
    """Uniform integers below 2^16, a function of the arguments only.

    Args:
        offset: int64 element numbers within the parameter, any shape; elements 2^32 apart share their noise.
        step: [] number of the step.
        seed: of the stochastic rounding.
        stream: PARAM, MOMENT_1 or MOMENT_2.

    Returns:
        int64 of the shape of offset.
    """
    own = mix(torch.tensor(seed, device=offset.device))
    key = mix((own + step.long() * 4 + stream) & _LOW_32)
    # Step and stream enter before the last round, so that a kernel which rounds several tensors shares the first two.
    return (((mix((offset & _LOW_32) ^ own) ^ key) * MULTIPLIER_3) & _LOW_32) >> 16


def round_stochastically(x: Tensor, noise_bits: Tensor) -> Tensor:
    """float32 to bfloat16: one of the two neighbours, the mean over the noise being x; NaN and infinity are kept.

    Args:
        x: float32, any shape.
        noise_bits: int64 below 2^16 of that shape.
    """
    bits = ((x.view(torch.int32).long() & _LOW_32) + noise_bits) >> 16
    bits = torch.where(x.isnan(), 0x7FC0, bits)
    return bits.to(torch.int16).view(torch.bfloat16)


def _store(memory_RD: Tensor, rows: Tensor, x: Tensor, hyper: Tensor, seed: int, stream: int) -> None:
    """Writes x into some rows, rounded stochastically where the memory is bfloat16."""
    if memory_RD.dtype == torch.bfloat16:
        d = memory_RD.shape[1]
        offset = rows[:, None] * d + torch.arange(d, device=rows.device)
        x = round_stochastically(x, noise(offset, hyper[8], seed, stream))
    memory_RD[rows] = x


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
    last_R = state.last_step_R.view(-1)
    m_RD = None if state.m_RD is None else state.m_RD.view(-1, d)
    tables = (param.view(-1, d), grad.reshape(-1, d), state.v_RD.view(-1, d), m_RD)
    # A few rows at a time: what lies between reading and writing them stays in the cache.
    for rows in touched.reshape(-1).nonzero()[:, 0].split(_ROWS):
        missed_R1 = (hyper[8] - last_R[rows].to(hyper.dtype))[:, None]
        _update_rows(*tables, rows, missed_R1, hyper, state.seed)
    state.touch(touched, hyper)


def _update_rows(
    param_RD: Tensor,
    grad_RD: Tensor,
    v_RD: Tensor,
    m_RD: Tensor | None,
    rows: Tensor,
    missed_R1: Tensor,
    hyper: Tensor,
    seed: int,
) -> None:
    """Adam step on some rows that were last touched so many steps ago."""
    learning_rate, beta1, beta2, eps, correction1, correction2, log1, log2, _ = hyper.unbind()
    wide = hyper.dtype
    direction = grad = grad_RD[rows].to(wide)
    v = v_RD[rows].to(wide).mul_(_decay(log2, missed_R1)).add_((grad * grad).mul_(1.0 - beta2))
    _store(v_RD, rows, v, hyper, seed, MOMENT_2)
    if m_RD is not None:
        direction = m_RD[rows].to(wide) * _decay(log1, missed_R1) + (1.0 - beta1) * grad
        _store(m_RD, rows, direction, hyper, seed, MOMENT_1)
    # Through float64: the vectorised float32 root of PyTorch is off by a unit in the last place now and then.
    root = v.double().sqrt_().to(wide)
    rescale = 1.0 / correction2.double().sqrt().to(wide)
    step_RD = torch.div(direction, root.mul_(rescale).add_(eps)).mul_(learning_rate / correction1)
    _store(param_RD, rows, param_RD[rows].to(wide) - step_RD, hyper, seed, PARAM)
