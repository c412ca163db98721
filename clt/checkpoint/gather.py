"""Gathers the shares of a model group into a whole transcoder on the CPU of the job's first rank.

Shares are sent one matrix at a time: other ranks hold one extra [F,D] matrix at most. Used for measures that need all
layers, such as those of the replacement model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from clt.checkpoint.columns import COLUMN_DIMS, own_columns
from clt.checkpoint.weights import layer_buffers, layer_tensors
from clt.distributed.mesh import Mesh, deal_layers
from clt.tensor_files import as_bytes
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder


@torch.no_grad()
def gather_transcoder(transcoder: CrossLayerTranscoder, mesh: Mesh) -> CrossLayerTranscoder | None:
    """Gathers the shares of all ranks on the first one.

    Args:
        transcoder: this rank's share.
        mesh: the processes; a collective call of all ranks.

    Returns:
        A copy of the whole transcoder on the CPU of the first rank, in evaluation mode, without gradients; None on the
        other ranks.
    """
    if mesh.data_rank != 0:
        return None
    if not mesh.is_first:
        for own in _matrices(transcoder, transcoder.share, whole=False):
            # The first ranks of the default group are the first model group, in its order.
            dist.send(as_bytes(own.cpu().contiguous()), dst=0)
        return None
    whole = CrossLayerTranscoder(transcoder.config, transcoder.scaling, provenance=transcoder.provenance)
    whole.to(next(transcoder.parameters()).dtype).requires_grad_(False).eval()
    for rank, share in enumerate(deal_layers(transcoder.config, mesh.layer_size, mesh.column_size)):
        places = _matrices(whole, share, whole=True)
        if rank == 0:
            for place, own in zip(places, _matrices(transcoder, share, whole=False), strict=True):
                place.copy_(own)
            continue
        for place in places:
            arrived = torch.empty(place.shape, dtype=place.dtype)
            dist.recv(as_bytes(arrived), src=rank)
            place.copy_(arrived)
    return whole


def _matrices(transcoder: CrossLayerTranscoder, share: LayerShare, *, whole: bool) -> Iterator[Tensor]:
    """All tensors of a share, in the same order on all ranks, at most a matrix at a time.

    Args:
        transcoder: transcoder that holds them.
        share: layers and columns to iterate over.
        whole: whether `transcoder` holds all columns of the targets, or those of the share only.
    """
    for layer in sorted({*share.sources, *share.targets}):
        for key, tensor in (layer_tensors(transcoder, layer) | layer_buffers(transcoder, layer)).items():
            if layer in (share.targets if key in COLUMN_DIMS else share.sources):
                part = own_columns(key, tensor.detach(), share.columns if whole else None)
                yield from part if part.dim() == 3 else [part]
