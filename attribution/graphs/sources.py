"""The columns of an attribution graph, and their direct effects on targets.

In the local replacement model every MLP output is a sum of active features' decoder vectors, a bias, a linear skip path
and an error, and equals the model's own output on this prompt (Ameisen et al. 2025, "Circuit Tracing", section "The
local replacement model"). Where the transcoder does not act, the whole output is error.

Columns: features by (layer, position, number) | errors, layer-major | tokens | decoder biases | attention biases.
`attribute` adds the column of the target's own bias. Shapes: B targets in a batch, n active features, S prompt length,
R <= S positions that a batch can reach, L layers, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt.attribution.replacement.linear_model import LinearModel
from clt.records import TokenTable
from clt.transcoder.architecture import ReadSite
from clt.transcoder.layers import source_layers, target_layers
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class Readouts:
    """B targets that read the same site: value = vector . residual stream at position + constant.

    Attributes:
        layer: layer of the site.
        site: resid_pre, resid_mid or resid_post of that layer; logits read resid_post of the last.
        position: [B] int64.
        vector: [B,D], norms folded in.
        constant: [B], the target's own bias.
        value: [B], the value in the recorded forward.
    """

    layer: int
    site: ReadSite
    position: Tensor
    vector: Tensor
    constant: Tensor
    value: Tensor

    def select(self, index: slice) -> Readouts:
        """Some of the targets."""
        return Readouts(
            layer=self.layer,
            site=self.site,
            position=self.position[index],
            vector=self.vector[index],
            constant=self.constant[index],
            value=self.value[index],
        )


@dataclass(frozen=True, kw_only=True)
class ActiveFeatures:
    """The n active features of a prompt, sorted by layer, position, number.

    Attributes:
        layer: [n] int64.
        position: [n] int64.
        number: [n] int64.
        activation: [n], > 0.
    """

    layer: Tensor
    position: Tensor
    number: Tensor
    activation: Tensor

    def __len__(self) -> int:
        return len(self.layer)


class Sources:
    """All columns of a prompt.

    Args:
        linear: the linear model of the prompt.
        transcoder: folded transcoder, in the dtype and on the device of `linear`.
        tokens: [S] the prompt's tokens.
    """

    def __init__(self, linear: LinearModel, transcoder: CrossLayerTranscoder, tokens: TokenTable) -> None:
        reads_itself = transcoder.config.first_offset == 0 or transcoder.config.skip
        assert not (transcoder.config.read_site == "resid_post" and reads_itself), "rejected by ReplacementModel"
        self.linear = linear
        self.transcoder = transcoder
        self.seen = tokens.encoded(transcoder.config.drop_bos)
        self.targets = target_layers(transcoder.config)
        self.features = self._active_features()
        self._order_by_position()
        self.errors = self._errors()
        self.biased = [layer for layer in range(linear.n_layers) if linear.attention_biases(layer) != (None, None)]
        n, S, L = len(self.features), linear.n_positions, linear.n_layers
        self.first_error, self.first_token = n, n + L * S
        self.first_bias = self.first_token + S
        self.n_columns = self.first_bias + len(self.targets) + len(self.biased)

    def feature_readouts(self, layer: int, position: Tensor, number: Tensor) -> Readouts:
        """Pre-activations of features of one layer as targets.

        Args:
            layer: source layer.
            position: [B] int64.
            number: [B] int64, feature numbers.
        """
        site = self.transcoder.config.read_site
        W_BD, b_B = self.transcoder.encoder_matrix(layer)[number], self.transcoder.encoder_bias(layer)[number]
        value_B = (self.linear.recording.read[layer][position] * W_BD).sum(1) + b_B
        if site == "mlp_in":
            W_BD, site = W_BD * self.linear.mlp_scale[layer][position], "resid_mid"
        return Readouts(layer=layer, site=site, position=position, vector=W_BD, constant=b_B, value=value_B)

    def bias_norms(self) -> list[float]:
        """Norms of the bias columns' vectors over all positions at which they act."""
        n_seen, norms = float(self.seen.sum()), []
        for layer in self.targets:
            norms.append(float(self.transcoder.decoder_bias(layer).norm()) * n_seen**0.5)
        for layer in self.biased:
            norms.append(float(self.linear.attention_bias(layer).norm()) * self.linear.n_positions**0.5)
        return norms

    def rows(self, readouts: Readouts) -> Tensor:
        """Direct effect of every column on a batch of targets.

        Args:
            readouts: B targets.

        Returns:
            [B,n_columns]; with the targets' own constants each row sums to the target's value.
        """
        B, R = len(readouts.position), self.linear.reach(readouts.position)
        out_BN = readouts.vector.new_zeros(B, self.n_columns)
        by_position_Bn = readouts.vector.new_zeros(B, len(self.features))
        G_BRD = readouts.vector.new_zeros(B, R, readouts.vector.shape[1])
        G_BRD[torch.arange(B), readouts.position] = readouts.vector
        for layer in range(readouts.layer, -1, -1):
            site = readouts.site if layer == readouts.layer else "resid_post"
            skip_BRD = None
            if site == "resid_post":
                self._add_mlp_columns(layer, G_BRD, out_BN, by_position_Bn)
                skip_BRD = self._pull_skip(layer, G_BRD)
            if skip_BRD is not None and self.transcoder.config.read_site != "resid_pre":
                G_BRD, skip_BRD = G_BRD + skip_BRD, None
            if site != "resid_pre":
                G_BRD = self._add_attention_columns(layer, G_BRD, out_BN)
            if skip_BRD is not None:
                G_BRD = G_BRD + skip_BRD
        tokens = slice(self.first_token, self.first_token + R)
        out_BN[:, tokens] = torch.einsum("brd,rd->br", G_BRD, self.linear.recording.embed[:R])
        out_BN[:, : len(self.features)] = by_position_Bn[:, self._rank]
        return out_BN

    def _add_mlp_columns(self, layer: int, G_BRD: Tensor, out_BN: Tensor, by_position_Bn: Tensor) -> None:
        """Adds the effects of the columns that are part of the layer's MLP output."""
        R = G_BRD.shape[1]
        start = self.first_error + layer * self.linear.n_positions
        out_BN[:, start : start + R] = torch.einsum("brd,rd->br", G_BRD, self.errors[layer, :R])
        if layer not in self.targets:
            return
        bias = self.first_bias + self.targets.index(layer)
        out_BN[:, bias] = G_BRD[:, self.seen[:R]].sum(1) @ self.transcoder.decoder_bias(layer)
        W_dec_SFD, sources = self.transcoder.decoder_matrix(layer), self.transcoder.sources_of(layer)
        for position in range(R):
            # Sorted by position, then layer: the sources of one target are contiguous.
            begin, end = self._span[position][sources.start], self._span[position][sources.stop]
            if begin < end:
                decoder_nD = W_dec_SFD[self._source[begin:end] - sources.start, self._number[begin:end]]
                amounts_n = self._written(layer, begin, end)
                by_position_Bn[:, begin:end] += G_BRD[:, position] @ decoder_nD.T * amounts_n

    def _pull_skip(self, layer: int, G_BRD: Tensor) -> Tensor | None:
        """Cotangents with respect to the skip path's input, at the residual stream before or after the attention."""
        if not self.transcoder.config.skip or layer not in self.targets:
            return None
        R = G_BRD.shape[1]
        skip_BRD = (G_BRD @ self.transcoder.skip_matrix(layer)) * self.seen[:R, None]
        return skip_BRD * self.linear.mlp_scale[layer][:R] if self.transcoder.config.read_site == "mlp_in" else skip_BRD

    def _add_attention_columns(self, layer: int, G_BRD: Tensor, out_BN: Tensor) -> Tensor:
        """Adds the effects of the layer's attention biases; returns the cotangents before the attention."""
        before_BRD, v_BRX = self.linear.pull_attention(layer, G_BRD)
        if layer in self.biased:
            v_bias, o_bias = self.linear.attention_biases(layer)
            column = self.first_bias + len(self.targets) + self.biased.index(layer)
            if v_bias is not None:
                out_BN[:, column] += v_BRX.sum(1) @ v_bias
            if o_bias is not None:
                out_BN[:, column] += G_BRD.sum(1) @ o_bias
        return before_BRD

    def _active_features(self) -> ActiveFeatures:
        parts = []
        for layer in source_layers(self.transcoder.config):
            values_SK, indices_SK = self.transcoder.encode_layer(layer, self.linear.recording.read[layer])
            position, slot = ((values_SK > 0) & self.seen[:, None]).nonzero(as_tuple=True)
            number = indices_SK[position, slot].long()
            # Slots are ascending in feature number, so this order is (position, number).
            parts.append((torch.full_like(position, layer), position, number, values_SK[position, slot]))
        layers_n, positions_n, numbers_n, activations_n = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return ActiveFeatures(layer=layers_n, position=positions_n, number=numbers_n, activation=activations_n)

    def _order_by_position(self) -> None:
        """Indexes the features by (position, layer): `_span[p, l]` is the first one at p in layer l or later."""
        S, L, f = self.linear.n_positions, self.linear.n_layers, self.features
        key = f.position * (L + 1) + f.layer
        order = key.argsort(stable=True)
        self._rank = torch.empty_like(order)
        self._rank[order] = torch.arange(len(order), device=order.device)
        self._source, self._number, self._activation = f.layer[order], f.number[order], f.activation[order]
        bounds = torch.searchsorted(key[order], torch.arange(S * (L + 1), device=key.device))
        self._span = bounds.view(S, L + 1).tolist()

    def _written(self, target: int, begin: int, end: int) -> Tensor:
        """[n] factors of some features' decoder vectors into a target; features are ordered by position."""
        if not self.transcoder.config.feature_offset:
            return self._activation[begin:end]
        source_n = self._source[begin:end] - self.transcoder.sources_of(target).start
        return self._activation[begin:end] + self.transcoder.feature_offsets(target)[source_n, self._number[begin:end]]

    def _errors(self) -> Tensor:
        """[L,S,D] MLP outputs minus the transcoder's outputs."""
        found = self.linear.recording
        errors_LSD = found.mlp_out.clone()
        for layer in self.targets:
            y_SD = self.transcoder.decoder_bias(layer).expand(len(self.seen), -1).clone()
            if self.transcoder.config.skip:
                y_SD += found.read[layer] @ self.transcoder.skip_matrix(layer).T
            W_dec_SFD, sources = self.transcoder.decoder_matrix(layer), self.transcoder.sources_of(layer)
            for position in range(len(self.seen)):
                begin, end = self._span[position][sources.start], self._span[position][sources.stop]
                decoder_nD = W_dec_SFD[self._source[begin:end] - sources.start, self._number[begin:end]]
                y_SD[position] += self._written(layer, begin, end) @ decoder_nD
            errors_LSD[layer] -= torch.where(self.seen[:, None], y_SD, 0)
        return errors_LSD
