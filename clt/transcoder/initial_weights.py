"""Initial weights; each depends on the random seed and the layer only, not on the rank that owns it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import torch
from torch import Tensor, nn

from clt.transcoder.architecture import CLTConfig


class LayerBuffers(nn.Module):
    """Saved, untrained tensors of each source layer; they stay float64, whatever the dtype of the weights."""

    def __setitem__(self, layer: int, value: Tensor) -> None:
        self.register_buffer(str(layer), value.to(torch.float64))

    def __getitem__(self, layer: int) -> Tensor:
        return self.get_buffer(str(layer))

    def __contains__(self, layer: int) -> bool:
        return str(layer) in self._buffers

    def __iter__(self) -> Iterator[int]:
        return (int(name) for name in self._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerBuffers:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            old = kept[name]
            assert moved is not None and old is not None
            # Follow the new device, keep the dtype.
            self._buffers[name] = old.to(moved.device)
        return self


def initial_encoder(config: CLTConfig, layer: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of norm 1 [F,D], so that pre-activations of standardised inputs have variance 1, and the bias [F].

    The bias is 0 for rules that select k features. For jumprelu and relu it is set so that about k features of a token
    pass their thresholds at the start (as in Ameisen et al. 2025, "Circuit Tracing", section D).

    Args:
        config: architecture.
        layer: source layer.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + layer)
    W_FD = torch.randn(config.n_features, config.d_model, generator=generator)
    sparsity, bias = config.sparsity, 0.0
    if sparsity.has_penalty:
        rate = min(config.k, config.n_features - 0.5) / config.n_features
        bias = NormalDist().inv_cdf(rate) + (sparsity.threshold if sparsity.kind == "jumprelu" else 0.0)
    return W_FD / W_FD.norm(dim=1, keepdim=True), torch.full((config.n_features,), bias)


def initial_decoder(config: CLTConfig, target: int, sources: range, seed: int, columns: slice) -> Tensor:
    """Decoders [S,F,D_own] into one target, S = 1 if its sources share one: zeros, or random if norms rank features.

    Where features are ranked by activation times decoder norm, zero decoders would never be selected nor trained.

    Args:
        config: architecture.
        target: target layer.
        sources: its source layers owned here.
        seed: random seed.
        columns: output channels owned here.
    """
    shared = config.tied_decoders == "target"
    W_SFD = torch.zeros(1 if shared else len(sources), config.n_features, len(range(config.d_model)[columns]))
    if config.sparsity.uses_decoder_norm:
        generator = torch.Generator().manual_seed(-1_000_003 * (seed + 1) - target - 1)
        horizon = config.n_targets or config.n_layers
        last = target - config.first_offset
        # Draw for all sources, also when one is trained alone.
        for source in range(max(0, last - horizon + 1), last + 1):
            drawn_FD = _uniform(config, generator)[:, columns]
            if shared:
                W_SFD.copy_(drawn_FD)
                break
            if source in sources:
                W_SFD[sources.index(source)].copy_(drawn_FD)
    return W_SFD


def initial_shared_decoder(config: CLTConfig, source: int, seed: int) -> Tensor:
    """Decoder [F,D] of a source, shared by its targets; see `initial_decoder`.

    Args:
        config: architecture.
        source: source layer.
        seed: random seed.
    """
    if not config.sparsity.uses_decoder_norm:
        return torch.zeros(config.n_features, config.d_model)
    return _uniform(config, torch.Generator().manual_seed(-1_000_003 * (seed + 1) - source - 1))


def _uniform(config: CLTConfig, generator: torch.Generator) -> Tensor:
    """[F,D] uniform in +-1/sqrt(L*D)."""
    drawn_FD = torch.rand(config.n_features, config.d_model, generator=generator)
    return (2 * drawn_FD - 1) / math.sqrt(config.n_layers * config.d_model)
