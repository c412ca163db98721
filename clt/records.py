"""Frozen dataclasses that travel between the rooms of the house.

Shape letters, used in the whole project: B tokens in a batch, S prompt length, L source layers, M target layers,
D d_model, F features per layer, K active features per token and layer, H heads. Layer first everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad


class Modality(IntEnum):
    """What a token is; stored as uint8."""

    TEXT = 0
    IMAGE = 1
    IMAGE_SPECIAL = 2
    BOS = 3
    PAD = 4


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Where each token comes from; all fields share one shape, [B] in batches and stores, [N,S] in prompt batches.

    Attributes:
        sample: int64, number of the sample within its capture job (0 within a prompt batch).
        position: int32, index in the sequence without padding.
        token_id: int32, vocabulary id.
        modality: uint8, a `Modality`.
        patch_row: int16, row of the image patch, -1 for text.
        patch_col: int16, column of the image patch, -1 for text.
        image: int16, which image of the prompt, -1 for text.
    """

    sample: Tensor
    position: Tensor
    token_id: Tensor
    modality: Tensor
    patch_row: Tensor
    patch_col: Tensor
    image: Tensor

    def select(self, index: Tensor | slice | tuple[Tensor | slice | int, ...] | int) -> TokenTable:
        """The same table indexed alike in every field."""
        return TokenTable(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def encoded(self, drop_bos: bool) -> Tensor:
        """bool: the tokens that a transcoder encodes, all but padding and, with `clt.drop_bos`, BOS."""
        real = self.modality != Modality.PAD
        return real & (self.modality != Modality.BOS) if drop_bos else real


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model produced activations, so that a transcoder is never used on another one.

    Attributes:
        name: path or hub name as the user gave it.
        revision: hub revision, or "local".
        architecture: class name of the model.
        n_layers: decoder layers.
        d_model: width of the residual stream.
        fingerprint: hex digest of the model's weights.
    """

    name: str
    revision: str
    architecture: str
    n_layers: int
    d_model: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What is known of how a transcoder was trained; means over layers.

    Attributes:
        steps: steps done.
        tokens: tokens seen.
        fvu: fraction of variance unexplained, or None.
        l0: active features per token and source layer, or None.
        dead_fraction: share of dead features, or None.
        held_out: whether the three are of held-out tokens, not of the last window of training.
    """

    steps: int
    tokens: int
    fvu: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class SiteStats:
    """Moments of S sites over the same tokens.

    Attributes:
        count: number of tokens.
        mean: [S,D] float64, per channel.
        rms: [S] float64, root of the centred square averaged over tokens and channels.
    """

    count: int
    mean: Tensor
    rms: Tensor


@dataclass(frozen=True, kw_only=True)
class ActivationBatch:
    """Activations of B tokens at every source and target layer.

    Attributes:
        x: [L,B,D] float32, what the encoders read.
        y: [M,B,D] float32, what the MLP branches add to the residual stream.
        tokens: where the B tokens come from.
    """

    x: Tensor
    y: Tensor
    tokens: TokenTable


@dataclass(frozen=True, kw_only=True)
class SparseCodes:
    """Active features of B tokens in L source layers; an empty slot has value 0 and index 0.

    Attributes:
        values: [L,B,K] activations, >= 0.
        indices: [L,B,K] int32 feature numbers, ascending, empty slots last.
        n_features: features per layer.
    """

    values: Tensor
    indices: Tensor
    n_features: int

    @classmethod
    def stacked(cls, layers: Sequence[tuple[Tensor, Tensor]], n_features: int) -> SparseCodes:
        """Codes of several layers as one, padded by empty slots to the widest.

        Args:
            layers: values [B,K] and indices [B,K] int32 of each layer; K may differ.
            n_features: features per layer.
        """
        width = max(values.shape[1] for values, _ in layers)
        padded = ([pad(tensor, (0, width - tensor.shape[1])) for tensor in part] for part in zip(*layers, strict=True))
        values, indices = (torch.stack(tensors) for tensors in padded)
        return cls(values=values, indices=indices, n_features=n_features)
