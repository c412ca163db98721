"""Storage of parameters and moments: float32 or float64, bfloat16, or the 8-bit codes of `clt.kernels.common.packed`.

Numbers that do not fit are rounded stochastically, because an update smaller than half a unit in the last place would
be lost by rounding to nearest. The noise is a hash of seed, step, element number and tensor: no generator state, and
the same bits wherever it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt.kernels.common import packed

#: Streams of noise: which tensor is rounded, below 4.
PARAM, MOMENT_1, MOMENT_2 = 0, 1, 2

#: Multipliers of the hash, below 2^31 so that int64 products with 32-bit numbers do not overflow.
MULTIPLIER_1, MULTIPLIER_2, MULTIPLIER_3 = 0x21F0AAAD, 0x735A2D97, 0x31848BAB

_LOW_32 = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """Bijection of 32-bit integers, held in int64, in which every input bit flips every output bit half the time.

    Source: shifts and multipliers found by https://github.com/skeeto/hash-prospector.
    """
    x = ((x ^ (x >> 16)) * MULTIPLIER_1) & _LOW_32
    x = ((x ^ (x >> 15)) * MULTIPLIER_2) & _LOW_32
    return x ^ (x >> 15)


def noise(offset: Tensor, step: Tensor, seed: int, stream: int, bits: int = 16) -> Tensor:
    """Uniform integers below 2^bits, a function of the arguments only.

    Args:
        offset: int64 element numbers within the parameter, any shape; elements 2^32 apart share their noise.
        step: [] number of the step.
        seed: of the stochastic rounding.
        stream: PARAM, MOMENT_1 or MOMENT_2.
        bits: of the integers, at most 32; fewer are the leading ones of more.

    Returns:
        int64 of the shape of offset.
    """
    own = mix(torch.tensor(seed, device=offset.device))
    key = mix((own + step.long() * 4 + stream) & _LOW_32)
    # Step and stream enter before the last round, so that a kernel which rounds several tensors shares the first two.
    return (((mix((offset & _LOW_32) ^ own) ^ key) * MULTIPLIER_3) & _LOW_32) >> (32 - bits)


def round_stochastically(x: Tensor, noise_bits: Tensor) -> Tensor:
    """float32 to bfloat16: one of the two neighbours, the mean over the noise being x; NaN and infinity are kept.

    Args:
        x: float32, any shape.
        noise_bits: int64 below 2^16 of that shape.
    """
    bits = ((x.view(torch.int32).long() & _LOW_32) + noise_bits) >> 16
    bits = torch.where(x.isnan(), 0x7FC0, bits)
    return bits.to(torch.int16).view(torch.bfloat16)


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or moment as it is stored.

    Attributes:
        numbers_RD: [R,D] numbers, or the codes of `clt.kernels.common.packed`.
        exponents_RG: [R,G] exponents of the codes' groups; None iff these are numbers.
        stream: PARAM, MOMENT_1 (signed codes) or MOMENT_2 (unsigned ones).
    """

    numbers_RD: Tensor
    exponents_RG: Tensor | None
    stream: int

    @classmethod
    def of(cls, numbers: Tensor, exponents: Tensor | None, stream: int) -> StoredTensor:
        """A view of stored tensors; shares their memory.

        Args:
            numbers: [..,D] numbers or codes.
            exponents: [..,G] exponents of the codes' groups, or None.
            stream: PARAM, MOMENT_1 or MOMENT_2.
        """
        exponents_RG = None if exponents is None else exponents.view(-1, exponents.shape[-1])
        return cls(numbers.view(-1, numbers.shape[-1]), exponents_RG, stream)

    @property
    def noise_bits(self) -> int:
        """Bits that storing a float32 cuts off, 0 where nothing is rounded stochastically."""
        if self.exponents_RG is not None:
            return packed.DROPPED_BITS
        return 16 if self.numbers_RD.dtype == torch.bfloat16 else 0

    def read(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """The numbers of some rows; a copy where `rows` is a tensor."""
        if self.exponents_RG is None:
            return self.numbers_RD[rows].to(dtype)
        return packed.unpack(self.numbers_RD[rows], self.exponents_RG[rows], self.stream == MOMENT_1)

    def write(self, rows: Tensor | slice, x: Tensor, noise_RD: Tensor | None = None) -> None:
        """Stores float32 numbers as some rows.

        Args:
            rows: [N] row numbers or a slice.
            x: [N,D] float32.
            noise_RD: [N,D] int64 below 2^noise_bits for stochastic rounding; None rounds to nearest.
        """
        if self.exponents_RG is not None:
            codes, exponents = packed.pack(x, self.stream == MOMENT_1, noise_RD)
            self.numbers_RD[rows], self.exponents_RG[rows] = codes, exponents
        elif noise_RD is not None:
            self.numbers_RD[rows] = round_stochastically(x, noise_RD)
        else:
            self.numbers_RD[rows] = x.to(self.numbers_RD.dtype)

    def write_stochastically(self, rows: Tensor, x: Tensor, hyper: Tensor, seed: int) -> None:
        """Stores float32 numbers as some rows, rounded with the noise of this step where the storage rounds.

        Args:
            rows: [N] row numbers.
            x: [N,D] float32.
            hyper: from `RowAdam.hyper`; holds the number of the step.
            seed: of the stochastic rounding.
        """
        noise_RD = None
        if self.noise_bits > 0:
            offset = rows[:, None] * x.shape[1] + torch.arange(x.shape[1], device=rows.device)
            noise_RD = noise(offset, hyper[8], seed, self.stream, self.noise_bits)
        self.write(rows, x, noise_RD)
