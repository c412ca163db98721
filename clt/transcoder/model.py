"""The cross-layer transcoder: features of every source layer write to MLP outputs of this and later layers.

    z_l    = TopK(ReLU(W_enc[l] x_l + b_enc[l]), k)
    yhat_t = sum over sources l of t of z_l W_dec[t][l] + b_dec[t] (+ W_skip[t] x_t)

Source l writes to targets l + first_offset .. l + first_offset + n_targets - 1 (Ameisen et al. 2025, "Circuit
Tracing", section 2). `encode` and `decode` use standardised units, `forward` raw ones. Weights are target-major: one
tensor W_dec[t] [S_t,F,D] per target; `clt.transcoder.decoding` has other forms of decoders, which `untied` converts to
this one. A rank may own a share of the layers; `clt.distributed.code_exchange` receives the codes of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from clt.errors import ConfigError
from clt.kernels import ops
from clt.records import ModelIdentity, SparseCodes, TrainingFacts
from clt.transcoder import decoding, encoding
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.decoding import SourceDecoders
from clt.transcoder.initial_weights import LayerBuffers, initial_decoder, initial_encoder, initial_shared_decoder
from clt.transcoder.layers import LayerShare, source_layers, sources_of, targets_of
from clt.transcoder.lazy_decoder import MappedDecoder
from clt.transcoder.scaling import Scaling
from clt.transcoder.sparsity import Peers


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Model, store and training of a transcoder.

    Attributes:
        model: the model whose activations it was trained on, or None if unknown.
        store_id: id of the activation store, or None.
        training: steps and measures of its training, or None if unknown.
    """

    model: ModelIdentity | None = None
    store_id: str | None = None
    training: TrainingFacts | None = None


