"""Exchange of sparse codes between the ranks of a model group, instead of weights or dense activations.

Each source layer is sent as soon as it is encoded, one all-gather per slot: slot c holds the c-th source of every rank.
A target is decoded when the slots it reads have arrived, while the others are still in flight. In the backward pass the
reduce-scatter of a slot's gradients starts when all own targets that read it have contributed; the encoders, which come
last, wait for it. All ranks start their collectives in one order: gathers slot by slot, reduce-scatters in reverse.

Shape letters: L source layers, S source layers of one target, B tokens, K slots per token and layer, R ranks of the
model group.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clt.distributed.mesh import Mesh
from clt.kernels import ops
from clt.kernels.common.dtypes import accumulator
from clt.records import SparseCodes
from clt.step_phases import phase
from clt.transcoder.layers import LayerShare


@dataclass(frozen=True, kw_only=True)
class ExchangeSlots:
    """The source layers that are gathered together: slot c holds the c-th source of every rank.

    Attributes:
        rows: by slot, the row of codes [L,B,K] that each rank fills; None of a rank with fewer sources.
    """

    rows: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of_shares(cls, shares: Sequence[LayerShare]) -> ExchangeSlots:
        """Slots of what `deal_layers` gave, one share per rank of the model group."""
        layers = sorted(layer for share in shares for layer in share.sources)
        most = slot_count(shares)
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


class CodeExchange:
    """Gives every rank of the model group the codes of all source layers.

    Args:
        mesh: the processes.
        shares: from `deal_layers`, one share per rank of the model group.

    Attributes:
        mesh: the processes.
        slots: the source layers that are gathered together.
    """

    def __init__(self, mesh: Mesh, shares: Sequence[LayerShare]) -> None:
        self.mesh = mesh
        self.slots = ExchangeSlots.of_shares(shares)
        # Reduce-scatters start in the reverse order of gathers. Weak references: a forward pass without a backward pass
        # leaves nothing behind.
        self._awaiting_sum: list[tuple[weakref.ref[ExchangeBuffers], int]] = []
        self._unread_sums: list[dist.Work] = []

    def __call__(self, codes: SparseCodes) -> SparseCodes:
        """Gathers codes and waits for them; differentiable with respect to the values.

        Args:
            codes: [L_own,B,K] of this rank's sources, in the order of its share; K and B alike on all ranks.

        Returns:
            Codes [L,B,K] of all sources in ascending order. The gradient of the values is summed over the model group.
        """
        pairs = zip(codes.values.unbind(), codes.indices.unbind(), strict=True)
        in_flight = self.send(pairs, codes.values.shape[1:], codes.n_features, codes.values)
        values, indices, _ = in_flight.take(slice(0, self.slots.n_rows))
        return SparseCodes(values=values, indices=indices, n_features=codes.n_features)

    def send(
        self,
        codes: Iterable[tuple[Tensor, Tensor]],
        shape: Sequence[int],
        n_features: int,
        like: Tensor,
        needs_gradient: bool | None = None,
    ) -> InFlightCodes:
        """Starts to gather the codes of the own sources, each as soon as the iterator yields it.

        Args:
            codes: values [B,K] and indices [B,K] int32 of every own source, in the order of the share.
            shape: (B, K), alike on all ranks.
            n_features: F.
            like: any tensor with the device and dtype of the values; a rank may have no source.
            needs_gradient: whether gradients are sent back, by autograd or by `InFlightCodes.add_gradient`; default:
                whether autograd is enabled.

        Returns:
            The in-flight codes of all ranks. If gradients are sent back, every rank must go backward through them.
        """
        while self._unread_sums:
            self._unread_sums.pop().wait()
        buffers = ExchangeBuffers(self, shape, n_features, like, needs_gradient)
        own, anchors = [], []
        for slot, (values_BK, indices_BK) in enumerate(codes):
            own.append((values_BK, indices_BK))
            anchors.append(_Send.apply(values_BK, indices_BK, buffers, slot))
        for slot in range(len(own), len(self.slots.rows)):
            self.gather(buffers, slot, like.new_zeros(*shape), like.new_zeros(*shape, dtype=torch.int32))
        empty = like.new_empty(0, *shape), like.new_empty(0, *shape, dtype=torch.int32)
        values, indices = (torch.stack(part) for part in zip(*own, strict=True)) if own else empty
        return InFlightCodes(buffers, anchors, SparseCodes(values=values, indices=indices, n_features=n_features))

    def last_slot(self, rows: slice) -> int:
        """Slot with which the last of some rows of codes [L,B,K] arrives."""
        return self.slots.of_rows(rows)[-1]

    @phase("exchange")
    def gather(self, buffers: ExchangeBuffers, slot: int, values_BK: Tensor, indices_BK: Tensor) -> None:
        """Starts the all-gather of one slot.

        Args:
            buffers: receive the slot.
            slot: which.
            values_BK: [B,K] this rank's values.
            indices_BK: [B,K] int32 this rank's feature numbers.
        """
        rows = self.slots.rows[slot]
        spare_BK = torch.empty_like(buffers.values[0])
        parts = [spare_BK if row is None else buffers.values.data[row] for row in rows]
        own, numbers = values_BK.detach().contiguous(), indices_BK.to(buffers.wire_dtype).contiguous()
        wire_RBK = numbers.new_empty(len(rows), *numbers.shape)
        buffers.gathers[slot] = [
            self.mesh.start_gather(parts, own),
            self.mesh.start_gather(wire_RBK.unbind(), numbers),
        ]
        buffers.wires[slot] = wire_RBK
        self.mesh.traffic.count("model", "all_gather", own.nbytes + numbers.nbytes, len(rows))
        if buffers.needs_gradient:
            self._awaiting_sum.append((weakref.ref(buffers), slot))

    def start_sums(self) -> None:
        """Starts the reduce-scatters of complete slots, as far as the common order allows."""
        while self._awaiting_sum:
            reference, slot = self._awaiting_sum[-1]
            buffers = reference()
            if buffers is not None:
                if buffers.readers[slot]:
                    return
                self._sum(buffers, slot)
            self._awaiting_sum.pop()

    @phase("exchange")
    def _sum(self, buffers: ExchangeBuffers, slot: int) -> None:
        """Starts the reduce-scatter of one slot's gradients: an all-to-all, added in order of rank after arrival.

        Gloo has no reduce-scatter of its own (it moves twice the bytes of an all-to-all); NCCL chooses the order.
        """
        rows = self.slots.rows[slot]
        gradients_LBK = buffers.gradients()
        nothing_BK = gradients_LBK.new_zeros(()).expand_as(gradients_LBK[0])
        mine_RBK = torch.stack([nothing_BK if row is None else gradients_LBK[row] for row in rows])
        parts_RBK = torch.empty_like(mine_RBK)
        work = self.mesh.start_all_to_all(parts_RBK, mine_RBK)
        self.mesh.traffic.count("model", "reduce_scatter", parts_RBK[0].nbytes, len(rows))
        if rows[self.mesh.model_rank] is None:
            self._unread_sums.append(work)
        else:
            buffers.sums[slot] = (work, parts_RBK)


class InFlightCodes:
    """Codes of all source layers that are being gathered, from `CodeExchange.send`.

    Attributes:
        own: codes [L_own,B,K] of this rank's sources, as they were sent; differentiable.
    """

    def __init__(self, buffers: ExchangeBuffers, anchors: Sequence[Tensor], own: SparseCodes) -> None:
        # A rank without sources takes part in the sums too: its graph must reach them.
        self._buffers, self._anchors, self.own = buffers, (torch.zeros((), requires_grad=True), *anchors), own

    def take(self, rows: slice) -> tuple[Tensor, Tensor, ops.FeatureCSR | None]:
        """Waits for some of the source layers.

        Args:
            rows: of the codes of all sources [L,B,K], as `CrossLayerTranscoder.source_rows` gives them.

        Returns:
            values [S,B,K], indices [S,B,K] int32 and, with gradients enabled, their grouping by feature.
        """
        buffers = self._buffers
        buffers.await_rows(rows)
        values_SBK: Tensor = _Take.apply(buffers, rows, *self._anchors)
        return values_SBK, buffers.indices[rows], buffers.grouping(rows)

    def finish(self) -> None:
        """Waits for the source layers that no own target reads; call it when all own targets have theirs."""
        self._buffers.await_all()

    def all_rows(self) -> tuple[Tensor, Tensor, ops.FeatureCSR | None]:
        """Codes of all source layers and their grouping, as from `take`, but outside autograd."""
        buffers = self._buffers
        buffers.await_rows(slice(None))
        return buffers.values, buffers.indices, buffers.grouping(slice(None))

    def add_gradient(self, rows: slice, gradient_SBK: Tensor) -> None:
        """Adds the gradient of one `take` of these rows where autograd does not; once for each, in any order."""
        self._buffers.add_gradient(rows, gradient_SBK)

    def own_gradient(self, slot: int) -> Tensor:
        """[B,K] gradient of the values of an own source, by its place in the share, after every `add_gradient`."""
        return self._buffers.own_gradient(slot)


class ExchangeBuffers:
    """Buffers and pending collectives of in-flight codes. It must not refer to a graph, which refers to it.

    Args:
        exchange: moves the codes.
        shape: (B, K).
        n_features: F.
        like: any tensor with the device and dtype of the values.
        needs_gradient: as of `CodeExchange.send`.
    """

    def __init__(
        self,
        exchange: CodeExchange,
        shape: Sequence[int],
        n_features: int,
        like: Tensor,
        needs_gradient: bool | None,
    ) -> None:
        slots = len(exchange.slots.rows)
        self.exchange, self._n_features = exchange, n_features
        self.needs_gradient = torch.is_grad_enabled() if needs_gradient is None else needs_gradient
        # A row is written once, before anyone reads it. Writers go through `.data`, so that autograd does not take the
        # arrival of a row for a change of rows that it has saved.
        self.values = like.new_empty(exchange.slots.n_rows, *shape)
        self.indices = torch.empty_like(self.values, dtype=torch.int32)
        self.wire_dtype = index_dtype(n_features)
        self.gathers: list[list[dist.Work]] = [[] for _ in range(slots)]
        self.wires: list[Tensor | None] = [None] * slots
        self.readers: Counter[int] = Counter()
        self.sums: dict[int, tuple[dist.Work, Tensor]] = {}
        self._csr: list[Tensor] = []
        self._gradients: Tensor | None = None

    @phase("exchange")
    def await_rows(self, rows: slice) -> None:
        """Waits for the slots of some rows that have not arrived yet."""
        for slot in self.exchange.slots.of_rows(rows):
            wire_RBK = self.wires[slot]
            if wire_RBK is None:
                continue
            for work in self.gathers[slot]:
                work.wait()
            filled, ranks = self.exchange.slots.arriving(slot)
            self.indices.data[filled] = wire_RBK[ranks].int()
            self.wires[slot], self.gathers[slot] = None, []
            if self.needs_gradient:
                self._group(filled)

    @phase("exchange")
    def await_all(self) -> None:
        """Waits for the slots that have not arrived yet, without reading them."""
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
        """Grouping of rows that have arrived."""
        return ops.FeatureCSR.from_tensors(self._csr)[rows] if self._csr else None

    def register_reader(self, rows: slice) -> None:
        """Announces an `add_gradient` of these rows."""
        if self.needs_gradient:
            self.readers.update(self.exchange.slots.of_rows(rows))

    def gradients(self) -> Tensor:
        """[L,B,K] sums over the own targets, in the dtype that sums run in."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.values, dtype=accumulator(self.values.dtype))
        return self._gradients

    def add_gradient(self, rows: slice, gradient_SBK: Tensor | None) -> None:
        """Adds what one reader of some rows contributes, and starts the sums that it completes."""
        if gradient_SBK is not None:
            self.gradients()[rows] += gradient_SBK
        self.readers.subtract(self.exchange.slots.of_rows(rows))
        self.exchange.start_sums()

    def own_gradient(self, slot: int) -> Tensor:
        """[B,K] sum over all readers of all ranks, in the dtype that sums run in."""
        work, parts_RBK = self.sums.pop(slot)
        work.wait()
        return parts_RBK.sum(dim=0)


