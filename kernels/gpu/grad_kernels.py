"""Kernels of `clt.kernels.gpu.grad`: sums over the slots of a feature, sums of its parts, sums of dot products."""

import triton
import triton.language as tl

from clt.kernels.gpu.language import load_columns, round_to, widen
from clt.kernels.gpu.optim import store_param, update_row


@triton.jit
def _add_entries(acc, total, w, entry, tables, columns, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc + coefficient * row and total + coefficient of COUNT entries; stores each row's dot product with w.

    All loads come before the first store, which the compiler could not move them across.
    """
    ROWS, COEFFICIENTS, WEIGHTS, SLOTS, TOKENS, DOTS = tables
    slots = ()
    coefficients = ()
    rows = ()
    for i in tl.static_range(COUNT):
        token = tl.load(TOKENS + entry + i).to(tl.int64)
        slot = tl.load(SLOTS + entry + i)
        coefficient = tl.load(COEFFICIENTS + slot).to(acc.dtype)
        if WEIGHTS is not None:
            coefficient *= tl.load(WEIGHTS + token).to(acc.dtype)
        slots = slots + (slot,)
        coefficients = coefficients + (coefficient,)
        rows = rows + (load_columns(ROWS + token * D, columns, D, BLOCK_D),)
    for i in tl.static_range(COUNT):
        row = widen(rows[i], acc.dtype)
        acc = tl.fma(coefficients[i], row, acc)
        total += coefficients[i]
        if DOTS is not None:
            tl.store(DOTS + slots[i], tl.sum(row * w, 0))
    return acc, total


@triton.jit
def _finish_row(acc, total, row, chunk, columns, outputs, adam, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the finished sum of a feature, or moves its weights by it; chunk 0 also stores the bias gradient."""
    SCALE, W, GRAD_W, GRAD_BIAS = outputs
    moments, LAST_STEP, HYPER, seed = adam
    if SCALE is not None:
        acc *= tl.load(SCALE).to(acc.dtype)
    if D % BLOCK_D == 0:
        mask = None
    else:
        mask = columns < D
    offset = row * D + columns
    if GRAD_W is not None:
        tl.store(GRAD_W + offset, round_to(acc, GRAD_W.dtype.element_ty), mask=mask)
    if HYPER is not None:
        w = tl.load(W + offset, mask=mask).to(acc.dtype)
        last = tl.load(LAST_STEP + row)
        w = update_row(w, acc, moments, offset, mask, row, chunk, D, HYPER, last, seed, acc.dtype)
        store_param(W, offset, w, mask, HYPER, seed)
    if GRAD_BIAS is not None:
        tl.store(GRAD_BIAS + row, round_to(total, GRAD_BIAS.dtype.element_ty), mask=chunk == 0)


@triton.jit(do_not_specialize=["seed", "first_source", "n_slots", "n_features", "n_spills", "split"])
def feature_kernel(
    ROWS,
    COEFFICIENTS,
    WEIGHTS,
    SCALE,
    W,
    GRAD_W,
    GRAD_BIAS,
    DOTS,
    PARTS,
    PART_TOTALS,
    BOUNDS,
    SLOTS,
    TOKENS,
    SPILL_BOUNDS,
    SPILL_FEATURE,
    V,
    V_EXPONENTS,
    M,
    M_EXPONENTS,
    LAST_STEP,
    HYPER,
    seed,
    first_source,
    n_slots,
    n_features,
    n_spills,
    split,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: BLOCK_D columns of the sum over at most `split` entries of one feature of one source.

    Grid: part fast, then source, then column chunk. Parts are the Q further parts of long features, which are full,
    then the first part of every feature. ROWS [B,D] are gathered and multiplied by COEFFICIENTS [S,N]. A feature of one
    part is finished here; the parts of a longer one go to PARTS [sources of this launch,2Q,D], further part q to row q,
    the first to row Q + first q. DOTS [chunks,sources of this launch,N] receives each row's product with the feature's
    columns of W, at the slot. Without DOTS, or without PARTS, that half of the work is left out.
    """
    part = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2)
    n_sources = tl.num_programs(1)
    source = first_source + local
    further = part < n_spills
    spilled = tl.load(SPILL_FEATURE + source * n_spills + part, mask=further, other=0)
    feature = tl.where(further, spilled, part - n_spills)
    if feature >= n_features:
        return
    bound = source * (n_features + 1) + feature
    entry = tl.load(BOUNDS + bound)
    stop = tl.load(BOUNDS + bound + 1)
    # Without entries the gradient is 0, and under Adam the row stays as it is.
    if HYPER is not None:
        if entry == stop:
            return
    long = stop - entry > split
    spill = tl.load(SPILL_BOUNDS + bound, mask=long, other=0)
    entry += tl.where(further, part - spill + 1, 0) * split
    stop = tl.minimum(entry + split, stop)

    columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    row = source * n_features + feature
    w = 0.0
    if DOTS is not None:
        w = widen(load_columns(W + row * D, columns, D, BLOCK_D), ACC)
        DOTS += (chunk * n_sources + local) * n_slots
    shift = source * n_slots
    tables = (ROWS, COEFFICIENTS + shift, WEIGHTS, SLOTS + shift, TOKENS + shift, DOTS)
    acc = tl.zeros([BLOCK_D], ACC)
    total = tl.zeros([], ACC)
    for _ in range((stop - entry) // UNROLL):
        acc, total = _add_entries(acc, total, w, entry, tables, columns, UNROLL, D, BLOCK_D)
        entry += UNROLL
    # The rest in halving blocks: most features are short, and single entries would each wait for memory.
    tl.static_assert(UNROLL <= 32)
    for level in tl.static_range(1, 6):
        if UNROLL >> level > 0:
            if (stop - entry) & (UNROLL >> level) != 0:
                acc, total = _add_entries(acc, total, w, entry, tables, columns, UNROLL >> level, D, BLOCK_D)
                entry += UNROLL >> level
    if PARTS is not None:
        if long:
            place = local * 2 * n_spills + tl.where(further, part, n_spills + spill)
            tl.store(PARTS + place * D + columns, acc, mask=columns < D)
            if PART_TOTALS is not None:
                tl.store(PART_TOTALS + place, total, mask=chunk == 0)
        else:
            outputs = (SCALE, W, GRAD_W, GRAD_BIAS)
            adam = ((V, V_EXPONENTS, M, M_EXPONENTS), LAST_STEP, HYPER, seed)
            _finish_row(acc, total, row, chunk, columns, outputs, adam, D, BLOCK_D)


@triton.jit(do_not_specialize=["seed", "first_source", "n_features", "n_spills"])
def join_kernel(
    PARTS,
    PART_TOTALS,
    SPILL_BOUNDS,
    SPILL_FEATURE,
    SCALE,
    W,
    GRAD_W,
    GRAD_BIAS,
    V,
    V_EXPONENTS,
    M,
    M_EXPONENTS,
    LAST_STEP,
    HYPER,
    seed,
    first_source,
    n_features,
    n_spills,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: BLOCK_D columns of a feature of several parts, added in order and finished.

    Grid: further part fast, then source, then column chunk; only the first further part of a feature acts.
    """
    part = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2)
    source = first_source + local
    feature = tl.load(SPILL_FEATURE + source * n_spills + part)
    if feature >= n_features:
        return
    bound = source * (n_features + 1) + feature
    if tl.load(SPILL_BOUNDS + bound) != part:
        return
    stop = tl.load(SPILL_BOUNDS + bound + 1)
    columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    PARTS += local * 2 * n_spills * D
    acc = load_columns(PARTS + (n_spills + part).to(tl.int64) * D, columns, D, BLOCK_D)
    total = tl.zeros([], ACC)
    if PART_TOTALS is not None:
        PART_TOTALS += local * 2 * n_spills
        total = tl.load(PART_TOTALS + n_spills + part)
    for place in tl.range(part, stop, loop_unroll_factor=UNROLL):
        acc += load_columns(PARTS + tl.cast(place, tl.int64) * D, columns, D, BLOCK_D)
        if PART_TOTALS is not None:
            total += tl.load(PART_TOTALS + place)
    row = source * n_features + feature
    outputs = (SCALE, W, GRAD_W, GRAD_BIAS)
    adam = ((V, V_EXPONENTS, M, M_EXPONENTS), LAST_STEP, HYPER, seed)
    _finish_row(acc, total, row, chunk, columns, outputs, adam, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_tokens", "k", "chunks"])
def slot_grad_kernel(
    DOTS, VALUES, WEIGHTS, SCALE, OUT, n_total, n_tokens, k, chunks, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """One program: the gradients of BLOCK of the n_total slots, DOTS [chunks,n_total] added up in order of chunks."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_total
    filled = tl.load(VALUES + slot, mask=inside, other=0.0).to(ACC) != 0
    total = tl.zeros([BLOCK], ACC)
    # The places of empty slots were never written; a mask without them would make 4-byte loads of 16-byte ones.
    for _ in range(chunks):
        total += tl.load(DOTS + slot, mask=inside, other=0.0)
        DOTS += n_total
    if WEIGHTS is not None:
        total *= tl.load(WEIGHTS + slot // k % n_tokens, mask=filled, other=0.0).to(ACC)
    if SCALE is not None:
        total *= tl.load(SCALE).to(ACC)
    tl.store(OUT + slot, tl.where(filled, total, 0.0), mask=inside)
