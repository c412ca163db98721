"""What travels between the ranks of a model group: sparse codes instead of weights or dense activations.

A step encodes the own sources one after the other and sends each code off at once, with everybody's: slot c of a flight
holds the c-th source of every rank. A target is decoded when the slots it needs have arrived, while the others are
under way. In the backward pass the sum over ranks of a slot's gradients starts when the last own target that reads it
has its part, and the encoders, which come last, wait for it. Collectives start in one order on all ranks: gathers slot
by slot, sums in the reverse order.

Shape letters: L source layers, S source layers of one target, B tokens, K slots per token and layer, R ranks of the
model group.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clt.kernels import ops
from clt.kernels.dtypes import accumulator
from clt.model import LayerShare
from clt.parallel import Mesh
from clt.records import SparseCodes


class CodeExchange:
    """Brings every rank of the model group the codes of all source layers.

    Args:
        mesh: the processes.
        shares: what `deal_layers` gave, one share per rank of the model group.

    Attributes:
        mesh: the processes.
    """

    def __init__(self, mesh: Mesh, shares: Sequence[LayerShare]) -> None:
        self.mesh = mesh
        layers = sorted(layer for share in shares for layer in share.sources)
        #: Row of codes [L,B,K] that each rank fills in each slot; a rank with fewer sources has none in the last slots.
        self._rows = [
            [layers.index(share.sources[slot]) if slot < len(share.sources) else None for share in shares]
            for slot in range(slot_count(shares))
        ]
        self._slot_of = {row: slot for slot, rows in enumerate(self._rows) for row in rows if row is not None}
        # Sums start in the reverse order of gathers. Weak: a forward pass without backward leaves nothing behind.
        self._awaiting_sum: list[tuple[weakref.ref[_Cargo], int]] = []
        self._unwatched: list[dist.Work] = []

    def __call__(self, codes: SparseCodes) -> SparseCodes:
        """Gathers codes and waits for them; differentiable with respect to the values.

        Args:
            codes: [L_own,B,K] of this rank's sources, in the order of its share; K and B alike on all ranks.

        Returns:
            Codes [L,B,K] of all sources in ascending order. The gradient of the values is summed over the model group.
        """
        pairs = zip(codes.values.unbind(), codes.indices.unbind(), strict=True)
        flight = self.send(pairs, codes.values.shape[1:], codes.n_features, codes.values)
        values, indices, _ = flight.take(slice(0, len(self._slot_of)))
        return SparseCodes(values=values, indices=indices, n_features=codes.n_features)

    def send(
        self,
        codes: Iterable[tuple[Tensor, Tensor]],
        shape: Sequence[int],
        n_features: int,
        like: Tensor,
        returns: bool | None = None,
    ) -> CodeFlight:
        """Sends the codes of the own sources off, each as soon as the iterator gives it.

        Args:
            codes: values [B,K] and indices [B,K] int32 of every own source, in the order of the share.
            shape: (B, K), alike on all ranks.
            n_features: F.
            like: any tensor with the device and dtype of the values; a rank may have no source.
            returns: whether gradients come back, by autograd or by `CodeFlight.give_back`; by default as autograd is
                enabled.

        Returns:
            The codes of all ranks under way. Every rank must go backward through it if gradients come back.
        """
        while self._unwatched:
            self._unwatched.pop().wait()
        cargo = _Cargo(self, len(self._slot_of), shape, n_features, like, returns)
        own, tickets = [], []
        for slot, (values_BK, indices_BK) in enumerate(codes):
            own.append((values_BK, indices_BK))
            tickets.append(_Send.apply(values_BK, indices_BK, cargo, slot))
        for slot in range(len(own), len(self._rows)):
            self._gather(cargo, slot, like.new_zeros(*shape), like.new_zeros(*shape, dtype=torch.int32))
        empty = like.new_empty(0, *shape), like.new_empty(0, *shape, dtype=torch.int32)
        values, indices = (torch.stack(part) for part in zip(*own, strict=True)) if own else empty
        return CodeFlight(cargo, tickets, SparseCodes(values=values, indices=indices, n_features=n_features))

    def last_slot(self, rows: slice) -> int:
        """Slot with which the last of some rows of codes [L,B,K] arrives."""
        return max(self._slots(rows))

    def _slots(self, rows: slice) -> set[int]:
        return {self._slot_of[row] for row in range(rows.start, rows.stop)}

    def _arriving(self, slot: int) -> tuple[list[int], list[int]]:
        """Rows that arrive with a slot, and the ranks that they come from."""
        filled = [(row, rank) for rank, row in enumerate(self._rows[slot]) if row is not None]
        return [row for row, _ in filled], [rank for _, rank in filled]

    def _gather(self, cargo: _Cargo, slot: int, values_BK: Tensor, indices_BK: Tensor) -> None:
        """Starts the all-gather of one slot. Everything travels as bytes: neither gloo nor NCCL knows int16."""
        rows, group = self._rows[slot], self.mesh.model_group
        spare_BK = torch.empty_like(cargo.values[0])
        parts = [_bytes(spare_BK if row is None else cargo.values.data[row]) for row in rows]
        own, numbers = values_BK.detach().contiguous(), indices_BK.to(cargo.wire_dtype).contiguous()
        wire_RBK = numbers.new_empty(len(rows), *numbers.shape)
        cargo.gathers[slot] = [
            dist.all_gather(parts, _bytes(own), group=group, async_op=True),
            dist.all_gather(list(_bytes(wire_RBK).unbind()), _bytes(numbers), group=group, async_op=True),
        ]
        cargo.wires[slot] = wire_RBK
        self.mesh.traffic.count("model", "all_gather", own.nbytes + numbers.nbytes, len(rows))
        if cargo.needs_gradient:
            self._awaiting_sum.append((weakref.ref(cargo), slot))

    def _start_sums(self) -> None:
        """Starts the reduce-scatters of slots that are complete, as far as the common order allows."""
        while self._awaiting_sum:
            reference, slot = self._awaiting_sum[-1]
            cargo = reference()
            if cargo is not None:
                if cargo.readers[slot]:
                    return
                self._sum(cargo, slot)
            self._awaiting_sum.pop()

    def _sum(self, cargo: _Cargo, slot: int) -> None:
        """Starts the reduce-scatter of one slot's gradients; its additions are ours, in order of rank, after arrival.

        Gloo has none of its own: it sends twice the bytes of an all-to-all. And NCCL chooses the order itself.
        """
        rows = self._rows[slot]
        gradients_LBK = cargo.gradients()
        nothing_BK = gradients_LBK.new_zeros(()).expand_as(gradients_LBK[0])
        mine_RBK = torch.stack([nothing_BK if row is None else gradients_LBK[row] for row in rows])
        parts_RBK = torch.empty_like(mine_RBK)
        work = dist.all_to_all_single(parts_RBK, mine_RBK, group=self.mesh.model_group, async_op=True)
        self.mesh.traffic.count("model", "reduce_scatter", parts_RBK[0].nbytes, len(rows))
        if rows[self.mesh.model_rank] is None:
            self._unwatched.append(work)
        else:
            cargo.sums[slot] = (work, parts_RBK)


class CodeFlight:
    """Codes under way, from `CodeExchange.send`.

    Attributes:
        own: codes [L_own,B,K] of this rank's sources, as they were sent; differentiable.
    """

    def __init__(self, cargo: _Cargo, tickets: list[Tensor], own: SparseCodes) -> None:
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
        values_SBK: Tensor = _Take.apply(cargo, rows, self._anchor, *self._tickets)
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


class _Cargo:
    """Buffers and works of one flight. It must not refer to a graph, which refers to it."""

    def __init__(
        self,
        exchange: CodeExchange,
        n_rows: int,
        shape: Sequence[int],
        n_features: int,
        like: Tensor,
        returns: bool | None,
    ) -> None:
        slots = len(exchange._rows)
        self._exchange, self._n_features = exchange, n_features
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

    def await_rows(self, rows: slice) -> None:
        """Waits for the slots of some rows, unless they are here."""
        for slot in sorted(self._exchange._slots(rows)):
            wire_RBK = self.wires[slot]
            if wire_RBK is None:
                continue
            for work in self.gathers[slot]:
                work.wait()
            filled, ranks = self._exchange._arriving(slot)
            self.indices.data[filled] = wire_RBK[ranks].int()
            self.wires[slot], self.gathers[slot] = None, []
            if self.needs_gradient:
                self._group(filled)

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
        self.readers.subtract(self._exchange._slots(rows))
        self._exchange._start_sums()

    def own_gradient(self, slot: int) -> Tensor:
        """[B,K] sum over all readers of all ranks, in the dtype that sums run in."""
        work, parts_RBK = self.sums.pop(slot)
        work.wait()
        return parts_RBK.sum(dim=0)


class _Send(torch.autograd.Function):
    """Between an encoder and the gather of its codes; what it returns only ties the graph together."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, cargo: _Cargo, slot: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.cargo, ctx.slot, ctx.dtype = cargo, slot, values_BK.dtype
        cargo._exchange._gather(cargo, slot, values_BK, indices_BK)
        return values_BK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # Every reader of this rank has been here: each takes all tickets.
        return ctx.cargo.own_gradient(ctx.slot).to(ctx.dtype), None, None, None