class _Send(torch.autograd.Function):
    """Between an encoder and the gather of its codes; the scalar it returns only anchors the sum in the graph."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, buffers: ExchangeBuffers, slot: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.buffers, ctx.slot, ctx.dtype = buffers, slot, values_BK.dtype
        buffers.exchange.gather(buffers, slot, values_BK, indices_BK)
        return values_BK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # Every reader of this rank has been here: each takes all anchors.
        return ctx.buffers.own_gradient(ctx.slot).to(ctx.dtype), None, None, None


class _Take(torch.autograd.Function):
    """Between the gathered codes and a decoder that reads some of them."""

    @staticmethod
    def forward(ctx: Any, buffers: ExchangeBuffers, rows: slice, *anchors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.buffers, ctx.rows, ctx.n_anchors = buffers, rows, len(anchors)
        buffers.register_reader(rows)
        return buffers.values[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.buffers.add_gradient(ctx.rows, gradients[0])
        return (None,) * (2 + ctx.n_anchors)


def index_dtype(n_features: int) -> torch.dtype:
    """Dtype in which feature numbers are sent."""
    return torch.int16 if n_features <= 1 << 15 else torch.int32


def slot_count(shares: Sequence[LayerShare]) -> int:
    """Slots of an exchange: sources of the rank that has most."""
    return max(len(share.sources) for share in shares)


def exchange_bytes(shares: Sequence[LayerShare], n_features: int, tokens: int, k: int, dtype: torch.dtype) -> int:
    """Bytes that every rank of a model group sends, and receives, for one exchange of codes and its gradients.

    With R ranks and C slots: C (R - 1) tokens k (value + index + gradient), the gradient in the dtype of its sums.

    Args:
        shares: from `deal_layers`.
        n_features: F.
        tokens: B, tokens of the exchange that a rank sees; AuxK's has fewer.
        k: slots per token and layer.
        dtype: of the values.

    Returns:
        The sum over all-gathers and reduce-scatters.
    """
    slot_bytes = dtype.itemsize + index_dtype(n_features).itemsize + accumulator(dtype).itemsize
    return slot_count(shares) * (len(shares) - 1) * tokens * k * slot_bytes
