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
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from clt.distributed.code_flight import Cargo, CodeFlight, Send, Slots, index_dtype
from clt.distributed.mesh import Mesh
from clt.kernels.dtypes import accumulator
from clt.records import SparseCodes
from clt.tensor_files import as_bytes
from clt.transcoder.layers import LayerShare


class CodeExchange:
    """Brings every rank of the model group the codes of all source layers.

    Args:
        mesh: the processes.
        shares: what `deal_layers` gave, one share per rank of the model group.

    Attributes:
        mesh: the processes.
        slots: which source layers travel together.
    """

    def __init__(self, mesh: Mesh, shares: Sequence[LayerShare]) -> None:
        self.mesh = mesh
        self.slots = Slots.of_shares(shares)
        # Sums start in the reverse order of gathers. Weak: a forward pass without backward leaves nothing behind.
        self._awaiting_sum: list[tuple[weakref.ref[Cargo], int]] = []
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
        values, indices, _ = flight.take(slice(0, self.slots.n_rows))
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
        cargo = Cargo(self, self.slots.n_rows, shape, n_features, like, returns)
        own, tickets = [], []
        for slot, (values_BK, indices_BK) in enumerate(codes):
            own.append((values_BK, indices_BK))
            tickets.append(Send.apply(values_BK, indices_BK, cargo, slot))
        for slot in range(len(own), len(self.slots.rows)):
            self.gather(cargo, slot, like.new_zeros(*shape), like.new_zeros(*shape, dtype=torch.int32))
        empty = like.new_empty(0, *shape), like.new_empty(0, *shape, dtype=torch.int32)
        values, indices = (torch.stack(part) for part in zip(*own, strict=True)) if own else empty
        return CodeFlight(cargo, tickets, SparseCodes(values=values, indices=indices, n_features=n_features))

    def last_slot(self, rows: slice) -> int:
        """Slot with which the last of some rows of codes [L,B,K] arrives."""
        return self.slots.of_rows(rows)[-1]

    def gather(self, cargo: Cargo, slot: int, values_BK: Tensor, indices_BK: Tensor) -> None:
        """Starts the all-gather of one slot. Everything travels as bytes: neither gloo nor NCCL knows int16."""
        rows, group = self.slots.rows[slot], self.mesh.model_group
        spare_BK = torch.empty_like(cargo.values[0])
        parts = [as_bytes(spare_BK if row is None else cargo.values.data[row]) for row in rows]
        own, numbers = values_BK.detach().contiguous(), indices_BK.to(cargo.wire_dtype).contiguous()
        wire_RBK = numbers.new_empty(len(rows), *numbers.shape)
        cargo.gathers[slot] = [
            dist.all_gather(parts, as_bytes(own), group=group, async_op=True),
            dist.all_gather(list(as_bytes(wire_RBK).unbind()), as_bytes(numbers), group=group, async_op=True),
        ]
        cargo.wires[slot] = wire_RBK
        self.mesh.traffic.count("model", "all_gather", own.nbytes + numbers.nbytes, len(rows))
        if cargo.needs_gradient:
            self._awaiting_sum.append((weakref.ref(cargo), slot))

    def start_sums(self) -> None:
        """Starts the reduce-scatters of slots that are complete, as far as the common order allows."""
        while self._awaiting_sum:
            reference, slot = self._awaiting_sum[-1]
            cargo = reference()
            if cargo is not None:
                if cargo.readers[slot]:
                    return
                self._sum(cargo, slot)
            self._awaiting_sum.pop()

    def _sum(self, cargo: Cargo, slot: int) -> None:
        """Starts the reduce-scatter of one slot's gradients; its additions are ours, in order of rank, after arrival.

        Gloo has none of its own: it sends twice the bytes of an all-to-all. And NCCL chooses the order itself.
        """
        rows = self.slots.rows[slot]
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


def slot_count(shares: Sequence[LayerShare]) -> int:
    """Slots of a flight: sources of the rank that has most."""
    return max(len(share.sources) for share in shares)


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
