"""One rank of a model group by itself: the codes of the others are given, so that one device shows what each would do.

Nothing else is different from the rank of a real job: it owns the same layers, decodes the same codes, and hands back
as many gradients; they are not waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh


class LoneMesh(Mesh):
    """A mesh of one process that has the place of a rank among others; DeepSpeed must not look for these."""

    def get_model_parallel_rank(self) -> int:
        """Place in the group of processes that exist."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Processes that exist."""
        return 1


def lone_rank(mesh: Mesh, ranks: int) -> Mesh:
    """The place of the first of some layer ranks, for the only process of a job."""
    alone = LoneMesh(**{key: value for key, value in vars(mesh).items()})
    return replace(alone, layer_size=ranks)


class _Arrived:
    """A collective that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextmanager
def given_codes(n_features: int) -> Iterator[None]:
    """While the block runs, every exchange gets codes of the other ranks from here instead of from them.

    Args:
        n_features: F; the codes name features evenly, and all their slots are filled.
    """
    codes: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def gather(self: CodeExchange, cargo: Any, slot: int, values_BK: Tensor, indices_BK: Tensor) -> None:
        rows = self.slots.rows[slot]
        shape = tuple(values_BK.shape)
        if shape not in codes:
            codes[shape] = _draw(values_BK, n_features)
        given_values, given_indices = codes[shape]
        own = rows[self.mesh.model_rank]
        wire_RBK = given_indices.new_empty(len(rows), *shape, dtype=cargo.wire_dtype)
        for rank, row in enumerate(rows):
            if row is not None:
                cargo.values.data[row] = values_BK.detach() if row == own else given_values
                wire_RBK[rank] = indices_BK if row == own else given_indices
        cargo.wires[slot], cargo.gathers[slot] = wire_RBK, []
        if cargo.needs_gradient:
            self._awaiting_sum.append((weakref.ref(cargo), slot))

    def sum_up(self: CodeExchange, cargo: Any, slot: int) -> None:
        row = self.slots.rows[slot][self.mesh.model_rank]
        if row is not None:
            gradients_LBK = cargo.gradients()
            parts_RBK = gradients_LBK.new_zeros(len(self.slots.rows[slot]), *gradients_LBK.shape[1:])
            parts_RBK[self.mesh.model_rank] = gradients_LBK[row]
            cargo.sums[slot] = (_Arrived(), parts_RBK)

    with ExitStack() as stack:
        for name, function in (("gather", gather), ("_sum", sum_up)):
            stack.callback(setattr, CodeExchange, name, getattr(CodeExchange, name))
            setattr(CodeExchange, name, function)
        yield


def _draw(like_BK: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    tokens, k = like_BK.shape
    draw = torch.Generator(like_BK.device).manual_seed(3)
    scores_BF = torch.rand(tokens, n_features, generator=draw, device=like_BK.device)
    values_BK, indices_BK = scores_BF.topk(k, dim=1)
    # Ascending, as the encoder gives them.
    return values_BK.to(like_BK.dtype), indices_BK.sort(dim=1).values.int()
