"""Roofline model of the kernels: the work of every operation and its minimum time on a machine.

An operation moves a minimum of bytes, each input read once and each output written once; it gathers rows of a table
repeatedly, possibly from a cache; and it multiplies. The longest of the three times is its minimum.

Shape letters: S source layers, N tokens, D d_model, F features, k slots per token and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clt.launch.bench.common.ceilings import CACHED_BYTES, Ceiling

#: Bytes of a feature number, a slot number or a token number.
INDEX = 4
#: Bytes of a number in which float32 and bfloat16 tensors are summed.
SUM = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work of an operation, independent of its implementation.

    Attributes:
        flops: additions and multiplications.
        once_bytes: inputs read and outputs written, each byte once, without gathered tables.
        gather_bytes: gathered rows, counted as often as they are read.
        table_bytes: distinct rows among them.
        table_rows: rows of one gathered table.
    """

    flops: float = 0.0
    once_bytes: float = 0.0
    gather_bytes: float = 0.0
    table_bytes: float = 0.0
    table_rows: int = 0

    @property
    def moved_bytes(self) -> float:
        """Bytes requested from caches and memory."""
        return self.once_bytes + self.gather_bytes


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Measured ceilings of the machine at one size.

    Attributes:
        memory_bytes_per_s: memory reads.
        cache_bytes_per_s: reads of the cache shared by all cores; None where it was not measured.
        cache_bytes: bytes in that measurement.
        flops_per_s: matrix product of the encoder's shape.
    """

    memory_bytes_per_s: float
    cache_bytes_per_s: float | None
    cache_bytes: int
    flops_per_s: float

    def floor_s(self, work: Workload) -> float:
        """Minimum seconds of an operation."""
        memory = (work.once_bytes + work.table_bytes) / self.memory_bytes_per_s
        return max(memory, work.gather_bytes / self._gather_rate(work.table_rows), work.flops / self.flops_per_s)

    def _gather_rate(self, table_rows: int) -> float:
        """A table counts as cached if 256 bytes of each of its rows fit, since it can be gathered in such columns."""
        if self.cache_bytes_per_s is None or table_rows * 256 > self.cache_bytes:
            return self.memory_bytes_per_s
        return self.cache_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that determine the work.

    Attributes:
        d_model: D.
        n_features: F.
        n_tokens: N.
        k: slots per token and layer.
        n_sources: S.
        itemsize: bytes of a weight, an activation or a gradient.
        touched: per source layer, number of features that fire in the batch.
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

    def select(self) -> Workload:
        """TopK of stored pre-activations, read once."""
        return Workload(
            once_bytes=self.n_tokens * self.n_features * self.itemsize + self.slots * (self.itemsize + INDEX)
        )

    def threshold(self, n: int) -> Workload:
        """BatchTopK that keeps n of the stored pre-activations."""
        return Workload(once_bytes=self.n_tokens * self.n_features * self.itemsize + n * (self.itemsize + INDEX))

    def encode(self) -> Workload:
        """Encoder product and TopK; pre-activations are not stored."""
        operands = self.n_tokens * self.d_model + self.n_features * self.d_model + self.n_features
        return Workload(
            flops=2.0 * self.n_tokens * self.d_model * self.n_features,
            once_bytes=operands * self.itemsize + self.slots * (self.itemsize + INDEX),
        )

    def decode(self, dense_rows: int = 1) -> Workload:
        """Reconstruction from S layers, with `dense_rows` tensors [N,D] read or written."""
        return Workload(
            flops=2.0 * self.n_sources * self.slots * self.d_model,
            once_bytes=self.n_sources * self.slots * (self.itemsize + INDEX)
            + dense_rows * self.n_tokens * self.row_bytes,
            gather_bytes=self.n_sources * self.slots * self.row_bytes,
            table_bytes=sum(self.touched) * self.row_bytes,
            table_rows=self.n_features,
        )

    def decode_loss(self) -> Workload:
        """Reconstruction with a target read and a residual written."""
        return self.decode(dense_rows=2)

    def csr(self, layers: int) -> Workload:
        """Grouping of codes by feature: codes read, slot and token numbers and bounds written."""
        per_layer = self.slots * (self.itemsize + INDEX) + 2 * INDEX * (self.slots + self.n_features + 1)
        return Workload(once_bytes=layers * per_layer)

    def decoder_grad(self) -> Workload:
        """Both gradients of the reconstruction, grad_W written for all features."""
        return self._decoder_backward(self.n_sources * self.n_features * self.row_bytes)

    def decoder_step(self, state_itemsize: int) -> Workload:
        """Both gradients with row Adam: no gradient stored, weights written, second moments read and written."""
        return self._decoder_backward(sum(self.touched) * self.d_model * (self.itemsize + 2 * state_itemsize))

    def _decoder_backward(self, weight_bytes: float) -> Workload:
        slots = self.n_sources * self.slots
        return Workload(
            flops=4.0 * slots * self.d_model,
            # Value, slot and token number read, gradient written; each row that fires read.
            once_bytes=slots * (self.itemsize + 2 * INDEX + SUM) + sum(self.touched) * self.row_bytes + weight_bytes,
            gather_bytes=slots * self.row_bytes,
            table_bytes=self.n_tokens * self.row_bytes,
            table_rows=self.n_tokens,
        )

    def encoder_grad(self) -> Workload:
        """Gradients of the encoder, written for all features."""
        return self._encoder_backward(self.n_features * self.row_bytes)

    def encoder_step(self, state_itemsize: int) -> Workload:
        """Encoder gradients with row Adam on the features of the last layer that fire."""
        return self._encoder_backward(self.touched[-1] * self.d_model * (2 * self.itemsize + 2 * state_itemsize))

    def _encoder_backward(self, weight_bytes: float) -> Workload:
        return Workload(
            flops=2.0 * self.slots * self.d_model,
            # Gradient, value, slot and token number read; the bias gradient written.
            once_bytes=self.slots * (SUM + self.itemsize + 2 * INDEX) + self.n_features * self.itemsize + weight_bytes,
            gather_bytes=self.slots * self.row_bytes,
            table_bytes=self.n_tokens * self.row_bytes,
            table_rows=self.n_tokens,
        )

    def adam(self, state_itemsize: int) -> Workload:
        """Row Adam on a stored gradient: weights and second moments read and written, gradient read."""
        return Workload(once_bytes=sum(self.touched) * self.d_model * (3 * self.itemsize + 2 * state_itemsize))

    def forward_backward(self) -> tuple[Workload, ...]:
        """Training step of one target without optimizer: its own encoder and the decoders of S sources."""
        return self.encode(), self.csr(1), self.decode_loss(), self.decoder_grad(), self.encoder_grad()

    def step(self, state_itemsize: int) -> tuple[Workload, ...]:
        """Training step of one target with row Adam."""
        backward = self.decoder_step(state_itemsize), self.encoder_step(state_itemsize)
        return self.encode(), self.csr(1), self.decode_loss(), *backward


def total_floor_s(ceilings: Roofline, works: Sequence[Workload]) -> float:
    """Minimum seconds of consecutive operations."""
    return sum(ceilings.floor_s(work) for work in works)


def roofline(memory: Sequence[Ceiling], product: Ceiling) -> Roofline:
    """Roofline of one size from `memory_ceilings` and `product_ceiling`."""
    read, copy, *cache = memory
    return Roofline(
        memory_bytes_per_s=max(read.rate, copy.rate),
        cache_bytes_per_s=cache[0].rate if cache else None,
        cache_bytes=CACHED_BYTES,
        flops_per_s=product.rate,
    )
