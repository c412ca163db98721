"""Row-sparse Adam in Triton: the update of one row chunk that backward kernels finish with, and a kernel of its own.

`adam`, `storage` and `packed` of clt.kernels.common are the specification of the update, of its rounding and of 8-bit
moments. Learning rate, step and the other hyper-parameters are read from device memory, so that a captured CUDA graph
follows a schedule.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from clt.kernels.common import packed, storage
from clt.kernels.common.adam import RowAdamState
from clt.kernels.gpu.configs import GatherConfig, gather_config
from clt.kernels.gpu.language import ACCUMULATOR

_PARAM = tl.constexpr(storage.PARAM)
_MOMENT_2 = tl.constexpr(storage.MOMENT_2)
_MOMENT_1 = tl.constexpr(storage.MOMENT_1)
_MULTIPLIER_1 = tl.constexpr(storage.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(storage.MULTIPLIER_2)
_MULTIPLIER_3 = tl.constexpr(storage.MULTIPLIER_3)
_GROUP = tl.constexpr(packed.GROUP)
_BROKEN = tl.constexpr(packed.BROKEN)
_KEPT = tl.constexpr(packed.MANTISSA_BITS)
_UNITS = tl.constexpr(1 << packed.MANTISSA_BITS)
_DROPPED = tl.constexpr(packed.DROPPED_BITS)
# Octaves that codes reach: of second moments, then of first ones, which are signed.
_REACH = tl.constexpr(tuple(packed.reach(signed) for signed in (False, True)))


@triton.jit
def _mix(x):
    """`storage.mix` on uint32."""
    x = (x ^ (x >> 16)) * _MULTIPLIER_1
    x = (x ^ (x >> 15)) * _MULTIPLIER_2
    return x ^ (x >> 15)


@triton.jit
def _noise(offset, step, seed, STREAM: tl.constexpr, BITS: tl.constexpr):
    """`storage.noise` in a uint32; the work before `key` enters is shared by the streams."""
    own = _mix(tl.cast(seed, tl.uint32))
    key = _mix(own + step.to(tl.int32).to(tl.uint32) * 4 + STREAM)
    return ((_mix(offset.to(tl.uint32) ^ own) ^ key) * _MULTIPLIER_3) >> (32 - BITS)


@triton.jit
def _store(POINTER, offset, x, mask, step, seed, STREAM: tl.constexpr):
    """Stores x at POINTER + offset, rounded stochastically where the memory is bfloat16."""
    if POINTER.dtype.element_ty == tl.bfloat16:
        # Noise added below the last kept bit carries with the probability of unbiased rounding, for either sign.
        noise = _noise(offset, step, seed, STREAM, 16)
        bits = (x.to(tl.float32).to(tl.uint32, bitcast=True) + noise) >> 16
        bits = tl.where(x != x, 0x7FC0, bits)
        tl.store(POINTER + offset, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(POINTER + offset, x, mask=mask)


@triton.jit
def _groups(place):
    """Places of the exponents of a block's groups, and which of the groups lie inside the row."""
    offset, _, row, chunk, D = place
    GROUPS: tl.constexpr = offset.shape[0] // _GROUP
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    n_groups = tl.cdiv(D, _GROUP)
    return row * n_groups + group, group < n_groups


@triton.jit
def _spread(exponent, SIGNED: tl.constexpr):
    """Units of code 0, for each column of the groups with these exponents; see `packed`."""
    GROUPS: tl.constexpr = exponent.shape[0]
    origin = (exponent - _REACH[SIGNED]) * _UNITS
    return tl.reshape(tl.broadcast_to(origin[:, None], [GROUPS, _GROUP]), [GROUPS * _GROUP])


