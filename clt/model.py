"""The cross-layer transcoder: every source layer's features write to its own and later MLP outputs.

    z_l    = TopK(ReLU(W_enc[l] x_l + b_enc[l]), k)
    yhat_t = sum over sources l of t of z_l W_dec[t][l] + b_dec[t] (+ W_skip[t] x_t)

with source l writing to targets l + first_offset .. l + first_offset + n_targets - 1 (Ameisen et al. 2025, "Circuit
Tracing", section 2). `encode` and `decode` work in standardised units, `forward` in the model's own. Weights are
target-major: one tensor W_dec[t] [S_t,F,D] per target. A rank may own a share of the layers; the codes it lacks come
from `clt.parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clt.config import CLTConfig
from clt.kernels import ops
from clt.records import ModelIdentity, SparseCodes
from clt.scaling import Scaling


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a transcoder comes from.

    Attributes:
        model: the model whose activations it was trained on, or None for one made by hand.
        store_id: id of the activation store, or None.
    """

    model: ModelIdentity | None = None
    store_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """The layers one rank owns: encoders of `sources`, all decoders into `targets`; both ascending."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def everything(cls, config: CLTConfig) -> LayerShare:
        """The share of a process that owns the whole transcoder."""
        return cls(sources=source_layers(config), targets=target_layers(config))


def sources_of(config: CLTConfig, target: int) -> range:
    """Source layers that write to a target layer."""
    horizon = config.n_targets or config.n_layers
    last = target - config.first_offset
    return range(max(0, last - horizon + 1), last + 1)


def targets_of(config: CLTConfig, source: int) -> range:
    """Target layers that a source layer writes to."""
    horizon = config.n_targets or config.n_layers
    first = source + config.first_offset
    return range(first, min(config.n_layers, first + horizon))


def source_layers(config: CLTConfig) -> tuple[int, ...]:
    """Layers that have an encoder: those with at least one target."""
    return tuple(layer for layer in range(config.n_layers) if targets_of(config, layer))


def target_layers(config: CLTConfig) -> tuple[int, ...]:
    """Layers whose MLP output is reconstructed: those with at least one source."""
    return tuple(layer for layer in range(config.n_layers) if sources_of(config, layer))


class CrossLayerTranscoder(nn.Module):
    """A cross-layer transcoder, or one rank's share of it.

    Args:
        config: architecture.
        scaling: raw to standardised activations.
        share: layers this process owns; all by default.
        seed: seed of the initial weights, which depend on it and on the layer only, not on the share.
        provenance: model and store it belongs to.
    """

    def __init__(
        self,
        config: CLTConfig,
        scaling: Scaling,
        share: LayerShare | None = None,
        seed: int = 0,
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.scaling = scaling
        self.share = share or LayerShare.everything(config)
        self.provenance = provenance or Provenance()
        D, F = config.d_model, config.n_features
        self.W_enc, self.b_enc = nn.ParameterDict(), nn.ParameterDict()
        self.W_dec, self.b_dec, self.W_skip = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for layer in self.share.sources:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + layer)
            W_FD = torch.randn(F, D, generator=generator)
            self.W_enc[str(layer)] = nn.Parameter(W_FD / W_FD.norm(dim=1, keepdim=True))
            self.b_enc[str(layer)] = nn.Parameter(torch.zeros(F))
        for layer in self.share.targets:
            self.W_dec[str(layer)] = nn.Parameter(torch.zeros(len(self.sources_of(layer)), F, D))
            self.b_dec[str(layer)] = nn.Parameter(torch.zeros(D))
            if config.skip:
                self.W_skip[str(layer)] = nn.Parameter(torch.zeros(D, D))

    def sources_of(self, target: int) -> range:
        """Source layers of a target; W_dec[str(target)][i] belongs to sources_of(target)[i]."""
        return sources_of(self.config, target)

    def targets_of(self, source: int) -> range:
        """Target layers of a source."""
        return targets_of(self.config, source)

    def source_rows(self, target: int) -> slice:
        """Where a target's sources stand in codes of all source layers."""
        first = source_layers(self.config)[0]
        sources = self.sources_of(target)
        return slice(sources.start - first, sources.stop - first)

    def encode_layer(self, layer: int, x_BD: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes of one source layer.

        Args:
            layer: source layer owned here.
            x_BD: [B,D] standardised encoder input.
            k: slots per token, the config's by default.

        Returns:
            values [B,K] and indices [B,K] int32 (see `clt.kernels.ops.encode_topk`).
        """
        name = str(layer)
        return ops.encode_topk(x_BD, self.W_enc[name], self.b_enc[name], k or self.config.k)

    def decode_layer(self, layer: int, values_SBK: Tensor, indices_SBK: Tensor, x_BD: Tensor | None = None) -> Tensor:
        """Reconstruction of one target layer.

        Args:
            layer: target layer owned here.
            values_SBK: [S,B,K] activations of this target's sources, in the order of `sources_of`.
            indices_SBK: [S,B,K] int32 feature numbers.
            x_BD: [B,D] standardised encoder input of this layer; needed when the config has a skip connection.

        Returns:
            [B,D] standardised MLP output.
        """
        name = str(layer)
        skip_BD = None
        if self.config.skip:
            assert x_BD is not None, "a transcoder with skip connection decodes from its input too"
            skip_BD = x_BD @ self.W_skip[name].T
        return ops.decode(values_SBK, indices_SBK, self.W_dec[name], self.b_dec[name], skip_BD)

    def encode(self, x_LBD: Tensor, k: int | None = None) -> SparseCodes:
        """Codes of the source layers owned here.

        Args:
            x_LBD: [L_own,B,D] standardised encoder inputs, in the order of `share.sources`.
            k: slots per token, the config's by default.

        Returns:
            Codes [L_own,B,K].
        """
        pairs = [self.encode_layer(layer, x_BD, k) for layer, x_BD in zip(self.share.sources, x_LBD, strict=True)]
        values, indices = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        return SparseCodes(values=values, indices=indices, n_features=self.config.n_features)

    def decode(self, codes: SparseCodes, x_MBD: Tensor | None = None) -> Tensor:
        """Reconstructions of the target layers owned here.

        Args:
            codes: codes of all source layers of the model, [L,B,K] in the order of `source_layers`.
            x_MBD: [M_own,B,D] standardised encoder inputs of the targets; needed with a skip connection.

        Returns:
            [M_own,B,D] standardised MLP outputs, in the order of `share.targets`.
        """
        outputs = []
        for row, layer in enumerate(self.share.targets):
            rows = self.source_rows(layer)
            x_BD = None if x_MBD is None else x_MBD[row]
            outputs.append(self.decode_layer(layer, codes.values[rows], codes.indices[rows], x_BD))
        return torch.stack(outputs)

    def decode_loss(
        self, codes: SparseCodes, y_MBD: Tensor, x_MBD: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Squared errors of the target layers owned here, without storing their reconstructions.

        Args:
            codes: codes of all source layers of the model, [L,B,K] in the order of `source_layers`.
            y_MBD: [M_own,B,D] standardised MLP outputs, in the order of `share.targets`.
            x_MBD: [M_own,B,D] standardised encoder inputs of the targets; needed with a skip connection.

        Returns:
            error [M_own], mean over tokens and channels of the squared residual, and per target the residual [B,D],
            reconstruction - y, detached.
        """
        # One grouping of the slots serves every target in the backward pass.
        csr = ops.feature_csr(codes.values, codes.indices, codes.n_features)
        errors, residuals = [], []
        for row, layer in enumerate(self.share.targets):
            name, rows = str(layer), self.source_rows(layer)
            error, residual_BD = ops.decode_loss(
                codes.values[rows],
                codes.indices[rows],
                self.W_dec[name],
                self.b_dec[name],
                y_MBD[row],
                skip_BD=None if x_MBD is None else x_MBD[row] @ self.W_skip[name].T,
                csr=csr[rows],
            )
            errors.append(error)
            residuals.append(residual_BD)
        return torch.stack(errors), tuple(residuals)

    def forward(self, x_LBD: Tensor) -> Tensor:
        """MLP outputs from raw encoder inputs, for a process that owns every layer.

        Args:
            x_LBD: [n_layers,B,D] raw encoder inputs of all layers.

        Returns:
            [M,B,D] raw MLP outputs of the target layers.
        """
        everything = LayerShare.everything(self.config)
        assert self.share == everything, "a share of a transcoder has no forward of its own"
        x_std = self.scaling.standardise_x(x_LBD[list(everything.sources)], everything.sources)
        x_skip = None
        if self.config.skip:
            x_skip = self.scaling.standardise_x(x_LBD[list(everything.targets)], everything.targets)
        y_std = self.decode(self.encode(x_std), x_skip)
        return self.scaling.restore_y(y_std, everything.targets)

    @torch.no_grad()
    def folded(self) -> CrossLayerTranscoder:
        """The same function with the scaling moved into the weights: raw inputs in, raw outputs out."""
        D = self.config.d_model
        clt = CrossLayerTranscoder(
            self.config, Scaling.identity(self.config.n_layers, D), self.share, provenance=self.provenance
        ).to(next(self.parameters()))
        scaling = replace(self.scaling, **{k: v.to(next(self.parameters())) for k, v in self.scaling.tensors().items()})
        for layer in self.share.sources:
            name = str(layer)
            clt.W_enc[name].copy_(self.W_enc[name] / scaling.rms_x[layer])
            clt.b_enc[name].copy_(self.b_enc[name] - clt.W_enc[name] @ scaling.mean_x[layer])
        for layer in self.share.targets:
            name = str(layer)
            clt.W_dec[name].copy_(self.W_dec[name] * scaling.rms_y[layer])
            clt.b_dec[name].copy_(self.b_dec[name] * scaling.rms_y[layer] + scaling.mean_y[layer])
            if self.config.skip:
                clt.W_skip[name].copy_(self.W_skip[name] * scaling.rms_y[layer] / scaling.rms_x[layer])
                clt.b_dec[name].sub_(clt.W_skip[name] @ scaling.mean_x[layer])
        return clt.requires_grad_(False)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes one safetensors file per layer, the scaling and `transcoder.json` (see `clt.weights`)."""
        from clt.weights import save_transcoder

        save_transcoder(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> CrossLayerTranscoder:
        """Reads a folder written by `save_pretrained` or by training.

        Raises:
            CheckpointError: a file is missing, damaged or of the wrong shape; names the file and key.
        """
        from clt.weights import load_transcoder

        return load_transcoder(Path(folder))