class _Take(torch.autograd.Function):
    """Between the gathered codes and a decoder that reads some of them."""

    @staticmethod
    def forward(ctx: Any, cargo: _Cargo, rows: slice, *tickets: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.cargo, ctx.rows, ctx.n_tickets = cargo, rows, len(tickets)
        if cargo.needs_gradient:
            cargo.readers.update(cargo._exchange._slots(rows))
        return cargo.values[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.cargo.add_gradient(ctx.rows, gradients[0])
        return (None,) * (2 + ctx.n_tickets)


def slot_count(shares: Sequence[LayerShare]) -> int:
    """Slots of a flight: sources of the rank that has most."""
    return max(len(share.sources) for share in shares)


def index_dtype(n_features: int) -> torch.dtype:
    """In which dtype feature numbers travel."""
    return torch.int16 if n_features <= 1 << 15 else torch.int32


def exchange_bytes(shares: Sequence[LayerShare], n_features: int, tokens: int, k: int, dtype: torch.dtype) -> int:
    """Bytes that every rank of a model group sends for one flight of codes and its gradients, and receives.

    With R ranks and C slots: C (R - 1) tokens k (value + index + gradient), the gradient in the dtype of its sums.

    Args:
        shares: what `deal_layers` gave.
        n_features: F.
        tokens: B, tokens of the flight that a rank sees; AuxK's flight has fewer.
        k: slots per token and layer.
        dtype: of the values.

    Returns:
        The sum over all-gathers and reduce-scatters.
    """
    slot_bytes = dtype.itemsize + index_dtype(n_features).itemsize + accumulator(dtype).itemsize
    return slot_count(shares) * (len(shares) - 1) * tokens * k * slot_bytes


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
