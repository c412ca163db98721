"""Row-sparse Adam in Triton: the update of one row chunk that backward kernels finish with, and a kernel of its own.

The formula, its laziness and its rounding are those of `clt.kernels.adam`, which is the specification. Learning rate,
step and the rest of the hyper-parameters are read from device memory, so that a captured graph follows a schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clt.kernels import adam
from clt.kernels.adam import RowAdamState
from clt.kernels.configs import GatherConfig, gather_config
from clt.kernels.language import ACCUMULATOR

_PARAM = tl.constexpr(adam.PARAM)
_MOMENT_2 = tl.constexpr(adam.MOMENT_2)
_MOMENT_1 = tl.constexpr(adam.MOMENT_1)
_MULTIPLIER_1 = tl.constexpr(adam.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(adam.MULTIPLIER_2)
_MULTIPLIER_3 = tl.constexpr(adam.MULTIPLIER_3)


@triton.jit
def _mix(x):
    """`clt.kernels.adam.mix` on uint32."""
    x = (x ^ (x >> 16)) * _MULTIPLIER_1
    x = (x ^ (x >> 15)) * _MULTIPLIER_2
    return x ^ (x >> 15)


@triton.jit
def _noise(offset, step, seed, STREAM: tl.constexpr):
    """`clt.kernels.adam.noise` in a uint32; the work before `key` enters is shared by the streams."""
    own = _mix(tl.cast(seed, tl.uint32))
    key = _mix(own + step.to(tl.int32).to(tl.uint32) * 4 + STREAM)
    return ((_mix(offset.to(tl.uint32) ^ own) ^ key) * _MULTIPLIER_3) >> 16


@triton.jit
def _store(POINTER, offset, x, mask, step, seed, STREAM: tl.constexpr):
    """Stores x at POINTER + offset, rounded stochastically where the memory is bfloat16."""
    if POINTER.dtype.element_ty == tl.bfloat16:
        # Noise added below the last kept bit carries with the probability that makes the mean right, for either sign.
        noise = _noise(offset, step, seed, STREAM)
        bits = (x.to(tl.float32).to(tl.uint32, bitcast=True) + noise) >> 16
        bits = tl.where(x != x, 0x7FC0, bits)
        tl.store(POINTER + offset, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(POINTER + offset, x, mask=mask)


@triton.jit
def _decay(log2_beta, steps, ACC: tl.constexpr):
    """beta ** steps of one row, in float64: the fast float32 exp2 errs the same way at every touch."""
    return tl.exp2(steps.to(tl.float64) * log2_beta.to(tl.float64)).to(ACC)


@triton.jit
def update_row(w, grad, V, M, offset, mask, HYPER, last, seed, HAS_M: tl.constexpr, ACC: tl.constexpr):
    """Adam on a block of one row: brings its moments up to date in memory and returns the new parameters.

    Args:
        w: [BLOCK] parameters, widened to ACC.
        grad: [BLOCK] gradient in ACC.
        V: second moments, float32, float64 or bfloat16, laid out like the parameter.
        M: first moments likewise; not looked at unless HAS_M.
        offset: [BLOCK] int64 element numbers within the whole parameter.
        mask: [BLOCK] bool of elements inside the row, or None for all.
        HYPER: nine numbers in ACC, see `RowAdam.hyper`.
        last: int32 step at which the row was touched before, 0 for never.
        seed: int32 of the stochastic rounding.
        HAS_M: whether beta1 > 0.
        ACC: float32 or float64.

    Returns:
        [BLOCK] new parameters in ACC; `store_param` writes them.
    """
    # All loads come before the first store: the compiler cannot tell the pointers apart and would wait for it.
    v = tl.load(V + offset, mask=mask).to(ACC)
    step = tl.load(HYPER + 8)
    missed = step - tl.cast(last, ACC)
    step_size = tl.load(HYPER) / tl.load(HYPER + 4)
    rescale = 1.0 / tl.sqrt(tl.load(HYPER + 5))
    eps = tl.load(HYPER + 3)
    direction = grad
    if HAS_M:
        m = tl.load(M + offset, mask=mask).to(ACC)
        direction = m * _decay(tl.load(HYPER + 6), missed, ACC) + (1.0 - tl.load(HYPER + 1)) * grad
    v = v * _decay(tl.load(HYPER + 7), missed, ACC) + (1.0 - tl.load(HYPER + 2)) * (grad * grad)
    _store(V, offset, v, mask, step, seed, _MOMENT_2)
    if HAS_M:
        _store(M, offset, direction, mask, step, seed, _MOMENT_1)
    return w - step_size * (direction / (tl.sqrt(v) * rescale + eps))


@triton.jit
def store_param(W, offset, w, mask, HYPER, seed):
    """Stores new parameters w [BLOCK] at W + offset, rounded stochastically where W is bfloat16.

    Args:
        W: parameter, float32, float64 or bfloat16.
        offset: [BLOCK] int64 element numbers within the whole parameter.
        w: [BLOCK] what `update_row` returned.
        mask: [BLOCK] bool, or None for all.
        HYPER: nine numbers, see `RowAdam.hyper`.
        seed: int32 of the stochastic rounding.
    """
    _store(W, offset, w, mask, tl.load(HYPER + 8), seed, _PARAM)


@triton.jit(do_not_specialize=["seed"])
def _row_adam_kernel(
    W,
    GRAD,
    V,
    M,
    LAST,
    TOUCHED,
    HYPER,
    seed,
    D,
    chunks,
    HAS_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Updates BLOCK_D columns of one row if it is touched. Grid: one axis, chunk of columns fast, row slow.

    Nothing is read twice here, so neighbouring programs read neighbouring memory, unlike in the gathering kernels.
    """
    pid = tl.program_id(0)
    row = pid // chunks
    if tl.load(TOUCHED + row) != 0:
        columns = (pid % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = None if EVEN_D else columns < D
        offset = row.to(tl.int64) * D + columns
        w = tl.load(W + offset, mask=mask).to(ACC)
        grad = tl.load(GRAD + offset, mask=mask).to(ACC)
        w = update_row(w, grad, V, M, offset, mask, HYPER, tl.load(LAST + row), seed, HAS_M, ACC)
        store_param(W, offset, w, mask, HYPER, seed)


def row_adam_(
    param: Tensor,
    grad: Tensor,
    state: RowAdamState,
    hyper: Tensor,
    touched: Tensor,
    config: GatherConfig | None = None,
) -> None:
    """Adam step on the touched rows of a parameter, in place, as `clt.kernels.adam.row_adam_`.

    Args:
        param: [..,F,D] parameter, contiguous; float32, float64 or bfloat16 (rounded stochastically).
        grad: [..,F,D] gradient; untouched rows are not read.
        state: moments of the parameter; moved to this step for touched rows.
        hyper: [9] from `RowAdam.hyper`.
        touched: [..,F] bool, rows to update.
        config: launch settings, None for those of the table.
    """
    d = param.shape[-1]
    assert param.is_contiguous() and state.v_RD.is_contiguous() and (state.m_RD is None or state.m_RD.is_contiguous())
    config = config or gather_config("row_adam", param.dtype, d)
    chunks = triton.cdiv(d, config.block_d)
    _row_adam_kernel[(touched.numel() * chunks,)](
        param,
        grad.contiguous(),
        state.v_RD,
        state.v_RD if state.m_RD is None else state.m_RD,
        state.last_step_R,
        touched.contiguous().view(torch.uint8),
        hyper,
        state.seed,
        d,
        chunks,
        HAS_M=state.m_RD is not None,
        EVEN_D=d % config.block_d == 0,
        BLOCK_D=config.block_d,
        ACC=ACCUMULATOR[param.dtype],
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    state.touch(touched, hyper)
