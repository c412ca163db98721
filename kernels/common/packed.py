"""Moments of Adam in one byte per number: 8-bit codes and an exponent that a group of columns shares.

A row of D columns is cut into groups of `GROUP`, the last one shorter. The exponent E of a group is that of its largest
rounded number as float32 stores it (0 for a group of zeros), and a code is the distance of a number below it:

    second moments (unsigned)         5 bits of exponent, 3 of mantissa   32 octaves
    first moments (signed)      sign, 4 bits of exponent, 3 of mantissa   16 octaves

Code 0 is exactly 0. Smaller numbers become 0 in a first moment and the smallest code in a second, since a second moment
of 0 would make an infinite step. A group with a non-finite number has E = `BROKEN` and reads as NaN. E is taken after
rounding, so that numbers read from codes give the same codes again. Integer arithmetic: the same bits as in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns that share an exponent. Not the whole row: kernels work on chunks of columns, and the exponent of a row
#: would have to wait for all of its chunks. Blocks of kernels hold whole groups.
GROUP = 128

#: Exponent of infinity and NaN in float32, and of a group that holds one.
BROKEN = 255

#: Bits of the mantissa that a code keeps (relative step 1/8), and of a float32 below them. A channel learns at its own
#: pace as long as its gradients are above 2e-5 (15.5 octaves) of the largest in its group; with 4 bits of mantissa and
#: half the octaves, a regression with one channel 300 times the others ended with 6 to 16 % more loss.
MANTISSA_BITS = 3
DROPPED_BITS = 23 - MANTISSA_BITS

_INFINITY, _NAN, _MAGNITUDE = 0x7F800000, 0x7FC00000, 0x7FFFFFFF


def reach(signed: bool) -> int:
    """Octaves that codes reach below that of the largest number: twice as many for second moments, the squares."""
    exponent_bits = 8 - int(signed) - MANTISSA_BITS
    return (1 << exponent_bits) - 1


def n_groups(columns: int) -> int:
    """Groups in a row of so many columns."""
    return -(-columns // GROUP)


def pack(x_RD: Tensor, signed: bool, noise_RD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds numbers to codes.

    Args:
        x_RD: [..,D] float32; not negative unless signed.
        signed: first moments, else second ones.
        noise_RD: [..,D] uniform integers below 2^DROPPED_BITS for unbiased rounding; None to round to nearest.

    Returns:
        codes [..,D] and exponents [..,G] of the groups, uint8.
    """
    smallest = 0 if signed else 1
    bits_RD = x_RD.contiguous().view(torch.int32)
    magnitude_RD = (bits_RD & _MAGNITUDE).clamp(max=_INFINITY)
    added = 1 << (DROPPED_BITS - 1) if noise_RD is None else noise_RD.int()
    # Exponent and mantissa as one number: rounding up carries into the exponent.
    units_RD = ((magnitude_RD + added) >> DROPPED_BITS).clamp(min=smallest).masked_fill(magnitude_RD == 0, 0)
    exponents_RG = _grouped(units_RD).amax(dim=-1) >> MANTISSA_BITS
    codes_RD = units_RD - _origin(exponents_RG, signed, x_RD.shape[-1])
    codes_RD = codes_RD.clamp(min=smallest).masked_fill(units_RD == 0, 0)
    if signed:
        codes_RD = codes_RD | ((bits_RD < 0).int() << 7)
    return codes_RD.to(torch.uint8), exponents_RG.to(torch.uint8)


def unpack(codes_RD: Tensor, exponents_RG: Tensor, signed: bool) -> Tensor:
    """The float32 numbers that `pack` rounded to.

    Args:
        codes_RD: [..,D] uint8.
        exponents_RG: [..,G] uint8.
        signed: first moments, else second ones.

    Returns:
        [..,D] float32.
    """
    codes_RD, exponents_RG, columns = codes_RD.int(), exponents_RG.int(), codes_RD.shape[-1]
    size_RD = codes_RD & 0x7F if signed else codes_RD
    bits_RD = (size_RD + _origin(exponents_RG, signed, columns)) << DROPPED_BITS
    bits_RD = bits_RD.masked_fill(size_RD == 0, 0)
    bits_RD = bits_RD.masked_fill(_spread(exponents_RG == BROKEN, columns), _NAN)
    x_RD = bits_RD.view(torch.float32)
    return torch.where(codes_RD > 0x7F, -x_RD, x_RD) if signed else x_RD


def _grouped(x_RD: Tensor) -> Tensor:
    """[..,G,GROUP] of [..,D], the last group filled up with zeros."""
    padding = -x_RD.shape[-1] % GROUP
    return torch.nn.functional.pad(x_RD, (0, padding)).unflatten(-1, (-1, GROUP))


def _spread(x_RG: Tensor, columns: int) -> Tensor:
    """[..,D] of [..,G]: every column has the number of its group."""
    return x_RG.repeat_interleave(GROUP, dim=-1)[..., :columns]


def _origin(exponents_RG: Tensor, signed: bool, columns: int) -> Tensor:
    """[..,D] int32: units of code 0 in each column's group."""
    return _spread((exponents_RG - reach(signed)) * (1 << MANTISSA_BITS), columns)
