"""Exchange of decoders that belong to sources, and of their gradients.

With `clt.tied_decoders: source` a rank owns W_shared and target_scale of its own sources, all columns. At the start of
a step every rank receives those of all sources, of W_shared only the columns that it decodes. In the backward pass the
gradients of all own targets are summed locally and sent to the owners when the last target has contributed: after all
other collectives, since autograd runs last what was recorded first.

Shape letters: L source layers, S sources of one target, T targets of one source, D d_model, F features, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from clt.distributed.mesh import Mesh, deal_layers
from clt.kernels.common.dtypes import accumulator
from clt.tensor_files import as_bytes
from clt.transcoder.layers import source_layers
from clt.transcoder.model import CrossLayerTranscoder


def shared_decoders(transcoder: CrossLayerTranscoder, mesh: Mesh) -> SharedDecoders | None:
    """Receives the decoders that belong to sources; all ranks of the model group call this together.

    Args:
        transcoder: this rank's share.
        mesh: the processes.

    Returns:
        The decoders of all sources; None for a transcoder whose decoders belong to targets. With gradients enabled
        every rank must go backward through them.
    """
    return SharedDecoders(transcoder, mesh) if transcoder.config.tied_decoders == "source" else None


class SharedDecoders:
    """Decoders of all sources on one rank, from `shared_decoders`."""

    def __init__(self, transcoder: CrossLayerTranscoder, mesh: Mesh) -> None:
        self._transcoder, self._bank = transcoder, _Bank(transcoder, mesh)
        sources = transcoder.share.sources
        # A rank without sources takes part in the backward collective too: its graph must reach it.
        anchor = torch.zeros((), requires_grad=True)
        own = [read(source) for read in (transcoder.shared_decoder, transcoder.target_scales) for source in sources]
        like = transcoder.decoder_bias(transcoder.share.targets[0])
        self._anchor: Tensor = _Receive.apply(self._bank, anchor, like, *own)

    def into(self, target: int) -> tuple[Tensor, Tensor]:
        """Decoders [S,F,D_own] and scales [S,F] of a target's sources."""
        rows = self._transcoder.source_rows(target)
        # Number of this target among each source's targets.
        places = [self._transcoder.targets_of(source).index(target) for source in self._transcoder.sources_of(target)]
        W_SFD, scale_SF = _Into.apply(self._bank, rows, places, self._anchor)
        return W_SFD, scale_SF


