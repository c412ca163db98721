"""Measures the contribution of a node to every row of a graph, by an intervention on the frozen model of its prompt.

Edges are computed by `clt.attribution.replacement.linear_model` and `clt.attribution.graphs.sources`; nothing of these
is used here. The model's own modules run, and the transcoder's own unfolded `decode` gives what a feature, an error or
a bias writes. So a token taken from the wrong place, a lost attention head or a wrong decoder in the computation of
edges shows as a difference. The frozen model computes in float64, which takes twice the memory of a float32 model.

Shapes: S prompt length, L layers, K slots per token and layer, D d_model, V vocabulary, R rows, N nodes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from clt.attribution.graphs.graph import BiasKind, Graph, NodeKind
from clt.attribution.replacement.frozen_model import FrozenModel, record
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.models.hooks import Edit, attach
from clt.capture.models.sites import decoder_site, decoder_sites
from clt.errors import GraphError
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class _Addition:
    """The addition that one intervention makes to the frozen forward.

    Attributes:
        embed: [S,D] to what enters block 0.
        mlp_out: layer -> [S,D].
        attention_bias: layer whose attention biases are added twice.
        feature: (source layer, position, slot) of the feature whose output is added twice.
    """

    embed: Tensor | None = None
    mlp_out: dict[int, Tensor] = field(default_factory=dict)
    attention_bias: int | None = None
    feature: tuple[int, int, int] | None = None


class EdgeMeasurement:
    """The local replacement model of a prompt, in float64, and interventions on the nodes of its graph.

    Args:
        adapter: the model the graph was made with.
        transcoder: the transcoder the graph was made with, scaled or folded.
        inputs: the prompt.
        graph: its unpruned graph.

    Raises:
        GraphError: the frozen forward does not give the values of the graph's rows.
    """

    @torch.no_grad()
    def __init__(
        self, adapter: ModelAdapter, transcoder: CrossLayerTranscoder, inputs: PromptInputs, graph: Graph
    ) -> None:
        self.graph = graph
        self.read_sites = decoder_sites(range(adapter.n_layers), transcoder.config.read_site)
        self.sources = LayerShare.everything(transcoder.config).sources
        self.targets = LayerShare.everything(transcoder.config).targets
        self.seen = inputs.tokens.encoded(transcoder.config.drop_bos)[0]
        recording = record(adapter, inputs, transcoder.config.read_site)
        self.frozen = FrozenModel(adapter, recording, dtype=torch.float64)
        self.embed, self.read, self.mlp_out = (
            tensor.double() for tensor in (recording.embed, recording.read, recording.mlp_out)
        )
        self.transcoder = copy.deepcopy(transcoder).to(adapter.device).double()
        self.values_LSK, self.indices_LSK, self.slots = self._codes()
        self.reconstructions = {layer: self._reconstruction(layer, self.values_LSK) for layer in self.targets}
        self.base = self._row_values(_Addition())
        self._require_recorded()

    @torch.no_grad()
    def effect(self, source: int) -> Tensor:
        """Adds a node's vector once more.

        Args:
            source: number of the node.

        Returns:
            [R] float64, what that adds to the value of every row.
        """
        kind, feature = NodeKind(int(self.graph.nodes.kind[source])), int(self.graph.nodes.feature[source])
        layer, position = int(self.graph.nodes.layer[source]), int(self.graph.nodes.position[source])
        match kind, feature:
            case NodeKind.FEATURE, _:
                addition = _Addition(feature=(layer, position, int(self.slots[source])))
            case NodeKind.ERROR, _:
                addition = _Addition(mlp_out={layer: self._only_at(position, self._error(layer))})
            case ((NodeKind.TEXT | NodeKind.IMAGE), _):
                addition = _Addition(embed=self._only_at(position, self.embed))
            case NodeKind.BIAS, BiasKind.DECODER:
                addition = _Addition(mlp_out={layer: self._decoder_bias(layer)})
            case NodeKind.BIAS, BiasKind.ATTENTION:
                addition = _Addition(attention_bias=layer)
            case NodeKind.BIAS, _:
                return self._values_of_zero()
            case _:
                return torch.zeros_like(self.base)
        return self._row_values(addition) - self.base

    def _row_values(self, addition: _Addition) -> Tensor:
        """Pre-activations and logits of the graph's rows, [R] float64, with an addition."""
        adapter = self.frozen.adapter
        with ExitStack() as stack:
            found = stack.enter_context(attach(adapter, read=self.read_sites))
            if addition.attention_bias is not None:
                for part in (adapter.v_proj, adapter.o_proj):
                    linear = part(addition.attention_bias)
                    if getattr(linear, "bias", None) is not None:
                        stack.callback(linear.register_forward_hook(lambda m, _, out: out + m.bias).remove)
            logits_SV = self.frozen.forward(self._edits(addition, found))
        return self._read([found[site][0] for site in self.read_sites], logits_SV)

    def _require_recorded(self) -> None:
        expected = self.graph.row_values.double()
        scale = torch.maximum(expected.abs(), self.graph.edges.abs().amax(1).double())
        if not bool(((self.base - expected).abs() <= 1e-3 * scale).all()):
            raise GraphError("the graph's values are not those of this model, transcoder and prompt; compute it again")

    def _edits(self, addition: _Addition, found: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Edits of the frozen forward; `found` holds the read sites that it has computed so far."""
        edits: dict[str, Edit] = {
            decoder_site(layer, "mlp_out"): partial(self._mlp_output, layer, addition, found)
            for layer in {*self.targets, *addition.mlp_out}
        }
        extra_SD = addition.embed
        if extra_SD is not None:
            edits["lm.embed"] = lambda embed_1SD: embed_1SD + extra_SD
        return edits

    def _mlp_output(self, layer: int, addition: _Addition, found: Mapping[str, Tensor], y_1SD: Tensor) -> Tensor:
        """[1,S,D] the recorded output, plus the addition, plus the change of the transcoder's own output."""
        if layer in addition.mlp_out:
            y_1SD = y_1SD + addition.mlp_out[layer]
        if layer not in self.targets:
            return y_1SD
        if addition.feature is not None:
            source, position, slot = addition.feature
            without_LSK = self.values_LSK.clone()
            without_LSK[self.sources.index(source), position, slot] = 0
            written_SD = self.reconstructions[layer] - self._reconstruction(layer, without_LSK)
            y_1SD = y_1SD + written_SD * self.seen[:, None]
        if self.transcoder.config.skip:
            now_SD = self._decode(layer, self.values_LSK, found[self.read_sites[layer]][0])
            y_1SD = y_1SD + (now_SD - self.reconstructions[layer]) * self.seen[:, None]
        return y_1SD

    def _decode(self, layer: int, values_LSK: Tensor, x_SD: Tensor | None) -> Tensor:
        """Raw output of a target layer from codes and raw input."""
        rows = [self.sources.index(source) for source in self.transcoder.sources_of(layer)]
        if x_SD is not None:
            x_SD = self.transcoder.scaling.standardise_x(x_SD[None], (layer,))[0]
        y_SD = self.transcoder.decode_layer(layer, values_LSK[rows], self.indices_LSK[rows], x_SD)
        return self.transcoder.scaling.restore_y(y_SD[None], (layer,))[0]

    def _reconstruction(self, layer: int, values_LSK: Tensor) -> Tensor:
        """Raw output of a target layer from codes and the recorded input."""
        x_SD = self.read[layer] if self.transcoder.config.skip else None
        return self._decode(layer, values_LSK, x_SD)

    def _decoder_bias(self, layer: int) -> Tensor:
        """[S,D] output of the transcoder without active features at input zero, where it acts."""
        x_SD = torch.zeros_like(self.embed) if self.transcoder.config.skip else None
        return self._decode(layer, torch.zeros_like(self.values_LSK), x_SD) * self.seen[:, None]

    def _error(self, layer: int) -> Tensor:
        y_SD = self.mlp_out[layer]
        if layer not in self.targets:
            return y_SD
        return y_SD - self.reconstructions[layer] * self.seen[:, None]

    @staticmethod
    def _only_at(position: int, vector_SD: Tensor) -> Tensor:
        out_SD = torch.zeros_like(vector_SD)
        out_SD[position] = vector_SD[position]
        return out_SD

    def _values_of_zero(self) -> Tensor:
        """Values of all rows when everything they read is zero: their own biases."""
        zeros_SD = torch.zeros_like(self.embed)
        return self._read([zeros_SD] * len(self.read), cast(Tensor, self.frozen.adapter.lm_head(zeros_SD)))

    def _read(self, x_LSD: list[Tensor], logits_SV: Tensor) -> Tensor:
        nodes, n_targets = self.graph.nodes, len(self.graph.targets)
        rows = self.graph.rows_to_node[: len(self.graph.rows_to_node) - n_targets]
        layers, positions, numbers = nodes.layer[rows].long(), nodes.position[rows].long(), nodes.feature[rows].long()
        values = torch.empty(len(rows) + n_targets, dtype=torch.float64)
        for layer in layers.unique().tolist():
            here = (layers == layer).nonzero()[:, 0]
            values[here] = self._pre_activations(layer, x_LSD[layer], positions[here], numbers[here]).cpu()
        for number, target in enumerate(self.graph.targets, start=len(rows)):
            if target.kind == "feature":
                one = torch.tensor([target.position]), torch.tensor([target.feature])
                values[number] = self._pre_activations(target.layer, x_LSD[target.layer], *one)[0]
                continue
            logits_V = logits_SV[target.position]
            against = logits_V.mean() if target.kind == "logit" else logits_V[target.minus_token_id]
            values[number] = logits_V[target.token_id] - against
        return values

    def _pre_activations(self, layer: int, x_SD: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
        x_SD = self.transcoder.scaling.standardise_x(x_SD[None], (layer,))[0]
        W_FD, b_F = self.transcoder.encoder(layer)
        return (x_SD[positions] * W_FD[numbers]).sum(1) + b_F[numbers]

    def _codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values and indices [L,S,K] of the graph's features, and the slot of each feature node."""
        nodes = self.graph.nodes
        features = nodes.is_kind(NodeKind.FEATURE).nonzero()[:, 0]
        layers, positions = nodes.layer[features].long(), nodes.position[features].long()
        numbers = nodes.feature[features].long()
        # Features are sorted by layer and position: the slot counts from the first of the same key.
        key = layers * len(self.seen) + positions
        slots = torch.arange(len(features)) - torch.searchsorted(key, key)
        shape = (len(self.sources), len(self.seen), int(slots.max()) + 1 if len(slots) else 1)
        values_LSK = torch.zeros(shape, dtype=torch.float64)
        indices_LSK = torch.zeros(shape, dtype=torch.int32)
        for row, layer in enumerate(self.sources):
            here = (layers == layer).nonzero()[:, 0]
            # From the recorded input: the graph's own activations are part of what is checked.
            x_SD = self.read[layer]
            activations = self._pre_activations(layer, x_SD, positions[here], numbers[here])
            values_LSK[row, positions[here], slots[here]] = activations.cpu()
            indices_LSK[row, positions[here], slots[here]] = numbers[here].int()
        return values_LSK.to(self.seen.device), indices_LSK.to(self.seen.device), slots
