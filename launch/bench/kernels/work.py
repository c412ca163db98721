"""How much an operation of the kernels has to do, and the least time that takes on a machine: the roofline.

An operation moves bytes that nobody can avoid, each input read once and each output written once; it gathers rows of a
table again and again, which a cache may serve; and it multiplies. The longest of the three is its floor.

Shape letters: S source layers, N tokens, D d_model, F features, k slots per token and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Bytes of a feature number, a slot number or a token number.
INDEX = 4
#: Bytes of a number in which float32 and bfloat16 tensors are summed.
SUM = 4


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an operation has to do, whoever does it.

    Attributes:
        flops: additions and multiplications.
        once_bytes: inputs read and outputs written, each byte once, gathered tables aside.
        gather_bytes: rows gathered, as often as they are asked for.
        table_bytes: the rows among them that differ.
        table_rows: rows of one gathered table.
    """

    flops: float = 0.0
    once_bytes: float = 0.0
    gather_bytes: float = 0.0
    table_bytes: float = 0.0
    table_rows: int = 0

    @property
    def moved_bytes(self) -> float:
        """Bytes asked of caches and memory."""
        return self.once_bytes + self.gather_bytes


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine can do at most, as measured.

    Attributes:
        memory_bytes_per_s: reading memory.
        cache_bytes_per_s: reading the cache that all cores share; None where it was not measured.
        cache_bytes: bytes in that measurement.
        flops_per_s: product of the encoder's shape.
    """

    memory_bytes_per_s: float
    cache_bytes_per_s: float | None
    cache_bytes: int
    flops_per_s: float

    def floor_s(self, work: Work) -> float:
        """The least seconds in which the work can be done."""
        memory = (work.once_bytes + work.table_bytes) / self.memory_bytes_per_s
        return max(memory, work.gather_bytes / self._gather_rate(work.table_rows), work.flops / self.flops_per_s)

    def _gather_rate(self, table_rows: int) -> float:
        """A table is gathered from the cache if 256 bytes of each of its rows fit: it can be done in such columns."""
        if self.cache_bytes_per_s is None or table_rows * 256 > self.cache_bytes:
            return self.memory_bytes_per_s
        return self.cache_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that decide how much there is to do.

    Attributes:
        d_model: D.
        n_features: F.
        n_tokens: N.
        k: slots per token and layer.
        n_sources: S.
        itemsize: bytes of a weight, an activation or a gradient.
        touched: per source layer, features that fire in the batch.
    """

    d_model: int
    n_features: int
    n_tokens: int
    k: int
    n_sources: int
    itemsize: int
    touched: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Slots of one layer."""
        return self.n_tokens * self.k

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of D numbers."""
        return self.d_model * self.itemsize

    def select(self) -> Work:
        """TopK of stored pre-activations: they are read once."""
        return Work(once_bytes=self.n_tokens * self.n_features * self.itemsize + self.slots * (self.itemsize + INDEX))

    def threshold(self, n: int) -> Work:
        """BatchTopK of stored pre-activations, n of which are kept."""
        return Work(once_bytes=self.n_tokens * self.n_features * self.itemsize + n * (self.itemsize + INDEX))

    def encode(self) -> Work:
        """Encoder product and TopK; pre-activations need not be stored."""
        operands = self.n_tokens * self.d_model + self.n_features * self.d_model + self.n_features
        return Work(
            flops=2.0 * self.n_tokens * self.d_model * self.n_features,
            once_bytes=operands * self.itemsize + self.slots * (self.itemsize + INDEX),
        )

    def decode(self, dense_rows: int = 1) -> Work:
        """Reconstruction from S layers; `dense_rows` tensors [N,D] are read or written beside it."""
        return Work(
            flops=2.0 * self.n_sources * self.slots * self.d_model,
            once_bytes=self.n_sources * self.slots * (self.itemsize + INDEX)
            + dense_rows * self.n_tokens * self.row_bytes,
            gather_bytes=self.n_sources * self.slots * self.row_bytes,
            table_bytes=sum(self.touched) * self.row_bytes,
            table_rows=self.n_features,
        )

    def decode_loss(self) -> Work:
        """Reconstruction, compared with what is read and left as a residual that is written."""
        return self.decode(dense_rows=2)

    def csr(self, layers: int) -> Work:
        """Grouping of layers by feature: codes read, slot and token numbers and bounds written."""
        per_layer = self.slots * (self.itemsize + INDEX) + 2 * INDEX * (self.slots + self.n_features + 1)
        return Work(once_bytes=layers * per_layer)

    def decoder_grad(self) -> Work:
        """Both gradients of the reconstruction, grad_W written for all features."""
        return self._decoder_backward(self.n_sources * self.n_features * self.row_bytes)

    def decoder_step(self, state_itemsize: int) -> Work:
        """The same with row Adam: no gradient stored, weights written and second moments read and written."""
        return self._decoder_backward(sum(self.touched) * self.d_model * (self.itemsize + 2 * state_itemsize))

    def _decoder_backward(self, weight_bytes: float) -> Work:
        slots = self.n_sources * self.slots
        return Work(
            flops=4.0 * slots * self.d_model,
            # Value, slot and token number read, gradient written; each weight that fires read.
            once_bytes=slots * (self.itemsize + 2 * INDEX + SUM) + sum(self.touched) * self.row_bytes + weight_bytes,
            gather_bytes=slots * self.row_bytes,
            table_bytes=self.n_tokens * self.row_bytes,
            table_rows=self.n_tokens,
        )

    def encoder_grad(self) -> Work:
        """Gradients of the encoder, written for all features."""
        return self._encoder_backward(self.n_features * self.row_bytes)

    def encoder_step(self, state_itemsize: int) -> Work:
        """The same with row Adam on the features of the last layer that fire."""
        return self._encoder_backward(self.touched[-1] * self.d_model * (2 * self.itemsize + 2 * state_itemsize))

    def _encoder_backward(self, weight_bytes: float) -> Work:
        return Work(
            flops=2.0 * self.slots * self.d_model,
            # Gradient, value, slot and token number read; the bias gradient written.
            once_bytes=self.slots * (SUM + self.itemsize + 2 * INDEX) + self.n_features * self.itemsize + weight_bytes,
            gather_bytes=self.slots * self.row_bytes,
            table_bytes=self.n_tokens * self.row_bytes,
            table_rows=self.n_tokens,
        )

    def adam(self, state_itemsize: int) -> Work:
        """Row Adam on a stored gradient: weights and second moments read and written, gradient read."""
        return Work(once_bytes=sum(self.touched) * self.d_model * (3 * self.itemsize + 2 * state_itemsize))

    def forward_backward(self) -> tuple[Work, ...]:
        """One target's share of a training step without optimizer: its own encoder and the decoders of S sources."""
        return self.encode(), self.csr(1), self.decode_loss(), self.decoder_grad(), self.encoder_grad()

    def step(self, state_itemsize: int) -> tuple[Work, ...]:
        """The same with row Adam."""
        backward = self.decoder_step(state_itemsize), self.encoder_step(state_itemsize)
        return self.encode(), self.csr(1), self.decode_loss(), *backward


def total_floor_s(ceilings: Ceilings, works: Sequence[Work]) -> float:
    """The least seconds of operations one after the other."""
    return sum(ceilings.floor_s(work) for work in works)
