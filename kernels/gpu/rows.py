"""Functions of kernels that select columns of a row: ranking by bits, compaction in column order, empty slots."""

import triton
import triton.language as tl


@triton.jit
def kth_largest(key, k, BITS: tl.constexpr):
    """The k-th largest positive key, 1 when there are fewer, and how many equal to it are among the k largest."""
    level = tl.zeros([], key.dtype)
    quota = k
    for bit in range(BITS):
        higher = level | (tl.full([], 1, key.dtype) << (BITS - 1 - bit))
        n_reach = tl.sum((key >= higher).to(tl.int32), 0)
        # The last rejected step tests level + 1: keys that reach it are above the level.
        quota = tl.where(n_reach >= k, quota, k - n_reach)
        level = tl.where(n_reach >= k, higher, level)
    return tl.maximum(level, 1), tl.where(level == 0, k, quota)


@triton.jit
def _flags(hit):
    """[R] integers: bit i is set where hit [R,V] holds in column i."""
    return tl.sum(hit.to(tl.int32) << tl.arange(0, hit.shape[1])[None, :], 1)


@triton.jit
def emit(INDICES, place, above, tied, column, quota, end):
    """Stores, from INDICES[place] on, the columns that are above a level and the first `quota` equal to it, in order.

    Column i of above and tied [R,V], both of at most 32767 elements, is feature column + i, ascending; column is [R]. A
    row is what one lane loads at once, so no element changes lanes. tied None: only those above. end not None: nothing
    is stored at or beyond INDICES[end]. Returns how many are above and how many equal ones are among the first `quota`.
    """
    # One scan counts both kinds, in the halves of an integer.
    kinds = above.to(tl.int32) << 16
    if tied is not None:
        kinds |= tied.to(tl.int32)
    kinds = tl.sum(kinds, 1)
    before = tl.cumsum(kinds, 0) - kinds
    total = tl.sum(kinds, 0)
    place += before >> 16
    above_bits = _flags(above)
    if tied is not None:
        tied_bits = _flags(tied)
        seen = before & 0xFFFF
        place += tl.minimum(seen, quota)
    for i in tl.static_range(above.shape[1]):
        take = (above_bits >> i) & 1
        if tied is not None:
            is_tied = (tied_bits >> i) & 1
            take |= is_tied & (seen < quota).to(tl.int32)
            seen += is_tied
        stored = take != 0
        if end is not None:
            stored = stored & (place < end)
        tl.store(INDICES + place, column + i, mask=stored)
        place += take
    return total >> 16, tl.minimum(total & 0xFFFF, quota)


@triton.jit
def reaches(x, key):
    """True where the positive_key of x is at least a positive key, and for NaN, of either."""
    if x.dtype == tl.bfloat16:
        # Widened by its bits: the interpreter's conversion loses subnormal numbers.
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        return ~(wide < (key << 16).to(tl.float32, bitcast=True))
    else:
        return ~(x < key.to(x.dtype, bitcast=True))


@triton.jit
def load_vectors(PRE, column, exists, n_features, VECTOR: tl.constexpr):
    """Pre-activations [R,V] of VECTOR columns from each column [R] on, 0 where they do not exist."""
    columns = tl.multiple_of(column, VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    return tl.load(PRE + columns, mask=exists[:, None] & (columns < n_features), other=0.0)


@triton.jit
def gather_values(PRE, VALUES, INDICES, n_filled, BLOCK: tl.constexpr):
    """Stores the pre-activations of the first slots, whose indices are stored and visible."""
    for start in range(0, n_filled, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        column = tl.load(INDICES + slot, mask=slot < n_filled, other=0)
        tl.store(VALUES + slot, tl.load(PRE + column, mask=slot < n_filled, other=0.0), mask=slot < n_filled)


@triton.jit
def fill_empty(VALUES, INDICES, first, n_slots, BLOCK: tl.constexpr):
    """Stores empty slots from `first` on."""
    for start in range(first, n_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(INDICES + slot, 0, mask=slot < n_slots)
        tl.store(VALUES + slot, 0.0, mask=slot < n_slots)
