"""The node table of a graph, and the pictures on which its image nodes are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clt.attribution.graphs.graph import BiasKind, GraphImage, NodeKind, NodeTable
from clt.attribution.graphs.sources import Sources
from clt.attribution.graphs.targets import ResolvedTarget
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.records import Modality

#: Longest side in pixels of a picture stored in a graph.
_PICTURE_SIDE = 1024
_DTYPES = {"kind": torch.uint8, "position": torch.int32, "feature": torch.int32, "activation": torch.float32}


def node_table(sources: Sources, targets: Sequence[ResolvedTarget], inputs: PromptInputs) -> NodeTable:
    """Describes all columns of a graph.

    Args:
        sources: features, errors, tokens and biases of the prompt.
        targets: targets of the graph.
        inputs: the prompt.

    Returns:
        One node per column of `Sources.rows`, then the targets' own bias, then the targets.
    """
    features, S, L = sources.features, sources.linear.n_positions, sources.linear.n_layers
    tokens = inputs.tokens.select(0)
    is_image = (tokens.modality == Modality.IMAGE) | (tokens.modality == Modality.IMAGE_SPECIAL)
    found = [item.target for item in targets]
    parts = [
        _part(
            len(features),
            kind=NodeKind.FEATURE,
            layer=features.layer,
            position=features.position,
            feature=features.number,
            activation=features.activation,
        ),
        _part(
            L * S,
            kind=NodeKind.ERROR,
            layer=torch.arange(L).repeat_interleave(S),
            position=torch.arange(S).repeat(L),
            activation=sources.errors.norm(dim=-1).flatten(),
        ),
        _part(
            S,
            kind=torch.where(is_image, int(NodeKind.IMAGE), int(NodeKind.TEXT)),
            position=torch.arange(S),
            feature=tokens.token_id,
            activation=sources.linear.recording.embed.norm(dim=-1),
            image=tokens.image,
            patch_row=tokens.patch_row,
            patch_col=tokens.patch_col,
        ),
        _bias_part(sources),
        _part(
            len(found),
            kind=NodeKind.LOGIT,
            layer=[target.layer for target in found],
            position=[target.position for target in found],
            feature=[max(target.token_id, target.feature) for target in found],
            activation=[float(item.readout.value[0]) for item in targets],
        ),
    ]
    return NodeTable(**{f.name: torch.cat([part[f.name] for part in parts]) for f in fields(NodeTable)})


def _bias_part(sources: Sources) -> dict[str, Tensor]:
    kinds = [BiasKind.DECODER] * len(sources.targets) + [BiasKind.ATTENTION] * len(sources.biased)
    return _part(
        len(kinds) + 1,
        kind=NodeKind.BIAS,
        layer=[*sources.targets, *sources.biased, -1],
        feature=[*kinds, BiasKind.TARGET],
        activation=[*sources.bias_norms(), 0.0],
    )


def _part(n: int, **columns: Any) -> dict[str, Tensor]:
    """Columns of n nodes; a single value is repeated, a missing column is -1."""
    part = {}
    for field in fields(NodeTable):
        values = torch.as_tensor(columns.get(field.name, -1)).cpu().to(_DTYPES.get(field.name, torch.int16))
        part[field.name] = values.expand(n).contiguous()
    return part


def graph_images(adapter: ModelAdapter, inputs: PromptInputs) -> tuple[GraphImage, ...]:
    """The pictures of a prompt, scaled down if large, with the grid of patches that covers them.

    Args:
        adapter: the model; its image processor decides how the picture is cropped.
        inputs: one prompt.
    """
    found = []
    for number, picture in enumerate(inputs.images[0]):
        small = picture.convert("RGB")
        small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
        # Models whose patch grid follows the picture's shape do not crop, whatever crop size is configured.
        whole = (0.0, 0.0, float(small.width), float(small.height))
        box = whole if adapter.size_matters else seen_box(adapter.image_processor, *small.size)
        found.append(GraphImage(pixels=torch.from_numpy(np.array(small)), grid=inputs.grid(0, number), box=box))
    return tuple(found)


def seen_box(image_processor: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """The part of a picture that the model gets: all of it, or its centre crop.

    Args:
        image_processor: Hugging Face image processor.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Returns:
        Left, top, right and bottom in pixels; outside of the picture where the crop is padded.
    """
    edge = (getattr(image_processor, "size", None) or {}).get("shortest_edge")
    if not getattr(image_processor, "do_center_crop", False) or edge is None:
        return 0.0, 0.0, float(width), float(height)
    crop, scale = image_processor.crop_size, edge / min(width, height)
    half_width, half_height = crop["width"] / scale / 2, crop["height"] / scale / 2
    return width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height
