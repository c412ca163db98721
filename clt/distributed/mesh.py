"""The mesh of processes and the share of the transcoder that each of them owns.

Three axes: data x layer x column, rank = (data*layer_size + layer)*column_size + column. The ranks of one data index
are a model group: they see the same tokens and own one transcoder together. A layer rank owns some target layers with
all decoders into them, and as many encoders; its column ranks split these decoders by output channels and deal the
encoders among themselves. They exchange codes (`clt.distributed.code_exchange`). The data axis has data-parallel
replicas on other tokens, kept equal by `clt.training.deepspeed_engine`. One process runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clt.distributed.traffic import Traffic
from clt.errors import CLTError, ConfigError
from clt.tensor_files import as_bytes
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare, source_layers, sources_of, target_layers

Axis = Literal["data", "model", "world"]

_MESSAGE_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place on the three axes; the `get_*` methods are DeepSpeed's `mpu` protocol.

    Attributes:
        data_rank: place on the data axis.
        data_size: data-parallel replicas.
        layer_rank: place on the layer axis.
        layer_size: ranks over which the layers are distributed.
        column_rank: place on the column axis.
        column_size: ranks over which the decoders of a target are split.
        data_group: the ranks that own the same share.
        model_group: the ranks that see the same tokens.
        column_group: the ranks of the model group that own the same targets.
        traffic: bytes that this rank has moved.
    """

    data_rank: int
    data_size: int
    layer_rank: int
    layer_size: int
    column_rank: int
    column_size: int
    data_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    column_group: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def create(cls, layer_size: int, column_size: int = 1) -> Mesh:
        """Arranges the processes of the initialised default group in a mesh; every rank must call it.

        Args:
            layer_size: ranks of the layer axis.
            column_size: ranks of the column axis; neighbouring ranks share it.

        Raises:
            ConfigError: the world does not divide by layer_size * column_size.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        check_world(world, layer_size, column_size)
        model_size = layer_size * column_size
        model_groups = [dist.new_group(list(range(i, i + model_size))) for i in range(0, world, model_size)]
        data_groups = [dist.new_group(list(range(i, world, model_size))) for i in range(model_size)]
        column_groups = [dist.new_group(list(range(i, i + column_size))) for i in range(0, world, column_size)]
        data_rank, model_rank = divmod(rank, model_size)
        layer_rank, column_rank = divmod(model_rank, column_size)
        return cls(
            data_rank=data_rank,
            data_size=world // model_size,
            layer_rank=layer_rank,
            layer_size=layer_size,
            column_rank=column_rank,
            column_size=column_size,
            data_group=data_groups[model_rank],
            model_group=model_groups[data_rank],
            column_group=column_groups[rank // column_size],
        )

    @property
    def model_rank(self) -> int:
        """Place in the model group; `deal_layers` gives the shares in this order."""
        return self.layer_rank * self.column_size + self.column_rank

    @property
    def model_size(self) -> int:
        """Ranks of a model group."""
        return self.layer_size * self.column_size

    @property
    def is_first(self) -> bool:
        """True on the rank that logs and writes reports."""
        return self.data_rank == 0 and self.model_rank == 0

    def all_reduce(self, tensor: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduces a tensor in place over an axis and returns it.

        Args:
            tensor: of any shape, alike on all ranks.
            axis: the data axis, the model group or the world.
            op: the reduction.
        """
        groups = {"data": self.data_group, "model": self.model_group, "world": None}
        dist.all_reduce(tensor, op, group=groups[axis])
        self.traffic.count(axis, "all_reduce", tensor.nbytes, dist.get_world_size(groups[axis]))
        return tensor

    def start_gather(self, parts: Sequence[Tensor], own: Tensor) -> dist.Work:
        """Starts an all-gather over the model group, as bytes: neither gloo nor NCCL supports int16."""
        wires = [as_bytes(part) for part in parts]
        return dist.all_gather(wires, as_bytes(own), group=self.model_group, async_op=True)

    def start_all_to_all(self, parts_R: Tensor, own_R: Tensor) -> dist.Work:
        """Starts an all-to-all over the model group of one part per rank."""
        return dist.all_to_all_single(parts_R, own_R, group=self.model_group, async_op=True)

    @contextmanager
    def together(self, failure: type[CLTError]) -> Iterator[None]:
        """Runs a block without collectives; if it fails on any rank, all ranks raise the first failing rank's message.

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
        first = self._first_message(message)
        if first is not None:
            raise failure(first)

    def _first_message(self, message: str | None) -> str | None:
        """The message of the lowest rank that has one, on every rank; None when none has."""
        world = dist.get_world_size()
        speaker = torch.tensor(world if message is None else dist.get_rank())
        if int(self.all_reduce(speaker, "world", dist.ReduceOp.MIN)) == world:
            return None
        text = (message or "").encode()[:_MESSAGE_BYTES]
        buffer = torch.tensor(list(text.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8)
        dist.broadcast(buffer, int(speaker))
        return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")

    def get_model_parallel_rank(self) -> int:
        """Place in the model group."""
        return self.model_rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks of the model group."""
        return self.model_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The model group."""
        return self.model_group

    def get_data_parallel_rank(self) -> int:
        """Place on the data axis."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data axis."""
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group of the data axis."""
        return self.data_group


def check_world(world_size: int, layer_size: int, column_size: int = 1) -> None:
    """Checks that the processes fill the mesh.

    Args:
        world_size: number of processes.
        layer_size: ranks of the layer axis.
        column_size: ranks of the column axis.

    Raises:
        ConfigError: layer_size * column_size does not divide world_size.
    """
    if world_size % (layer_size * column_size):
        key = f"mesh.layer={layer_size}" + (f" times mesh.column={column_size}" if column_size > 1 else "")
        raise ConfigError(f"{key} does not divide the {world_size} processes; change mesh.layer or --nproc_per_node")


def deal_layers(config: CLTConfig, layer_size: int, column_size: int = 1) -> tuple[LayerShare, ...]:
    """Assigns target layers to layer ranks by cost, and with each target one source layer.

    The cost of a target is its number of [F,D] matrices: one decoder per source, and the encoder assigned with it.
    Targets are assigned in order of falling cost, each to the rank of least cost that owns fewer than its even number
    of layers. A layer that is source and target stays with one layer rank, whose first column rank writes its
    checkpoint file. The sources of a layer rank are distributed over its column ranks; a column rank may get none.

    Args:
        config: architecture.
        layer_size: ranks of the layer axis.
        column_size: ranks of the column axis.

    Returns:
        One share per rank of a model group, in order of `Mesh.model_rank`; the same on every rank.

    Raises:
        ConfigError: there are fewer target layers than layer ranks, or the width does not divide by column_size.
    """
    sources, targets = source_layers(config), target_layers(config)
    if layer_size > len(targets):
        raise ConfigError(f"mesh.layer={layer_size} exceeds the {len(targets)} target layers; lower mesh.layer")
    if config.d_model % column_size:
        raise ConfigError(
            f"mesh.column={column_size} does not divide the model's width {config.d_model}; "
            "set mesh.column to a divisor"
        )
    lonely_targets = [layer for layer in targets if layer not in sources]
    lonely_sources = [layer for layer in sources if layer not in targets]
    # A source trained alone has one layer, and leaves its other targets without.
    source_with = {layer: layer for layer in targets if layer in sources}
    source_with |= dict(zip(lonely_targets, lonely_sources, strict=False))

    capacity = -(-len(targets) // layer_size)
    dealt: list[list[int]] = [[] for _ in range(layer_size)]
    cost = [0] * layer_size
    for target in sorted(targets, key=lambda layer: (-len(sources_of(config, layer)), layer)):
        rank = min((r for r in range(layer_size) if len(dealt[r]) < capacity), key=lambda r: (cost[r], r))
        dealt[rank].append(target)
        cost[rank] += len(sources_of(config, target)) + 1
    width = config.d_model // column_size
    return tuple(
        LayerShare(
            sources=tuple(sorted(source_with[t] for t in own if t in source_with))[column::column_size],
            targets=tuple(sorted(own)),
            columns=range(column * width, (column + 1) * width) if column_size > 1 else None,
        )
        for own in dealt
        for column in range(column_size)
    )


def layers_of_rank(shares: tuple[LayerShare, ...], mesh: Mesh) -> tuple[int, ...]:
    """Layers of which a rank and its column ranks own parts; ascending, the same on all of them."""
    first = mesh.layer_rank * mesh.column_size
    group = shares[first : first + mesh.column_size]
    return tuple(sorted({layer for share in group for layer in (*share.sources, *share.targets)}))


def input_layers(config: CLTConfig, share: LayerShare) -> tuple[int, ...]:
    """Layers whose encoder input a rank reads: its sources, and its targets too when they have a skip connection."""
    return tuple(sorted({*share.sources, *(share.targets if config.skip else ())}))
