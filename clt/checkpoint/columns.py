"""Tensors that the column ranks of a layer rank own together: sliced when a file is read, joined when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clt.distributed.mesh import Mesh
from clt.tensor_files import as_bytes

#: Dimension along which each tensor of a target is split; the others belong to one rank as a whole.
COLUMN_DIMS = {"W_dec": -1, "b_dec": -1, "W_skip": 0}

#: Prefix of tensors with one number for each row of a weight: the step at which an optimizer moved it last.
LAST_STEP = "last_step"
_ROW_DIMS = {"W_skip": 0}

_HEADER_BYTES = 4096


def own_columns(key: str, whole: Tensor, columns: range | None) -> Tensor:
    """The part of a tensor that a rank owns.

    Args:
        key: name of the tensor in a file, also behind a prefix such as `exp_avg.`.
        whole: all of it.
        columns: the rank's channels, None for all.

    Returns:
        A view; narrower where `whole` has too few channels.
    """
    dim = _split_dim(key)
    if columns is None or dim is None:
        return whole
    own = slice(columns.start, columns.stop)
    return whole[own] if dim == 0 else whole[..., own]


def join_columns(own: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor] | None:
    """Brings tensors of one layer to the first column rank, one after the other.

    Args:
        own: this rank's tensors or parts of tensors.
        mesh: the processes; all column ranks call this together.

    Returns:
        The whole tensors, on the CPU where they came from other ranks; None on all but the first column rank.
    """
    if mesh.column_size == 1:
        return dict(own)
    if mesh.column_rank > 0:
        _send(own, mesh)
        return None
    parts = [{key: tensor.detach().cpu() for key, tensor in own.items()}]
    parts += [_receive(rank, mesh) for rank in range(1, mesh.column_size)]
    joined = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        tensors = [part[key] for part in parts if key in part]
        dim = _split_dim(key)
        joined[key] = tensors[0] if dim is None else torch.cat(tensors, dim)
    return joined


def _split_dim(key: str) -> int | None:
    prefix, _, name = key.rpartition(".")
    return (_ROW_DIMS if prefix == LAST_STEP else COLUMN_DIMS).get(name)


def _send(tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    header = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in tensors.items()}
    text = json.dumps(header).encode()
    assert len(text) <= _HEADER_BYTES, "a layer has a handful of tensors"
    buffer = torch.tensor(list(text.ljust(_HEADER_BYTES)), dtype=torch.uint8)
    dist.send(buffer, group=mesh.column_group, group_dst=0)
    for tensor in tensors.values():
        dist.send(as_bytes(tensor.detach().cpu().contiguous()), group=mesh.column_group, group_dst=0)


def _receive(rank: int, mesh: Mesh) -> dict[str, Tensor]:
    buffer = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
    dist.recv(buffer, group=mesh.column_group, group_src=rank)
    header: dict[str, Any] = json.loads(bytes(buffer.tolist()))
    tensors = {}
    for key, (shape, dtype) in header.items():
        tensors[key] = torch.empty(shape, dtype=getattr(torch, dtype))
        dist.recv(as_bytes(tensors[key]), group=mesh.column_group, group_src=rank)
    return tensors
