"""The mesh of processes and what travels on it: sparse codes instead of weights or dense activations.

Layer axis: a rank owns some target layers with all decoders into them, and as many encoders. A step encodes the own
sources, gathers everybody's (value, index) codes, decodes the own targets, and scatters the summed gradients of the
codes back to the encoders' owners. Data axis: replicas of that on other tokens, kept equal by `clt.engine`. A world of
one process runs the same code.

Shape letters: L source layers, B tokens, K active features per token and layer; C slots for layers of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CLTError, ConfigError
from clt.model import LayerShare, source_layers, sources_of, target_layers
from clt.records import SparseCodes

Axis = Literal["data", "world"]

_MESSAGE_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place on the data axis x layer axis; the `get_*` methods are DeepSpeed's `mpu` protocol.

    Attributes:
        data_rank: place on the data axis.
        data_size: replicas.
        layer_rank: place on the layer axis.
        layer_size: ranks over which the layers are dealt.
        data_group: the ranks that own the same layers.
        layer_group: the ranks that see the same tokens.
    """

    data_rank: int
    data_size: int
    layer_rank: int
    layer_size: int
    data_group: dist.ProcessGroup
    layer_group: dist.ProcessGroup

    @classmethod
    def create(cls, layer_size: int) -> Mesh:
        """Arranges the processes of the initialised default group; every rank must call it.

        Args:
            layer_size: ranks of the layer axis; neighbouring ranks share it.

        Raises:
            ConfigError: the world does not divide by layer_size.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        check_world(world, layer_size)
        data_size = world // layer_size
        layer_groups = [dist.new_group([d * layer_size + i for i in range(layer_size)]) for d in range(data_size)]
        data_groups = [dist.new_group(list(range(i, world, layer_size))) for i in range(layer_size)]
        data_rank, layer_rank = divmod(rank, layer_size)
        return cls(
            data_rank=data_rank,
            data_size=data_size,
            layer_rank=layer_rank,
            layer_size=layer_size,
            data_group=data_groups[layer_rank],
            layer_group=layer_groups[data_rank],
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks to the user."""
        return self.data_rank == 0 and self.layer_rank == 0

    def all_reduce(self, tensor: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduces a tensor in place over the data axis or the world and returns it."""
        dist.all_reduce(tensor, op, group=self.data_group if axis == "data" else None)
        return tensor

    @contextmanager
    def together(self, failure: type[CLTError]) -> Iterator[None]:
        """Runs a block that has no collectives on every rank; if it fails on any, all raise that rank's message.

        Args:
            failure: class of the error that all ranks raise.
        """
        message = None
        try:
            yield
        except CLTError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'file system'}: {error.strerror or error}"
        first = _first_message(message)
        if first is not None:
            raise failure(first)

    def get_model_parallel_rank(self) -> int:
        """Place on the layer axis."""
        return self.layer_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the layer axis."""
        return self.layer_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Group of the layer axis."""
        return self.layer_group

    def get_data_parallel_rank(self) -> int:
        """Place on the data axis."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data axis."""
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group of the data axis."""
        return self.data_group


def check_world(world_size: int, layer_size: int) -> None:
    """ConfigError unless the processes fill the mesh."""
    if world_size % layer_size:
        raise ConfigError(
            f"mesh.layer={layer_size} does not divide the {world_size} processes; change mesh.layer or --nproc_per_node"
        )


def deal_layers(config: CLTConfig, n_ranks: int) -> tuple[LayerShare, ...]:
    """Deals target layers by cost, and with each target one source layer.

    The cost of a target is its [F,D] matrices: one decoder per source, and the encoder dealt with it. The dearest goes
    first, always to the rank with the least cost that owns less than its even number of layers. A layer that is source
    and target stays whole, so that one rank reads its activations and writes its checkpoint file.

    Args:
        config: architecture.
        n_ranks: ranks of the layer axis.

    Returns:
        One share per rank; the same on every rank.

    Raises:
        ConfigError: there are fewer target layers than ranks.
    """
    sources, targets = source_layers(config), target_layers(config)
    if n_ranks > len(targets):
        raise ConfigError(f"mesh.layer={n_ranks} exceeds the {len(targets)} target layers; lower mesh.layer")
    lonely_targets = [layer for layer in targets if layer not in sources]
    lonely_sources = [layer for layer in sources if layer not in targets]
    source_with = {layer: layer for layer in targets} | dict(zip(lonely_targets, lonely_sources, strict=True))

    room = -(-len(targets) // n_ranks)
    dealt: list[list[int]] = [[] for _ in range(n_ranks)]
    cost = [0] * n_ranks
    for target in sorted(targets, key=lambda layer: (-len(sources_of(config, layer)), layer)):
        rank = min((r for r in range(n_ranks) if len(dealt[r]) < room), key=lambda r: (cost[r], r))
        dealt[rank].append(target)
        cost[rank] += len(sources_of(config, target)) + 1
    return tuple(
        LayerShare(sources=tuple(sorted(source_with[t] for t in own)), targets=tuple(sorted(own))) for own in dealt
    )


def input_layers(config: CLTConfig, share: LayerShare) -> tuple[int, ...]:
    """Layers whose encoder input a rank reads: its sources, and its targets too when they have a skip connection."""
    return tuple(sorted({*share.sources, *(share.targets if config.skip else ())}))


class CodeExchange:
    """Brings every rank of the layer axis the codes of all source layers.

    Args:
        mesh: the processes.
        shares: what `deal_layers` gave, one share per layer rank.
    """

    def __init__(self, mesh: Mesh, shares: Sequence[LayerShare]) -> None:
        self._group = mesh.layer_group
        self._slots = max(len(share.sources) for share in shares)
        place = {
            layer: rank * self._slots + row
            for rank, share in enumerate(shares)
            for row, layer in enumerate(share.sources)
        }
        self._rows = torch.tensor([place[layer] for layer in sorted(place)])

    def __call__(self, codes: SparseCodes) -> SparseCodes:
        """Gathers codes; differentiable with respect to the values.

        Args:
            codes: [L_own,B,K] of this rank's sources, in the order of its share; K and B alike on all ranks.

        Returns:
            Codes [L,B,K] of all sources in ascending order. The gradient of the values is summed over the layer axis.
        """
        rows = self._rows.to(codes.values.device)
        gathered: Tensor = _GatherValues.apply(self._padded(codes.values), self._group)
        return SparseCodes(
            values=gathered.index_select(0, rows),
            indices=_gather(self._padded(codes.indices), self._group).index_select(0, rows),
            n_features=codes.n_features,
        )

    def _padded(self, own_LBK: Tensor) -> Tensor:
        missing = self._slots - len(own_LBK)
        if missing:
            own_LBK = torch.cat([own_LBK, own_LBK.new_zeros(missing, *own_LBK.shape[1:])])
        return own_LBK.contiguous()


class _GatherValues(torch.autograd.Function):
    """All-gather forward; the gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, own_CBK: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(own_CBK, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = [part.contiguous() for part in gradients[0].chunk(dist.get_world_size(ctx.group))]
        own_CBK = torch.empty_like(parts[0])
        dist.reduce_scatter(own_CBK, parts, group=ctx.group)
        return own_CBK, None


def _gather(own_CBK: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(own_CBK) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own_CBK, group=group)
    return torch.cat(parts)


def _first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, on every rank; None when none has."""
    world = dist.get_world_size()
    speaker = torch.tensor(world if message is None else dist.get_rank())
    dist.all_reduce(speaker, dist.ReduceOp.MIN)
    if int(speaker) == world:
        return None
    text = (message or "").encode()[:_MESSAGE_BYTES]
    buffer = torch.tensor(list(text.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8)
    dist.broadcast(buffer, int(speaker))
    return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")