class CrossLayerTranscoder(nn.Module):
    """A cross-layer transcoder, or one rank's share of it.

    Args:
        config: architecture.
        scaling: raw to standardised activations.
        share: layers this process owns; default: all.
        seed: random seed of the initial weights, which do not depend on the share.
        provenance: its model, store and training.
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
        self.scaling = scaling.per_token() if config.layer_norm else scaling
        self.share = share or LayerShare.everything(config)
        self.provenance = provenance or Provenance()
        self.W_enc, self.b_enc = nn.ParameterDict(), nn.ParameterDict()
        self.W_dec, self.b_dec, self.W_skip = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.log_threshold = nn.ParameterDict()
        self.W_shared, self.target_scale = nn.ParameterDict(), nn.ParameterDict()
        self.offset = nn.ParameterDict()
        self.decoder_norm, self.threshold = LayerBuffers(), LayerBuffers()
        for layer in self.share.sources:
            W_FD, b_F = initial_encoder(config, layer, seed)
            self.W_enc[str(layer)], self.b_enc[str(layer)] = nn.Parameter(W_FD), nn.Parameter(b_F)
            self._add_sparsity(layer)
            if config.tied_decoders == "source":
                self.W_shared[str(layer)] = nn.Parameter(initial_shared_decoder(config, layer, seed))
                self.target_scale[str(layer)] = nn.Parameter(torch.ones(len(self.targets_of(layer)), config.n_features))
        for layer in self.share.targets:
            self._add_target(layer, seed)

    def __repr__(self) -> str:
        config, model = self.config, self.provenance.model
        facts: dict[str, object] = {
            "layers": config.n_layers,
            "d_model": config.d_model,
            "features": config.n_features,
            "k": config.k,
            "targets": config.n_targets or "all",
            "sparsity": config.sparsity.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": None if model is None else model.name,
        }
        if self.share != LayerShare.everything(config):
            facts |= {"own_sources": self.share.sources, "own_targets": self.share.targets}
        return f"CrossLayerTranscoder({', '.join(f'{name}={value}' for name, value in facts.items())})"

    def _add_target(self, layer: int, seed: int) -> None:
        """Creates the parameters of a target layer."""
        config, sources = self.config, self.sources_of(layer)
        D_own = len(range(config.d_model)[self.columns])
        if config.tied_decoders != "source":
            self.W_dec[str(layer)] = nn.Parameter(initial_decoder(config, layer, sources, seed, self.columns))
        biases = (D_own,) if config.independent is None else (len(sources), D_own)
        self.b_dec[str(layer)] = nn.Parameter(torch.zeros(biases))
        if config.skip:
            self.W_skip[str(layer)] = nn.Parameter(torch.zeros(D_own, config.d_model))
        if config.feature_offset:
            self.offset[str(layer)] = nn.Parameter(torch.zeros(len(sources), config.n_features))

    def _add_sparsity(self, layer: int) -> None:
        """Creates the parameters and buffers that the selection rule needs for a source layer."""
        sparsity, F = self.config.sparsity, self.config.n_features
        if sparsity.kind == "jumprelu":
            self.log_threshold[str(layer)] = nn.Parameter(torch.full((F,), math.log(sparsity.threshold)))
        if sparsity.uses_decoder_norm:
            # Of the decoders before the last step; 1 until `encoding.update_decoder_norms` is called.
            self.decoder_norm[layer] = torch.ones(F)
        if sparsity.kind in ("joint_topk", "batch_topk"):
            # Inference threshold of the score; NaN until one is known.
            self.threshold[layer] = torch.tensor(torch.nan)

    def sources_of(self, target: int) -> range:
        """Source layers of a target, in the order of `decoder_matrix(target)` (free decoders)."""
        return sources_of(self.config, target)

    def targets_of(self, source: int) -> range:
        """Target layers of a source."""
        return targets_of(self.config, source)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def n_sources(self) -> int:
        """Number of source layers of the whole transcoder."""
        return len(source_layers(self.config))

    @property
    def n_sources_of_model(self) -> int:
        """Number of source layers over which loss terms are averaged, also when one of them is trained alone."""
        return len(source_layers(replace(self.config, source=None)))

    def source_row(self, layer: int) -> int:
        """Row of a source layer in codes of all source layers."""
        return layer - source_layers(self.config)[0]

    def source_rows(self, target: int) -> slice:
        """Rows of a target's sources in codes of all source layers."""
        sources = self.sources_of(target)
        return slice(self.source_row(sources.start), self.source_row(sources.start) + len(sources))

    def encoder(self, layer: int) -> tuple[Tensor, Tensor]:
        """W_enc [F,D] and b_enc [F] of a source layer owned here."""
        return self.encoder_matrix(layer), self.encoder_bias(layer)

    def encoder_matrix(self, layer: int) -> Tensor:
        """W_enc [F,D] of a source layer owned here."""
        return self.W_enc[str(layer)]

    def encoder_bias(self, layer: int) -> Tensor:
        """b_enc [F] of a source layer owned here."""
        return self.b_enc[str(layer)]

    def decoder(self, source: int, target: int) -> Tensor:
        """[F,D_own]: decoder vectors of a source into a target, for every form of decoders."""
        return decoding.pair_decoder(self, source, target)

    def decoder_matrix(self, target: int) -> Tensor:
        """W_dec [S,F,D_own] of a target ([1,F,D_own] tied by target); a `MappedDecoder` when loaded lazily."""
        return self.W_dec[str(target)]

    def decoder_bias(self, target: int) -> Tensor:
        """b_dec [D_own] of a target; [S,D_own] of independent sources."""
        return self.b_dec[str(target)]

    def skip_matrix(self, target: int) -> Tensor:
        """W_skip [D_own,D] of a target; the config has a skip connection."""
        return self.W_skip[str(target)]

    def feature_offsets(self, target: int) -> Tensor:
        """Offsets [S,F] of the active features of a target's sources; the config has `feature_offset`."""
        return self.offset[str(target)]

    def shared_decoder(self, source: int) -> Tensor:
        """W_shared [F,D] of a source whose targets share it (`tied_decoders: source`)."""
        return self.W_shared[str(source)]

    def target_scales(self, source: int) -> Tensor:
        """Scales [T,F] of a shared decoder, a row for each of `targets_of(source)`."""
        return self.target_scale[str(source)]

    def log_thresholds(self, layer: int) -> Tensor:
        """Log thresholds [F] of a source layer; the rule is jumprelu."""
        return self.log_threshold[str(layer)]

    def encode_layer(self, layer: int, x_BD: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes of one source layer alone; rules that compare layers or tokens use their inference thresholds.

        Args:
            layer: source layer owned here.
            x_BD: [B,D] standardised encoder input.
            k: active features per token; default: the config's.

        Returns:
            values [B,K] and indices [B,K] int32 (see `clt.kernels.ops.encode_topk`); K is k for the kind topk, else
            the largest number of active features of a token.

        Raises:
            CheckpointError: the rule has no inference threshold yet.
        """
        if self.encodes_layers_alone:
            return ops.encode_topk(x_BD, *self.encoder(layer), k or self.config.k)
        return encoding.encode_layer(self, layer, x_BD, k or self.config.k)

    def decode_layer(
        self,
        layer: int,
        values_SBK: Tensor,
        indices_SBK: Tensor,
        x_BD: Tensor | None = None,
        shared: SourceDecoders | None = None,
    ) -> Tensor:
        """Reconstruction of one target layer.

        Args:
            layer: target layer owned here.
            values_SBK: [S,B,K] activations of this target's sources, in the order of `sources_of`.
            indices_SBK: [S,B,K] int32 feature numbers.
            x_BD: [B,D] standardised encoder input of this layer; needed when the config has a skip connection.
            shared: decoders that belong to sources, if some are owned by other ranks.

        Returns:
            [B,D_own] standardised MLP output, the columns owned here.
        """
        return decoding.decode(self, layer, values_SBK, indices_SBK, self._skip(layer, x_BD), shared)

    def _skip(self, layer: int, x_BD: Tensor | None) -> Tensor | None:
        """[B,D_own] output of the skip connection of a target layer; None without one."""
        if not self.config.skip:
            return None
        assert x_BD is not None, "a transcoder with skip connection needs x_BD to decode"
        return x_BD @ self.skip_matrix(layer).T

    def encode(self, x_LBD: Tensor, k: int | None = None, peers: Peers | None = None) -> SparseCodes:
        """Codes of the source layers owned here.

        Args:
            x_LBD: [L_own,B,D] standardised encoder inputs, in the order of `share.sources`.
            k: active features per token and layer; default: the config's.
            peers: processes whose activations are compared with these, in a training step or for a share (see
                `clt.transcoder.encoding.encode`).

        Returns:
            Codes [L_own,B,K].

        Raises:
            CheckpointError: the rule has no inference threshold yet.
        """
        if not self.encodes_layers_alone or not self.share.sources:
            return encoding.encode(self, x_LBD, k or self.config.k, peers)
        pairs = [self.encode_layer(layer, x_BD, k) for layer, x_BD in zip(self.share.sources, x_LBD, strict=True)]
        values, indices = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        return SparseCodes(values=values, indices=indices, n_features=self.config.n_features)

    @property
    def encodes_layers_alone(self) -> bool:
        """True if the fused encode kernel does the selection."""
        return self.config.sparsity.kind == "topk" and not self.config.sparsity.decoder_norm

    def decode(self, codes: SparseCodes, x_MBD: Tensor | None = None) -> Tensor:
        """Reconstructions of the target layers owned here.

        Args:
            codes: codes of all source layers of the model, [L,B,K] in the order of `source_layers`.
            x_MBD: [M_own,B,D] standardised encoder inputs of the targets; needed with a skip connection.

        Returns:
            [M_own,B,D_own] standardised MLP outputs, in the order of `share.targets`: the columns owned here.
        """
        outputs = []
        for row, layer in enumerate(self.share.targets):
            rows = self.source_rows(layer)
            x_BD = None if x_MBD is None else x_MBD[row]
            outputs.append(self.decode_layer(layer, codes.values[rows], codes.indices[rows], x_BD))
        return torch.stack(outputs)

    def decode_loss_layer(
        self,
        layer: int,
        values_SBK: Tensor,
        indices_SBK: Tensor,
        y_BD: Tensor,
        x_BD: Tensor | None = None,
        csr: ops.FeatureCSR | None = None,
        weights_B: Tensor | None = None,
        shared: SourceDecoders | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Squared error of one target layer, without storing its reconstruction.

        Args:
            layer: target layer owned here.
            values_SBK: [S,B,K] activations of this target's sources, in the order of `sources_of`.
            indices_SBK: [S,B,K] int32 feature numbers.
            y_BD: [B,D_own] standardised MLP output, the columns owned here.
            x_BD: [B,D] standardised encoder input of this layer; needed when the config has a skip connection.
            csr: grouping of these S layers; default: built in the backward pass.
            weights_B: [B] weight of each token; None for 1/B.
            shared: decoders that belong to sources, if some are owned by other ranks.

        Returns:
            error [], weighted sum over tokens of the mean over D channels of the squared residual (the part of the
            columns owned here), and the residual [B,D_own], reconstruction - y, detached. For independent sources the
            mean of their errors, and [S,B,D_own].
        """
        bias, skip_BD = self.decoder_bias(layer), self._skip(layer, x_BD)
        error, residual = decoding.squared_error(
            self, layer, values_SBK, indices_SBK, bias, y_BD, weights_B, skip_BD, csr, shared
        )
        return self.column_part(error), residual

    @property
    def columns(self) -> slice:
        """Channels of the targets owned here."""
        own = self.share.columns
        return slice(None) if own is None else slice(own.start, own.stop)

    def column_part(self, mean: Tensor) -> Tensor:
        """Contribution of a mean over the channels owned here to the mean over all D channels."""
        own = self.share.columns
        return mean if own is None else mean * (len(own) / self.config.d_model)

    def forward(self, x_LBD: Tensor) -> Tensor:
        """MLP outputs from raw encoder inputs; needs all layers.

        Args:
            x_LBD: [n_layers,B,D] raw encoder inputs of all layers.

        Returns:
            [M,B,D] raw MLP outputs of the target layers.
        """
        everything = LayerShare.everything(self.config)
        assert self.share == everything, "forward needs all layers, this is a share"
        x_std = self.scaling.standardise_x(x_LBD[list(everything.sources)], everything.sources)
        x_skip = None
        if self.config.skip:
            x_skip = self.scaling.standardise_x(x_LBD[list(everything.targets)], everything.targets)
        y_std = self.decode(self.encode(x_std), x_skip)
        return self.scaling.restore_y(y_std, everything.targets)

    @property
    def has_variants(self) -> bool:
        """True for tied or independent decoders, which are not one per source and target, summed."""
        return self.config.tied_decoders is not None or self.config.independent is not None

    def untied(self) -> CrossLayerTranscoder:
        """The same function with one decoder per source and target, summed.

        Raises:
            ConfigError: the transcoder has one trained source layer only.
        """
        from clt.transcoder.folding import untied

        return untied(self)

    def folded(self) -> CrossLayerTranscoder:
        """The same function on raw inputs and outputs: scaling folded into the weights, decoders untied."""
        from clt.transcoder.folding import folded

        return folded(self)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As for any module; ConfigError for lazily loaded decoders, which cannot be trained."""
        if requires_grad and any(isinstance(W_SFD, MappedDecoder) for W_SFD in self.W_dec.values()):
            raise ConfigError("lazy=True: lazily loaded decoders cannot be trained; load with lazy=False")
        return super().requires_grad_(requires_grad)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes a safetensors file per layer, the scaling, `transcoder.json` and a model card, atomically.

        Args:
            folder: new, empty, or with a transcoder that is replaced when the new one is complete.

        Raises:
            CheckpointError: the folder holds other files or cannot be written; it is left unchanged.
        """
        from clt.hub import pretrained

        pretrained.save_pretrained(self, folder)

    def push_to_hub(
        self, name: str, *, private: bool = True, revision: str | None = None, message: str | None = None
    ) -> str:
        """Uploads what `save_pretrained` writes to a model repository; `clt push` uploads an existing folder.

        Args:
            name: OWNER/NAME; the repository is created if it is missing.
            private: visibility of a repository that is created.
            revision: branch, created if it is missing; default: main.
            message: summary of the commits.

        Returns:
            Id of the commit that holds all files.

        Raises:
            HubError: access is refused, the repository holds another transcoder, or the transfer failed.
            CheckpointError: the local disk has no space for the files.
        """
        from clt.hub import pretrained

        return pretrained.push_transcoder(self, name, private=private, revision=revision, message=message)

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        *,
        layers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        lazy: bool = False,
        revision: str | None = None,
        averaged: bool = False,
    ) -> CrossLayerTranscoder:
        """Loads a folder written by `save_pretrained` or by training, or a model repository of the hub.

        Args:
            name: a folder; or, if no such folder exists, OWNER/NAME or OWNER/NAME@REVISION on the hub.
            layers: the share to download and load: encoders of these source layers, decoders into these target layers.
            device: device of the weights.
            dtype: dtype of the weights, whatever that of the files is; default: float32.
            lazy: decoders stay in their files, memory-mapped, and are read where they are used; they cannot be trained.
            revision: branch, tag or commit of the repository.
            averaged: load the EMA weights, of a job with optimizer.ema_decay.

        Returns:
            The transcoder, without gradients.

        Raises:
            CheckpointError: a file is missing, damaged or of the wrong shape; names the file and key.
            ConfigError: a layer does not exist, or a revision of a folder is requested.
            HubError: the repository is missing, incomplete or refuses access, or the transfer failed.
        """
        from clt.hub import pretrained

        dtype = dtype or torch.float32
        return pretrained.open_pretrained(name, layers, revision, averaged, device=device, dtype=dtype, lazy=lazy)
