"""Exact TopK of a row of pre-activations that reads little more of it than the selected columns.

The maxima of groups of columns bound the search: at least k columns reach the k-th largest maximum, so all columns to
select lie in the k groups with the largest maxima, lowest group first among equals. Only those are read, and of their
columns only those that reach the bound (k and a few, unless the row is clustered) are ranked. Keys are integers in the
order of the positive numbers, found bit by bit: 15 bits for bfloat16, 31 for float32, 63 for float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clt.kernels.gpu import configs
from clt.kernels.gpu.configs import SelectConfig
from clt.kernels.gpu.language import INTERPRETED, KEY_BITS, positive_key, round_to
from clt.kernels.gpu.rows import emit, fill_empty, gather_values, kth_largest, load_vectors, reaches

#: Group maxima and survivors that one warp can rank without spilling registers.
_GROUPS_PER_WARP = 4096
_SURVIVORS_PER_WARP = 512

_INTERPRET = tl.constexpr(INTERPRETED)

KEY_DTYPE = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_keys(x, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """Largest positive_key of each GROUP neighbours in a row of x [R,C], which is rounded to DTYPE: [R,C/GROUP]."""
    grouped = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    if _INTERPRET or DTYPE == tl.float64:
        # The interpreter has no fast reduction that keeps NaN, and widening loses its subnormal bfloat16.
        return tl.max(positive_key(grouped if x.dtype == DTYPE else round_to(grouped, DTYPE)), 2)
    else:
        # Widening and rounding keep the order, and a float maximum takes a third of the instructions of a key.
        return positive_key(round_to(tl.reduce(grouped.to(tl.float32), 2, _larger), DTYPE))


@triton.jit
def _group_max_kernel(
    PRE, KEYS, n_features, n_groups, n_rows, BLOCK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr
):
    """A program takes BLOCK columns of one row; grid: column chunk slow, row fast."""
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    chunk = tl.program_id(0) // n_rows
    column = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    group = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)[None, :]
    if EVEN:
        pre = tl.load(PRE + row * n_features + column)
    else:
        pre = tl.load(PRE + row * n_features + column, mask=column < n_features, other=0.0)
    keys = group_keys(pre, GROUP, PRE.dtype.element_ty)
    tl.store(KEYS + row * n_groups + group, keys.to(KEYS.dtype.element_ty), mask=group < n_groups)


@triton.jit
def _choose_groups(
    KEYS,
    CHOSEN,
    n_groups,
    k,
    KEY: tl.constexpr,
    GROUPS: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    BITS: tl.constexpr,
):
    """Stores the groups that can hold winners, ascending; returns their number and a key that all winners reach.

    The bound is the k-th largest maximum of MERGED neighbouring groups: little weaker than that of the groups and found
    in a MERGED-th of the work. Fewer than k such maxima exceed it, so fewer than MERGED * k groups do.
    """
    group = tl.arange(0, GROUPS)
    maxima = tl.load(KEYS + group, mask=group < n_groups, other=0).to(KEY)
    bound, quota = kth_largest(tl.max(tl.reshape(maxima, [GROUPS // MERGED, MERGED]), 1), k, BITS)
    # Of the groups that only reach the bound k are always enough.
    quota = k
    n_chosen = 0
    for start in range(0, n_groups, BLOCK):
        first = start + tl.arange(0, BLOCK // VECTOR) * VECTOR
        groups = first[:, None] + tl.arange(0, VECTOR)[None, :]
        key = tl.load(KEYS + groups, mask=groups < n_groups, other=0).to(KEY)
        n_above, n_tied = emit(CHOSEN, n_chosen, key > bound, key == bound, first, quota, None)
        quota -= n_tied
        n_chosen += n_above + n_tied
    return n_chosen, bound


@triton.jit
def _candidates(
    PRE, CHOSEN, start, n_candidates, n_features, GROUP: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """BLOCK candidates from `start` on [R,V], 0 beyond the last one, and the column of each row's first [R].

    GROUP 0 makes every column a candidate.
    """
    offset = tl.arange(0, BLOCK // VECTOR) * VECTOR
    exists = start + offset < n_candidates
    if GROUP == 0:
        column = start + offset
    else:
        column = tl.load(CHOSEN + start // GROUP + offset // GROUP, mask=exists, other=0) * GROUP + offset % GROUP
    return load_vectors(PRE, column, exists, n_features, VECTOR), column


@triton.jit
def _rank_survivors(PRE, SURVIVORS, VALUES, INDICES, n_found, k, CAPACITY: tl.constexpr, BITS: tl.constexpr):
    """Stores the k largest of at most CAPACITY survivors; returns their number."""
    slot = tl.arange(0, CAPACITY)
    column = tl.load(SURVIVORS + slot, mask=slot < n_found, other=0)
    pre = tl.load(PRE + column, mask=slot < n_found, other=0.0)
    key = positive_key(pre)
    level, quota = kth_largest(key, k, BITS)
    above, tied = key > level, key == level
    # One scan counts both kinds, in the halves of an integer.
    running = tl.cumsum((above.to(tl.int32) << 16) | tied.to(tl.int32), 0)
    rank = running & 0xFFFF
    taken = above | (tied & (rank <= quota))
    place = (running >> 16) + tl.minimum(rank, quota) - 1
    tl.store(INDICES + place, column, mask=taken)
    tl.store(VALUES + place, pre, mask=taken)
    return tl.minimum(n_found, k)


@triton.jit
def _rank_candidates(
    PRE,
    CHOSEN,
    VALUES,
    INDICES,
    n_candidates,
    n_features,
    k,
    KEY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Stores the k largest of any number of candidates, read again for every bit; returns their number."""
    level = tl.zeros([], KEY)
    quota = k
    for bit in range(BITS):
        higher = level | (tl.full([], 1, KEY) << (BITS - 1 - bit))
        n_reach = 0
        for start in range(0, n_candidates, BLOCK):
            pre, column = _candidates(PRE, CHOSEN, start, n_candidates, n_features, GROUP, BLOCK, VECTOR)
            n_reach += tl.sum(tl.sum((positive_key(pre) >= higher).to(tl.int32), 1), 0)
        quota = tl.where(n_reach >= k, quota, k - n_reach)
        level = tl.where(n_reach >= k, higher, level)
    quota = tl.where(level == 0, k, quota)
    level = tl.maximum(level, 1)
    n_filled = 0
    for start in range(0, n_candidates, BLOCK):
        pre, column = _candidates(PRE, CHOSEN, start, n_candidates, n_features, GROUP, BLOCK, VECTOR)
        key = positive_key(pre)
        n_above, n_tied = emit(INDICES, n_filled, key > level, key == level, column, quota, None)
        quota -= n_tied
        n_filled += n_above + n_tied
    tl.debug_barrier()
    gather_values(PRE, VALUES, INDICES, n_filled, BLOCK // VECTOR)
    return n_filled


@triton.jit(do_not_specialize=["k"])
def _select_kernel(
    PRE,
    KEYS,
    CHOSEN,
    SURVIVORS,
    VALUES,
    INDICES,
    n_features,
    n_groups,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    CAPACITY: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
):
    """A program selects from one row; grid: row.

    GROUP 0: all columns are candidates, else those of the groups with the largest maxima.
    """
    row = tl.program_id(0).to(tl.int64)
    PRE += row * n_features
    CHOSEN += row * k * (MERGED + 1)
    SURVIVORS += row * (CAPACITY + BLOCK)
    VALUES += row * k
    INDICES += row * k

    if GROUP == 0:
        # Every positive key.
        bound = tl.full([], 1, KEY)
        n_candidates = n_features
    else:
        n_chosen, bound = _choose_groups(
            KEYS + row * n_groups, CHOSEN, n_groups, k, KEY, GROUPS, MERGED, BLOCK, VECTOR, BITS
        )
        n_candidates = n_chosen * GROUP
        tl.debug_barrier()

    n_found = 0
    for start in range(0, n_candidates, BLOCK):
        pre, column = _candidates(PRE, CHOSEN, start, n_candidates, n_features, GROUP, BLOCK, VECTOR)
        # One block fits beyond the capacity, so that stores need no mask against it.
        n_above, _ = emit(SURVIVORS, tl.minimum(n_found, CAPACITY), reaches(pre, bound), None, column, 0, None)
        n_found += n_above
    tl.debug_barrier()

    if n_found <= CAPACITY:
        n_filled = _rank_survivors(PRE, SURVIVORS, VALUES, INDICES, n_found, k, CAPACITY, BITS)
    else:
        # Many ties or a clustered row.
        n_filled = _rank_candidates(
            PRE, CHOSEN, VALUES, INDICES, n_candidates, n_features, k, KEY, GROUP, BLOCK, BITS, VECTOR
        )
    fill_empty(VALUES, INDICES, n_filled, k, BLOCK // VECTOR)


def group_max(pre_BF: Tensor, config: SelectConfig | None = None) -> Tensor:
    """Largest key of each group of neighbouring columns, in one read.

    Args:
        pre_BF: [B,F] pre-activations.
        config: launch settings, of which only `group` is used; None for those of the table for k = 1.

    Returns:
        [B,G] int16, int32 or int64: `positive_key` of the maximum of each `config.group` columns, G = ceil(F / group).
    """
    n_rows, n_features = pre_BF.shape
    config = config or configs.select_config(pre_BF.dtype, n_features, 1)
    n_groups = triton.cdiv(n_features, config.group)
    keys_BG = torch.empty(n_rows, n_groups, dtype=KEY_DTYPE[pre_BF.dtype], device=pre_BF.device)
    num_warps = 4
    # Eight loads of 16 bytes are in flight in every lane.
    block = max(config.group, min(num_warps * 4096 // pre_BF.element_size(), triton.next_power_of_2(n_features)))
    _group_max_kernel[(n_rows * triton.cdiv(n_features, block),)](
        pre_BF.contiguous(),
        keys_BG,
        n_features,
        n_groups,
        n_rows,
        BLOCK=block,
        GROUP=config.group,
        EVEN=n_features % block == 0,
        num_warps=num_warps,
    )
    return keys_BG


def select_topk(
    pre_BF: Tensor, k: int, keys_BG: Tensor | None = None, config: SelectConfig | None = None
) -> tuple[Tensor, Tensor]:
    """TopK(ReLU(pre)), bit for bit `reference.select_topk`.

    Args:
        pre_BF: [B,F] pre-activations, bfloat16, float32 or float64.
        k: slots per token, 1 <= k <= F.
        keys_BG: from `group_max` with the same config; None computes it where it is needed.
        config: launch settings; None for those of the table.

    Returns:
        values [B,K] as in pre, and indices [B,K] int32, ascending, empty slots last as (0, 0).
    """
    n_rows, n_features = pre_BF.shape
    config = config or configs.select_config(pre_BF.dtype, n_features, k)
    pre_BF = pre_BF.contiguous()
    n_groups = triton.cdiv(n_features, config.group)
    # Where every group would be chosen, or their maxima do not fit in registers, all columns are candidates.
    bounded = k < n_groups <= _GROUPS_PER_WARP * config.num_warps
    if bounded and keys_BG is None:
        keys_BG = group_max(pre_BF, config)
    group = config.group if bounded else 0
    # Four times k merged maxima keep the bound within a few per cent of the groups' own.
    merged = max(1, min(8, _power_of_two_below(n_groups // (4 * k))))
    vector = min(16 // pre_BF.element_size(), group or triton.next_power_of_2(n_features))
    block = max(group, 32 * config.num_warps * vector)
    capacity = min(max(64, triton.next_power_of_2(2 * k)), _SURVIVORS_PER_WARP * config.num_warps)
    values_BK = torch.empty(n_rows, k, dtype=pre_BF.dtype, device=pre_BF.device)
    indices_BK = torch.empty(n_rows, k, dtype=torch.int32, device=pre_BF.device)
    chosen = torch.empty(n_rows, (merged + 1) * k if bounded else 0, dtype=torch.int32, device=pre_BF.device)
    survivors = torch.empty(n_rows, capacity + block, dtype=torch.int32, device=pre_BF.device)
    _select_kernel[(n_rows,)](
        pre_BF,
        keys_BG,
        chosen,
        survivors,
        values_BK,
        indices_BK,
        n_features,
        n_groups,
        k,
        GROUP=group,
        GROUPS=triton.next_power_of_2(n_groups),
        MERGED=merged,
        BLOCK=block,
        VECTOR=vector,
        CAPACITY=capacity,
        KEY=tl.int64 if pre_BF.dtype == torch.float64 else tl.int32,
        BITS=KEY_BITS[pre_BF.dtype],
        num_warps=config.num_warps,
    )
    return values_BK, indices_BK


def _power_of_two_below(n: int) -> int:
    """The largest power of two up to n, 0 for n = 0."""
    return 1 << (n.bit_length() - 1) if n else 0
