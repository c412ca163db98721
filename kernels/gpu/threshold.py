"""BatchTopK: the n largest positive pre-activations of a whole batch, any number per token.

The threshold is found digit by digit from histograms of the keys, eight bits at a time, so that processes that hold
parts of a batch can add their counts. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from clt.kernels.gpu.language import KEY_BITS, positive_key
from clt.kernels.gpu.rows import emit, fill_empty, gather_values, load_vectors, reaches
from clt.kernels.gpu.select import KEY_DTYPE

#: Values of one digit.
_BINS = 256
#: Programs that share the counting; each holds a row of a table of partial counts.
_COUNTERS = 1024


@triton.jit
def _histogram_kernel(
    PRE,
    PREFIX,
    COUNTS,
    n_elements,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program counts a digit of the keys that begin with a prefix, in interleaved blocks; grid: table row."""
    prefix = tl.load(PREFIX)
    counts = tl.zeros([BINS], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n_elements, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = positive_key(tl.load(PRE + at, mask=at < n_elements, other=0.0))
        digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        counts += tl.histogram(digit, BINS, mask=(at < n_elements) & ((key >> (SHIFT + WIDTH)) == prefix))
    tl.store(COUNTS + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


def batch_threshold(pre_BF: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The n-th largest positive pre-activation and how many equal to it are among the n largest.

    Args:
        pre_BF: [B,F] pre-activations, all of the batch or this process's part.
        n: activations wanted of the whole batch, at most its B*F.
        reduce: given the [256] int64 counts of one digit, returns their sum over all processes; called once per digit:
            twice for bfloat16, four times for float32, eight for float64. None: this is the whole batch.

    Returns:
        threshold [] of the dtype of pre, 0 when fewer than n are positive, and quota [] int64: entries equal to the
        threshold to take, of the whole batch.
    """
    pre_BF = pre_BF.contiguous()
    block = 16384 // pre_BF.element_size()
    counters = min(_COUNTERS, triton.cdiv(pre_BF.numel(), block))
    prefix = torch.zeros((), dtype=torch.int64, device=pre_BF.device)
    wanted = torch.full((), n, dtype=torch.int64, device=pre_BF.device)
    shift = KEY_BITS[pre_BF.dtype]
    while shift > 0:
        width = min(8, shift)
        shift -= width
        counts_PV = torch.empty(counters, _BINS, dtype=torch.int32, device=pre_BF.device)
        _histogram_kernel[(counters,)](
            pre_BF, prefix, counts_PV, pre_BF.numel(), SHIFT=shift, WIDTH=width, BINS=_BINS, BLOCK=block, num_warps=4
        )
        counts_V = counts_PV.sum(dim=0, dtype=torch.int64)
        if reduce is not None:
            counts_V = reduce(counts_V)
        n_reach_V = counts_V.flip(0).cumsum(0).flip(0)
        digit = (n_reach_V >= wanted).sum() - 1
        # By gather: an index that is a tensor would be read back to the host.
        n_above = torch.nn.functional.pad(n_reach_V, (0, 1)).gather(0, (digit + 1)[None])[0]
        wanted = wanted - n_above
        prefix = (prefix << width) | digit
    threshold = prefix.to(KEY_DTYPE[pre_BF.dtype]).view(pre_BF.dtype)
    return threshold, torch.where(prefix == 0, 0, wanted)


@triton.jit
def _count_equal_kernel(PRE, THRESHOLD, COUNTS, n_features, BLOCK: tl.constexpr):
    """A program counts the positive entries of one row that equal the threshold; grid: row."""
    row = tl.program_id(0).to(tl.int64)
    level = positive_key(tl.load(THRESHOLD))
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = positive_key(tl.load(PRE + row * n_features + column, mask=column < n_features, other=0.0))
        counts += ((key == level) & (key > 0)).to(tl.int32)
    tl.store(COUNTS + row, tl.sum(counts, 0))


@triton.jit(do_not_specialize=["capacity"])
def _select_above_kernel(
    PRE,
    THRESHOLD,
    QUOTA,
    VALUES,
    INDICES,
    COUNTS,
    n_features,
    capacity,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program selects from one row what is above the threshold and the first QUOTA[row] equal to it; grid: row."""
    row = tl.program_id(0).to(tl.int64)
    PRE += row * n_features
    VALUES += row * capacity
    INDICES += row * capacity
    level = positive_key(tl.load(THRESHOLD))
    quota = tl.load(QUOTA + row)
    n_found = 0
    for start in range(0, n_features, BLOCK):
        column = start + tl.arange(0, BLOCK // VECTOR) * VECTOR
        pre = load_vectors(PRE, column, column < n_features, n_features, VECTOR)
        # Most blocks hold nothing.
        if tl.sum(tl.sum(reaches(pre, level).to(tl.int32), 1), 0) > 0:
            key = positive_key(pre)
            n_above, n_tied = emit(INDICES, n_found, key > level, (key == level) & (key > 0), column, quota, capacity)
            quota -= n_tied
            n_found += n_above + n_tied
    tl.store(COUNTS + row, n_found)
    tl.debug_barrier()
    n_filled = tl.minimum(n_found, capacity)
    gather_values(PRE, VALUES, INDICES, n_filled, BLOCK // VECTOR)
    fill_empty(VALUES, INDICES, n_filled, capacity, BLOCK // VECTOR)


def select_above(pre_BF: Tensor, threshold: Tensor, quota: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positive pre-activations above a threshold, and the first `quota` equal to it in (token, feature) order.

    Args:
        pre_BF: [B,F] pre-activations.
        threshold: [] of the same dtype, as from `batch_threshold`.
        quota: [] int64.
        capacity: slots per token, C.

    Returns:
        values [B,C] and indices [B,C] int32, ascending, empty slots last as (0, 0), and counts [B] int32 of all
        selected; where a count exceeds C the lowest feature numbers were kept.
    """
    pre_BF = pre_BF.contiguous()
    n_rows, n_features = pre_BF.shape
    vector = 16 // pre_BF.element_size()
    equal_B = torch.empty(n_rows, dtype=torch.int32, device=pre_BF.device)
    _count_equal_kernel[(n_rows,)](pre_BF, threshold, equal_B, n_features, BLOCK=256 * vector, num_warps=4)
    quota_B = (quota - (equal_B.cumsum(0) - equal_B)).clamp(min=0).minimum(equal_B).int()
    values_BC = torch.empty(n_rows, capacity, dtype=pre_BF.dtype, device=pre_BF.device)
    indices_BC = torch.empty(n_rows, capacity, dtype=torch.int32, device=pre_BF.device)
    counts_B = torch.empty(n_rows, dtype=torch.int32, device=pre_BF.device)
    _select_above_kernel[(n_rows,)](
        pre_BF,
        threshold,
        quota_B,
        values_BC,
        indices_BC,
        counts_B,
        n_features,
        capacity,
        BLOCK=64 * vector,
        VECTOR=vector,
        num_warps=1,
    )
    return values_BC, indices_BC, counts_B
