"""In-flight codes between the ranks of a model group, and their gradients; see `clt.distributed.code_exchange`.

Shape letters: L source layers, S source layers of one target, B tokens, K slots per token and layer, R ranks of the
model group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from clt.kernels import ops
from clt.kernels.dtypes import accumulator
from clt.records import SparseCodes
from clt.step_phases import phase
from clt.transcoder.layers import LayerShare


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which source layers travel together: slot c holds the c-th source of every rank.

    Attributes:
        rows: by slot, the row of codes [L,B,K] that each rank fills; None of a rank with fewer sources.
    """

    rows: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of_shares(cls, shares: Sequence[LayerShare]) -> Slots:
        """Slots of what `deal_layers` gave, one share per rank of the model group."""
        layers = sorted(layer for share in shares for layer in share.sources)
        most = max(len(share.sources) for share in shares)
        padded = [[*map(layers.index, share.sources), *[None] * (most - len(share.sources))] for share in shares]
        return cls(rows=tuple(zip(*padded, strict=True)))

    @property
    def n_rows(self) -> int:
        """Source layers of all ranks."""
        return sum(row is not None for rows in self.rows for row in rows)

    def of_rows(self, rows: slice) -> list[int]:
        """Slots, ascending, in which some rows of codes arrive."""
        return [
            slot
            for slot, filled in enumerate(self.rows)
            if any(row in range(*rows.indices(self.n_rows)) for row in filled)
        ]

    def arriving(self, slot: int) -> tuple[list[int], list[int]]:
        """Rows that arrive with a slot, and the ranks that they come from."""
        filled = [(row, rank) for rank, row in enumerate(self.rows[slot]) if row is not None]
        return [row for row, _ in filled], [rank for _, rank in filled]


class Carrier(Protocol):
    """What moves a flight: `clt.distributed.code_exchange.CodeExchange`."""

    slots: Slots

    def gather(self, cargo: Cargo, slot: int, values_BK: Tensor, indices_BK: Tensor) -> None:
        """Starts the all-gather of one slot."""

    def start_sums(self) -> None:
        """Starts the reduce-scatters of slots that are complete, as far as the common order allows."""


class CodeFlight:
    """Codes under way, from `CodeExchange.send`.

    Attributes:
        own: codes [L_own,B,K] of this rank's sources, as they were sent; differentiable.
    """

    def __init__(self, cargo: Cargo, tickets: list[Tensor], own: SparseCodes) -> None:
        self._cargo, self._tickets, self.own = cargo, tickets, own
        # A rank without sources takes part in the sums too: its graph must reach them.
        self._anchor = torch.zeros((), requires_grad=True)

    def take(self, rows: slice) -> tuple[Tensor, Tensor, ops.FeatureCSR | None]:
        """Waits for some of the source layers.

        Args:
            rows: of the codes of all sources [L,B,K], as `CrossLayerTranscoder.source_rows` gives them.

        Returns:
            values [S,B,K], indices [S,B,K] int32 and, with gradients enabled, their grouping.
        """
        cargo = self._cargo
        cargo.await_rows(rows)
        values_SBK: Tensor = Take.apply(cargo, rows, self._anchor, *self._tickets)
        return values_SBK, cargo.indices[rows], cargo.grouping(rows)

    def land(self) -> None:
        """Waits for what nobody here reads; call it when all own targets have theirs."""
        self._cargo.await_all()

    def all_rows(self) -> tuple[Tensor, Tensor, ops.FeatureCSR | None]:
        """Codes of all source layers and their grouping, as `take` gives them, but without gradients to give back."""
        self._cargo.await_rows(slice(0, len(self._cargo.values)))
        return self._cargo.values, self._cargo.indices, self._cargo.grouping(slice(None))

    def give_back(self, rows: slice, gradient_SBK: Tensor) -> None:
        """Adds the gradient of one `take` of these rows, where autograd does not; once for each, in any order."""
        self._cargo.add_gradient(rows, gradient_SBK)

    def own_gradient(self, slot: int) -> Tensor:
        """Gradient [B,K] of the values of an own source, by its place in the share, when every take was given back."""
        return self._cargo.own_gradient(slot)


