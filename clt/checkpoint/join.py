"""Joins source layers that were trained independently by separate jobs into one transcoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from clt.checkpoint.weights import CARD_FILE, layer_buffers, layer_tensors
from clt.errors import CheckpointError
from clt.transcoder.model import CrossLayerTranscoder


def join_folders(folders: Sequence[Path], out: Path) -> Path:
    """Joins the outputs of jobs with `clt.source`, and saves the result.

    Args:
        folders: outputs of the jobs, or single checkpoints.
        out: folder for the whole transcoder.

    Returns:
        That folder.

    Raises:
        CheckpointError: a folder cannot be read, `out` holds a transcoder, or the parts do not fit together.
    """
    if (out / CARD_FILE).exists():
        raise CheckpointError(f"{out}: a transcoder exists here already; use another folder")
    join_transcoders([CrossLayerTranscoder.from_pretrained(folder) for folder in folders]).save_pretrained(out)
    return out


@torch.no_grad()
def join_transcoders(parts: Sequence[CrossLayerTranscoder]) -> CrossLayerTranscoder:
    """Joins transcoders of single source layers, as if one job had trained them.

    Args:
        parts: one transcoder per source layer, with the same settings, model and store.

    Returns:
        The transcoder of all source layers, without gradients.

    Raises:
        CheckpointError: a source layer is missing or given twice, or two parts differ in settings, model or store.
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
        raise CheckpointError(f"missing source layers {', '.join(map(str, missing))}; train them with clt.source too")
    return whole


def _check_parts(parts: Sequence[CrossLayerTranscoder]) -> None:
    if not parts:
        raise CheckpointError("nothing to join; give output folders of jobs with clt.source")
    first, seen = parts[0], set[int]()
    for part in parts:
        source = part.config.source
        if source is None:
            raise CheckpointError("cannot join a transcoder of all source layers; give outputs of jobs with clt.source")
        if source in seen:
            raise CheckpointError(f"source {source} is given twice; give each output once")
        seen.add(source)
        known = part.scaling.tensors()
        if not (
            replace(part.config, source=None) == replace(first.config, source=None)
            and replace(part.provenance, training=first.provenance.training) == first.provenance
            and all(torch.equal(tensor, known[key]) for key, tensor in first.scaling.tensors().items())
        ):
            raise CheckpointError(
                f"sources {first.config.source} and {source} differ in settings, model or store; train them "
                "with the same"
            )
