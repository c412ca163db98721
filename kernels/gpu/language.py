"""Shared device functions of the Triton kernels: rounding and order-preserving keys, compiled or interpreted.

Importing this module needs Triton. With TRITON_INTERPRET=1 set before the import, every kernel runs on the CPU in
Triton's interpreter. The interpreter treats bfloat16 as raw bits: it must be widened right after a load, and a
plain conversion back truncates. `round_to` and `bits_of` work in both modes.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Read inside kernels, where a plain global would not be allowed.
_INTERPRET = tl.constexpr(INTERPRETED)

#: float64 is summed in float64, everything else in float32.
ACCUMULATOR = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.float32}

#: Bits of an order-preserving key of a non-negative number (the sign bit is never set).
KEY_BITS = {torch.float64: 63, torch.float32: 31, torch.bfloat16: 15}


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest, ties to even, NaN kept."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x != x, 0x7FC0, bits)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def positive_key(x):
    """Integers in the order of max(x, 0): equal numbers get equal keys, NaN the largest, all that is not positive 0."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        # Sign bit aside, NaN lies above infinity, whose bits are 0x7F80.
        bits = tl.where((bits & 0x7FFF) > 0x7F80, 0x7FFF, bits)
    elif x.dtype == tl.float32:
        bits = tl.where(x != x, 0x7FFFFFFF, x.to(tl.int32, bitcast=True))
    else:
        bits = tl.where(x != x, 0x7FFFFFFFFFFFFFFF, x.to(tl.int64, bitcast=True))
    return tl.maximum(bits, 0)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x in a wider DTYPE. bfloat16 by its bits: the compiler's own conversion takes half an instruction more each."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def load_columns(ROW, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements `columns` of the row of D that starts at ROW, 0 past its end; no mask where blocks fill the row."""
    if D % BLOCK_D == 0:
        return tl.load(ROW + columns)
    else:
        return tl.load(ROW + columns, mask=columns < D, other=0.0)
