"""The whole transcoder on one process: from the shares of a model group onto the CPU of the job's first rank.

Shares travel one matrix at a time, so that no rank holds more than its share and one [F,D] matrix besides; the first
rank holds the whole transcoder. For measures that cannot be taken of a share, such as those of the replacement model.
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
    """Brings the shares of all ranks to the first one.

    Args:
        transcoder: this rank's share.
        mesh: the processes; all ranks call this together.

    Returns:
        A copy of the whole transcoder on the CPU of the first rank, in evaluation mode and without gradients; None on
        the other ranks.
    """
    if mesh.data_rank != 0:
        return None
    if not mesh.is_first:
        for own in _matrices(transcoder, transcoder.share, whole=False):
            # The default group's first ranks are the first model group, in its order.
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
    """Everything that a share holds, in one order on all ranks, at most a matrix at a time.

    Args:
        transcoder: the transcoder that has it.
        share: whose part.
        whole: whether `clt` has all columns of the targets, or the share's only.
    """
    for layer in sorted({*share.sources, *share.targets}):
        for key, tensor in (layer_tensors(transcoder, layer) | layer_buffers(transcoder, layer)).items():
            if layer in (share.targets if key in COLUMN_DIMS else share.sources):
                part = own_columns(key, tensor.detach(), share.columns if whole else None)
                yield from part if part.dim() == 3 else [part]
