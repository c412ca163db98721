"""One transcoder from source layers that were trained independently, each by a job of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from clt.checkpoint.weights import CARD_FILE, layer_buffers, layer_tensors
from clt.errors import CheckpointError
from clt.transcoder.model import CrossLayerTranscoder


def join_folders(folders: Sequence[Path], out: Path) -> Path:
    """Joins what jobs with `clt.source` wrote, and writes it.

    Args:
        folders: outputs of the jobs, or single checkpoints.
        out: folder for the whole transcoder.

    Returns:
        That folder.

    Raises:
        CheckpointError: a folder cannot be read, `out` holds a transcoder, or the parts do not make a whole.
    """
    if (out / CARD_FILE).exists():
        raise CheckpointError(f"{out}: there is a transcoder already; name another folder")
    join_transcoders([CrossLayerTranscoder.from_pretrained(folder) for folder in folders]).save_pretrained(out)
    return out


@torch.no_grad()
def join_transcoders(parts: Sequence[CrossLayerTranscoder]) -> CrossLayerTranscoder:
    """The transcoder of all source layers, as if one job had trained them.

    Args:
        parts: one transcoder for every source layer, of the same settings, model and store.

    Returns:
        The whole, without gradients.

    Raises:
        CheckpointError: a source layer is missing or comes twice, or two parts are of different jobs.
    """
    _check_parts(parts)
    first = parts[0]
    provenance = replace(first.provenance, training=None)
    whole = CrossLayerTranscoder(replace(first.config, source=None), first.scaling, provenance=provenance)
    whole.to(first.dtype).requires_grad_(False)
    for part in parts:
        (source,) = part.share.sources
        of_whole = layer_tensors(whole, source) | layer_buffers(whole, source)
        for key, tensor in (layer_tensors(part, source) | layer_buffers(part, source)).items():
            if key not in ("W_dec", "b_dec"):
                of_whole[key].copy_(tensor)
        for target in part.share.targets:
            row = whole.sources_of(target).index(source)
            whole.decoder_matrix(target)[row] = part.decoder_matrix(target)[0]
            whole.decoder_bias(target)[row] = part.decoder_bias(target)[0]
    missing = sorted({*whole.share.sources} - {part.config.source for part in parts})
    if missing:
        raise CheckpointError(f"no part has source {', '.join(map(str, missing))}; train them with clt.source too")
    return whole


def _check_parts(parts: Sequence[CrossLayerTranscoder]) -> None:
    if not parts:
        raise CheckpointError("there is nothing to join; name the outputs of jobs with clt.source")
    first, seen = parts[0], set[int]()
    for part in parts:
        source = part.config.source
        if source is None:
            raise CheckpointError("a transcoder of all source layers cannot be joined; name outputs with clt.source")
        if source in seen:
            raise CheckpointError(f"source {source} comes twice; name each output once")
        seen.add(source)
        known = part.scaling.tensors()
        if not (
            replace(part.config, source=None) == replace(first.config, source=None)
            and replace(part.provenance, training=first.provenance.training) == first.provenance
            and all(torch.equal(tensor, known[key]) for key, tensor in first.scaling.tensors().items())
        ):
            raise CheckpointError(
                f"sources {first.config.source} and {source} were trained with other settings, model or store; train "
                "them alike"
            )