@triton.jit
def _load_moment(NUMBERS, EXPONENTS, place, SIGNED: tl.constexpr, ACC: tl.constexpr):
    """Moments in ACC; with EXPONENTS they are `packed.unpack` of codes."""
    offset, mask, _, _, _ = place
    if EXPONENTS is None:
        return tl.load(NUMBERS + offset, mask=mask).to(ACC)
    else:
        group, group_mask = _groups(place)
        code = tl.load(NUMBERS + offset, mask=mask).to(tl.int32)
        origin = _spread(tl.load(EXPONENTS + group, mask=group_mask).to(tl.int32), SIGNED)
        size = code
        if SIGNED:
            size = code & 0x7F
        bits = tl.where(size == 0, 0, (size + origin) << _DROPPED)
        if SIGNED:
            bits |= (code >> 7) << 31
        is_broken = origin == (_BROKEN - _REACH[SIGNED]) * _UNITS
        return tl.where(is_broken, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _store_moment(NUMBERS, EXPONENTS, place, x, step, seed, STREAM: tl.constexpr):
    """Stores moments, rounded stochastically where they are bfloat16 or, with EXPONENTS, `packed.pack`."""
    offset, mask, _, _, _ = place
    if EXPONENTS is None:
        _store(NUMBERS, offset, x, mask, step, seed, STREAM)
    else:
        SIGNED: tl.constexpr = STREAM == _MOMENT_1
        SMALLEST: tl.constexpr = 0 if SIGNED else 1
        bits = x.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7F800000)
        if mask is not None:
            magnitude = tl.where(mask, magnitude, 0)
        noise = _noise(offset, step, seed, STREAM, _DROPPED).to(tl.int32)
        units = tl.where(magnitude == 0, 0, tl.maximum((magnitude + noise) >> _DROPPED, SMALLEST))
        largest = tl.max(tl.reshape(units, [offset.shape[0] // _GROUP, _GROUP]), axis=1)
        exponent = largest >> _KEPT
        code = tl.where(units == 0, 0, tl.maximum(units - _spread(exponent, SIGNED), SMALLEST))
        if SIGNED:
            code |= (bits >> 24) & 0x80
        group, group_mask = _groups(place)
        tl.store(NUMBERS + offset, code.to(tl.uint8), mask=mask)
        tl.store(EXPONENTS + group, exponent.to(tl.uint8), mask=group_mask)


@triton.jit
def _decay(log2_beta, steps, ACC: tl.constexpr):
    """beta ** steps of one row, in float64: the fast float32 exp2 errs the same way at every touch."""
    return tl.exp2(steps.to(tl.float64) * log2_beta.to(tl.float64)).to(ACC)


@triton.jit
def update_row(w, grad, moments, offset, mask, row, chunk, D, HYPER, last, seed, ACC: tl.constexpr):
    """Adam on a block of one row: updates its moments in memory and returns the new parameters.

    Args:
        w: [BLOCK] parameters, widened to ACC.
        grad: [BLOCK] gradient in ACC.
        moments: V, V_EXPONENTS, M and M_EXPONENTS: second and first moments, laid out like the parameter, and the
            exponents of uint8 codes, None without codes; M is None iff beta1 is 0. A block of codes holds whole groups.
        offset: [BLOCK] int64 element numbers within the whole parameter.
        mask: [BLOCK] bool of elements inside the row, or None for all.
        row: int64 number of the row.
        chunk: number of the block within it.
        D: columns of the row.
        HYPER: nine numbers in ACC, see `RowAdam.hyper`.
        last: int32 step at which the row was touched before, 0 for never.
        seed: int32 of the stochastic rounding.
        ACC: float32 or float64.

    Returns:
        [BLOCK] new parameters in ACC; `store_param` writes them.
    """
    V, V_EXPONENTS, M, M_EXPONENTS = moments
    place = (offset, mask, row, chunk, D)
    # All loads come before the first store: the compiler cannot tell the pointers apart and would wait for it.
    v = _load_moment(V, V_EXPONENTS, place, False, ACC)
    step = tl.load(HYPER + 8)
    missed = step - tl.cast(last, ACC)
    step_size = tl.load(HYPER) / tl.load(HYPER + 4)
    rescale = 1.0 / tl.sqrt(tl.load(HYPER + 5))
    eps = tl.load(HYPER + 3)
    direction = grad
    if M is not None:
        m = _load_moment(M, M_EXPONENTS, place, True, ACC)
        direction = m * _decay(tl.load(HYPER + 6), missed, ACC) + (1.0 - tl.load(HYPER + 1)) * grad
    v = v * _decay(tl.load(HYPER + 7), missed, ACC) + (1.0 - tl.load(HYPER + 2)) * (grad * grad)
    _store_moment(V, V_EXPONENTS, place, v, step, seed, _MOMENT_2)
    if M is not None:
        _store_moment(M, M_EXPONENTS, place, direction, step, seed, _MOMENT_1)
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
    V_EXPONENTS,
    M,
    M_EXPONENTS,
    LAST,
    TOUCHED,
    HYPER,
    seed,
    D,
    chunks,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Updates BLOCK_D columns of one row if it is touched. Grid: one axis, chunk of columns fast, row slow.

    Nothing is read twice here, so neighbouring programs read neighbouring memory, unlike in the gathering kernels.
    """
    pid = tl.program_id(0)
    row = (pid // chunks).to(tl.int64)
    chunk = pid % chunks
    if tl.load(TOUCHED + row) != 0:
        columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = None if EVEN_D else columns < D
        offset = row * D + columns
        w = tl.load(W + offset, mask=mask).to(ACC)
        grad = tl.load(GRAD + offset, mask=mask).to(ACC)
        moments = (V, V_EXPONENTS, M, M_EXPONENTS)
        w = update_row(w, grad, moments, offset, mask, row, chunk, D, HYPER, tl.load(LAST + row), seed, ACC)
        store_param(W, offset, w, mask, HYPER, seed)


def whole_groups(config: GatherConfig, state: RowAdamState | None) -> GatherConfig:
    """Settings whose blocks hold whole groups, where the moments of a state are codes: a group has one writer."""
    if state is None or state.v_exponents_RG is None:
        return config
    return dataclasses.replace(config, block_d=max(packed.GROUP, config.block_d))


def moment_tensors(state: RowAdamState | None) -> tuple[Tensor | None, ...]:
    """Arguments of `update_row` for the moments; None without a state."""
    if state is None:
        return None, None, None, None
    return state.v_RD, state.v_exponents_RG, state.m_RD, state.m_exponents_RG


def row_adam_(
    param: Tensor,
    grad: Tensor,
    state: RowAdamState,
    hyper: Tensor,
    touched: Tensor,
    config: GatherConfig | None = None,
) -> None:
    """Adam step on the touched rows of a parameter, in place, as `clt.kernels.common.adam.row_adam_`.

    Args:
        param: [..,F,D] parameter, contiguous; float32, float64 or bfloat16 (rounded stochastically).
        grad: [..,F,D] gradient; untouched rows are not read.
        state: moments of the parameter; moved to this step for touched rows.
        hyper: [9] from `RowAdam.hyper`.
        touched: [..,F] bool, rows to update.
        config: launch settings, None for those of the table.
    """
    d = param.shape[-1]
    assert all(tensor is None or tensor.is_contiguous() for tensor in (param, *moment_tensors(state)))
    config = whole_groups(config or gather_config("row_adam", param.dtype, d), state)
    chunks = triton.cdiv(d, config.block_d)
    _row_adam_kernel[(touched.numel() * chunks,)](
        param,
        grad.contiguous(),
        *moment_tensors(state),
        state.last_step_R,
        touched.contiguous().view(torch.uint8),
        hyper,
        state.seed,
        d,
        chunks,
        EVEN_D=d % config.block_d == 0,
        BLOCK_D=config.block_d,
        ACC=ACCUMULATOR[param.dtype],
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    state.touch(touched, hyper)
