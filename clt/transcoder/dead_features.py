"""Dead features: in training, those that did not fire within a window of tokens; in reports, on held-out tokens.

The window counts tokens over all ranks, independent of batch size and mesh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt.records import SparseCodes


def fired_features(codes: SparseCodes) -> Tensor:
    """Features that are active in any of the tokens.

    Args:
        codes: codes [L,B,K].

    Returns:
        [L,F] bool.
    """
    counts_LF = firing_counts(codes)
    return counts_LF > 0


def firing_counts(codes: SparseCodes) -> Tensor:
    """Number of tokens in which each feature is active, [L,F] int64; empty slots are not counted."""
    layers = codes.values.shape[0]
    counts_LF = torch.zeros(layers, codes.n_features, dtype=torch.int64, device=codes.values.device)
    filled_LN = (codes.values.detach() > 0).flatten(1).long()
    return counts_LF.scatter_add_(1, codes.indices.flatten(1).long(), filled_LN)


class FiringTracker:
    """Tokens since each feature last fired.

    Args:
        n_layers: source layers tracked here.
        n_features: features per layer.
    """

    def __init__(self, n_layers: int, n_features: int) -> None:
        self.silent_LF = torch.zeros(n_layers, n_features, dtype=torch.int64)

    def update(self, fired_LF: Tensor, n_tokens: int) -> None:
        """Updates the counters after a step: zero for features that fired, plus the step's tokens for all others.

        Args:
            fired_LF: [L,F] bool, over the tokens of all data ranks.
            n_tokens: tokens of the step, over all data ranks.
        """
        self.silent_LF = torch.where(fired_LF, 0, self.silent_LF + n_tokens)

    def dead(self, window_tokens: int) -> Tensor:
        """[L,F] bool: features silent for at least this many tokens."""
        return self.silent_LF >= window_tokens
