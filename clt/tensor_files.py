"""Tensors as bytes for communication, and safetensors files with the access rights of the user's umask."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 view of a contiguous tensor, its last dimension widened: shares memory, so it can be sent and received."""
    return torch.atleast_1d(tensor).view(torch.uint8)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors of any device and layout with the access rights that the user's umask gives.

    Args:
        path: the file, replaced if it exists.
        tensors: by name.
        metadata: strings for the header.

    Raises:
        OSError: the file cannot be written.
        SafetensorError: the same, as the library reports it.
    """
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    # The library makes the file private; on a shared cluster results are for the group.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