class Cargo:
    """Buffers and works of one flight. It must not refer to a graph, which refers to it."""

    def __init__(
        self,
        carrier: Carrier,
        n_rows: int,
        shape: Sequence[int],
        n_features: int,
        like: Tensor,
        returns: bool | None,
    ) -> None:
        slots = len(carrier.slots.rows)
        self.carrier, self._n_features = carrier, n_features
        self.needs_gradient = torch.is_grad_enabled() if returns is None else returns
        # A row is written once, before anyone reads it. Writers go through `.data`, so that autograd does not take the
        # arrival of a row for a change of rows that it has saved.
        self.values = like.new_empty(n_rows, *shape)
        self.indices = like.new_empty(n_rows, *shape, dtype=torch.int32)
        self.wire_dtype = index_dtype(n_features)
        self.gathers: list[list[dist.Work]] = [[] for _ in range(slots)]
        self.wires: list[Tensor | None] = [None] * slots
        self.readers: Counter[int] = Counter()
        self.sums: dict[int, tuple[dist.Work, Tensor]] = {}
        self._csr: list[Tensor] = []
        self._gradients: Tensor | None = None

    @phase("exchange")
    def await_rows(self, rows: slice) -> None:
        """Waits for the slots of some rows, unless they are here."""
        for slot in self.carrier.slots.of_rows(rows):
            wire_RBK = self.wires[slot]
            if wire_RBK is None:
                continue
            for work in self.gathers[slot]:
                work.wait()
            filled, ranks = self.carrier.slots.arriving(slot)
            self.indices.data[filled] = wire_RBK[ranks].int()
            self.wires[slot], self.gathers[slot] = None, []
            if self.needs_gradient:
                self._group(filled)

    @phase("exchange")
    def await_all(self) -> None:
        """Waits for the slots that are not here yet, without using them."""
        for works in self.gathers:
            for work in works:
                work.wait()
            works.clear()

    def _group(self, rows: list[int]) -> None:
        parts = ops.feature_csr(self.values[rows], self.indices[rows], self._n_features).tensors()
        self._csr = self._csr or [part.new_empty(len(self.values), part.shape[1]) for part in parts]
        for whole, part in zip(self._csr, parts, strict=True):
            whole.data[rows] = part

    def grouping(self, rows: slice) -> ops.FeatureCSR | None:
        """Grouping of rows that are here."""
        return ops.FeatureCSR.from_tensors(self._csr)[rows] if self._csr else None

    def gradients(self) -> Tensor:
        """[L,B,K] sums over the own targets, in the dtype that sums run in."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.values, dtype=accumulator(self.values.dtype))
        return self._gradients

    def add_gradient(self, rows: slice, gradient_SBK: Tensor | None) -> None:
        """Adds what one reader of some rows contributes, and starts the sums that it completes."""
        if gradient_SBK is not None:
            self.gradients()[rows] += gradient_SBK
        self.readers.subtract(self.carrier.slots.of_rows(rows))
        self.carrier.start_sums()

    def own_gradient(self, slot: int) -> Tensor:
        """[B,K] sum over all readers of all ranks, in the dtype that sums run in."""
        work, parts_RBK = self.sums.pop(slot)
        work.wait()
        return parts_RBK.sum(dim=0)


class Send(torch.autograd.Function):
    """Between an encoder and the gather of its codes; what it returns only ties the graph together."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, cargo: Cargo, slot: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.cargo, ctx.slot, ctx.dtype = cargo, slot, values_BK.dtype
        cargo.carrier.gather(cargo, slot, values_BK, indices_BK)
        return values_BK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # Every reader of this rank has been here: each takes all tickets.
        return ctx.cargo.own_gradient(ctx.slot).to(ctx.dtype), None, None, None


class Take(torch.autograd.Function):
    """Between the gathered codes and a decoder that reads some of them."""

    @staticmethod
    def forward(ctx: Any, cargo: Cargo, rows: slice, *tickets: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.cargo, ctx.rows, ctx.n_tickets = cargo, rows, len(tickets)
        if cargo.needs_gradient:
            cargo.readers.update(cargo.carrier.slots.of_rows(rows))
        return cargo.values[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.cargo.add_gradient(ctx.rows, gradients[0])
        return (None,) * (2 + ctx.n_tickets)


def index_dtype(n_features: int) -> torch.dtype:
    """In which dtype feature numbers travel."""
    return torch.int16 if n_features <= 1 << 15 else torch.int32
