"""Sparse codes grouped by feature: the slots that hold each feature, in token order, for backward passes.

Built once per step from the codes of all source layers and shared by every target and by the encoders. Everything is
fixed-shape and stays on the device: no count is copied to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Slots of one feature that one program sums up; a feature with more is split, so that one that fires on every token
#: does not leave the rest of the device waiting.
SPLIT = 256


@dataclass(frozen=True, kw_only=True)
class FeatureCSR:
    """Filled slots of L source layers, grouped by feature; N = B*K slots per layer.

    Attributes:
        bounds: [L,F+1] int32; the slots of feature f are entries bounds[l,f] .. bounds[l,f+1]-1.
        slots: [L,N] int32, slot number token*K + place, ascending within a feature; empty slots come after bounds[l,F].
        tokens: [L,N] int32, token of each of them.
        spill_bounds: [L,F+1] int32, running number of further parts of `SPLIT` slots that long features need: feature
            f has spill_bounds[l,f+1] - spill_bounds[l,f] parts beyond its first.
        spill_feature: [L,Q] int32, feature of each further part, F where there is none; Q = N // SPLIT.
    """

    bounds: Tensor
    slots: Tensor
    tokens: Tensor
    spill_bounds: Tensor
    spill_feature: Tensor

    @classmethod
    def build(cls, values_LBK: Tensor, indices_LBK: Tensor, n_features: int) -> FeatureCSR:
        """Groups the filled slots of codes.

        Args:
            values_LBK: [L,B,K] activations; a slot with value 0 is empty.
            indices_LBK: [L,B,K] int32 feature numbers.
            n_features: F.

        Returns:
            The grouping; the same bits every time.
        """
        layers, slots = len(values_LBK), values_LBK[0].numel()
        device = values_LBK.device
        # One stable sort of all layers: each layer's keys are in a separate range, its empty slots at the end.
        shift_L1 = (n_features + 1) * torch.arange(layers, device=device)[:, None]
        feature_LN = (
            indices_LBK.reshape(layers, slots).long().masked_fill(values_LBK.reshape(layers, slots) == 0, n_features)
        )
        wide = layers * (n_features + 1) > torch.iinfo(torch.int32).max
        keys, order = (feature_LN + shift_L1).to(torch.int64 if wide else torch.int32).reshape(-1).sort(stable=True)
        first_LF = shift_L1 + torch.arange(n_features + 1, device=device)
        own_L1 = slots * torch.arange(layers, device=device)[:, None]
        bounds = torch.searchsorted(keys, first_LF.to(keys.dtype)) - own_L1
        slots_LN = order.view(layers, slots) - own_L1
        spills = (bounds.diff(dim=1) - 1).clamp_(min=0) // SPLIT
        spill_bounds = torch.nn.functional.pad(spills.cumsum(dim=1), (1, 0))
        places = torch.arange(slots // SPLIT, device=device).expand(layers, -1).contiguous()
        spill_feature = torch.searchsorted(spill_bounds[:, 1:].contiguous(), places, right=True)
        return cls(
            bounds=bounds.int(),
            slots=slots_LN.int(),
            tokens=torch.div(slots_LN, values_LBK.shape[2], rounding_mode="floor").int(),
            spill_bounds=spill_bounds.int(),
            spill_feature=spill_feature.int(),
        )

    def __getitem__(self, layers: slice) -> FeatureCSR:
        """The grouping of some of the layers; shares memory."""
        return FeatureCSR(**{name: tensor[layers] for name, tensor in vars(self).items()})

    def touched(self) -> Tensor:
        """[L,F] bool: features that hold a slot."""
        return self.bounds.diff(dim=1) > 0

    def tensors(self) -> list[Tensor]:
        """The fields in order, as custom operations take them."""
        return [self.bounds, self.slots, self.tokens, self.spill_bounds, self.spill_feature]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> FeatureCSR:
        """The grouping whose `tensors` these are."""
        bounds, slots, tokens, spill_bounds, spill_feature = tensors
        return cls(bounds=bounds, slots=slots, tokens=tokens, spill_bounds=spill_bounds, spill_feature=spill_feature)
