"""One rank of a model group without the others, whose codes are given, to measure on one device what each would do.

The rank owns the same layers, decodes as many codes and returns as many gradients as in a real job; no data is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from clt.distributed.mesh import Mesh


class _Done(dist.Work):
    """A finished collective."""

    def wait(self, timeout: object = None) -> bool:
        """Returns at once."""
        return True


@dataclass(frozen=True, kw_only=True)
class LoneMesh(Mesh):
    """A mesh of one process that has the place of the first of several layer ranks.

    Attributes:
        n_features: F; the given codes name features evenly, and all their slots are filled.
        codes: values and indices [B,K] used as those of every other rank, by shape.
    """

    n_features: int
    codes: dict[torch.Size, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, alone: Mesh, ranks: int, n_features: int) -> LoneMesh:
        """The first of some layer ranks.

        Args:
            alone: mesh of a job of one process.
            ranks: of the layer axis.
            n_features: F.
        """
        return cls(**vars(alone) | {"layer_size": ranks}, n_features=n_features)

    def start_gather(self, parts: Sequence[Tensor], own: Tensor) -> dist.Work:
        """Fills in the given codes instead of those of other ranks."""
        if own.shape not in self.codes:
            self.codes[own.shape] = _draw(own, self.n_features)
        values_BK, indices_BK = self.codes[own.shape]
        for rank, part in enumerate(parts):
            part.copy_(own if rank == self.model_rank else values_BK if own.is_floating_point() else indices_BK)
        return _Done()

    def start_all_to_all(self, parts_R: Tensor, own_R: Tensor) -> dist.Work:
        """Takes zero gradients from other ranks."""
        parts_R.zero_()[self.model_rank] = own_R[self.model_rank]
        return _Done()

    def get_model_parallel_rank(self) -> int:
        """Place in the group of the existing processes, which DeepSpeed sees."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Number of existing processes."""
        return 1


def _draw(like_BK: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Random codes in the order in which the encoder gives them, ascending by feature."""
    tokens, k = like_BK.shape
    draw = torch.Generator(like_BK.device).manual_seed(3)
    scores_BF = torch.rand(tokens, n_features, generator=draw, device=like_BK.device)
    values_BK, indices_BK = scores_BF.topk(k, dim=1)
    return values_BK, indices_BK.sort(dim=1).values