class _Bank:
    """Buffers of all sources' decoders and of their gradients. It must not refer to a graph, which refers to it.

    A source is sent as [F,w+T]: its decoders' columns, w of each rank, and its scales as T further columns.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, mesh: Mesh) -> None:
        shares, layers = (
            deal_layers(transcoder.config, mesh.layer_size, mesh.column_size),
            source_layers(transcoder.config),
        )
        self._mesh = mesh
        self._dealt = [len(share.sources) for share in shares]
        #: Rows of all sources in the order in which they are sent.
        self._rows = [layers.index(layer) for share in shares for layer in share.sources]
        self._n_targets = [len(transcoder.targets_of(layer)) for layer in transcoder.share.sources]
        self._most_targets = max(len(transcoder.targets_of(layer)) for layer in layers)
        self._n_features, self._width = transcoder.config.n_features, transcoder.config.d_model // mesh.column_size
        self._gradients: tuple[Tensor, Tensor] | None = None

    def receive(self, W: Sequence[Tensor], scales: Sequence[Tensor], like: Tensor) -> None:
        """Sends decoders and scales of the own sources to all ranks, and receives those of all sources.

        Args:
            W: [F,D] by own source.
            scales: [T,F] by own source.
            like: any tensor with their device and dtype; a rank may have no source.
        """
        mesh, T = self._mesh, self._most_targets
        own = [
            torch.cat([W_FD.unflatten(1, (mesh.column_size, -1)), _beside(scale_TF, mesh.column_size, T)], dim=2)
            for W_FD, scale_TF in zip(W, scales, strict=True)
        ]
        F, columns = self._n_features, self._width + T
        own_CLFN = torch.stack(own).permute(2, 0, 1, 3) if own else like.new_empty(mesh.column_size, 0, F, columns)
        wire = own_CLFN.expand(mesh.layer_size, -1, -1, -1, -1).flatten(0, 2)
        arrived_LFN = wire.new_empty(len(self._rows), F, columns)
        self._all_to_all(arrived_LFN, wire, self._dealt, [len(own)] * mesh.model_size)
        mesh.traffic.count("model", "all_gather", wire[: len(own)].nbytes, mesh.model_size)
        self.W_LFD = arrived_LFN.new_empty(len(self._rows), F, self._width)
        self.scale_LTF = arrived_LFN.new_empty(len(self._rows), T, F)
        for row, arrived_FN in zip(self._rows, arrived_LFN, strict=True):
            self.W_LFD[row] = arrived_FN[:, : self._width]
            self.scale_LTF[row] = arrived_FN[:, self._width :].T

    def add_gradients(self, rows: slice, places: Sequence[int], W: Tensor | None, scale: Tensor | None) -> None:
        """Adds the gradients that one target contributes to its sources.

        Args:
            rows: of the target's sources.
            places: place of the target among the targets of each of them.
            W: [S,F,D_own], or None.
            scale: [S,F], or None.
        """
        if self._gradients is None:
            wide = accumulator(self.W_LFD.dtype)
            self._gradients = self.W_LFD.new_zeros(self.W_LFD.shape, dtype=wide), self.scale_LTF.to(wide).zero_()
        W_LFD, scale_LTF = self._gradients
        if W is not None and scale is not None:
            W_LFD[rows] += W
            scale_LTF[list(range(rows.start, rows.stop)), places] += scale

    def send_back(self) -> Iterator[Tensor]:
        """Gradients of W [F,D] of the own sources, then of their scales [T,F]: sums over ranks in their order."""
        assert self._gradients is not None, "every rank has targets"
        mesh, own = self._mesh, len(self._n_targets)
        W_LFD, scale_LTF = self._gradients
        wire = W_LFD.new_empty(len(W_LFD), self._n_features, self._width + self._most_targets)
        for row, wire_FN in zip(self._rows, wire, strict=True):
            wire_FN[:, : self._width] = W_LFD[row]
            wire_FN[:, self._width :] = scale_LTF[row].T
        parts = wire.new_empty(mesh.model_size * own, *wire.shape[1:])
        self._all_to_all(parts, wire, [own] * mesh.model_size, self._dealt)
        mesh.traffic.count("model", "reduce_scatter", parts[:own].nbytes, mesh.model_size)
        parts = parts.view(mesh.layer_size, mesh.column_size, own, *wire.shape[1:])
        sums_CLFN = parts.sum(dim=0)
        for row in range(own):
            yield sums_CLFN[:, row, :, : self._width].transpose(0, 1).flatten(1)
        for row, n_targets in enumerate(self._n_targets):
            yield sums_CLFN[:, row, :, self._width : self._width + n_targets].sum(dim=0).T

    def _all_to_all(self, arrived: Tensor, wire: Tensor, arriving: list[int], leaving: list[int]) -> None:
        """Exchanges rows as bytes, which every backend supports."""
        group = self._mesh.model_group
        dist.all_to_all_single(as_bytes(arrived), as_bytes(wire.contiguous()), arriving, leaving, group=group)


class _Receive(torch.autograd.Function):
    """Between the parameters and the buffers; the scalar it returns only anchors the way back in the graph."""

    @staticmethod
    def forward(ctx: Any, bank: _Bank, anchor: Tensor, like: Tensor, *own: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.bank, ctx.dtype = bank, like.dtype
        half = len(own) // 2
        bank.receive(own[:half], own[half:], like)
        return like.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *(gradient.to(ctx.dtype) for gradient in ctx.bank.send_back())


class _Into(torch.autograd.Function):
    """Between the buffers and a target that reads some of their rows."""

    @staticmethod
    def forward(ctx: Any, bank: _Bank, rows: slice, places: Sequence[int], anchor: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.bank, ctx.rows, ctx.places = bank, rows, places
        return bank.W_LFD[rows], bank.scale_LTF[list(range(rows.start, rows.stop)), places]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.bank.add_gradients(ctx.rows, ctx.places, *gradients)
        return None, None, None, None


def _beside(scale_TF: Tensor, copies: int, width: int) -> Tensor:
    """[F,copies,width]: scales as columns, for each of the ranks that share a layer, 0 where there is no target."""
    return pad(scale_TF.T, (0, width - len(scale_TF)))[:, None].expand(-1, copies, -1)
