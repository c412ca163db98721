"""Dense baseline of the training benchmark: dense products, torch.topk, autograd, PyTorch's fused Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from clt.launch.bench.training.sizes import TrainSize
from clt.transcoder.layers import source_layers, target_layers
from clt.transcoder.model import CrossLayerTranscoder


class DenseTranscoder:
    """Trains one rank's share with the activations of all features of all sources as matrices.

    Args:
        transcoder: the share whose parameters are trained.
        size: features and batch.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, size: TrainSize) -> None:
        self._transcoder, self._k = transcoder, size.k
        self._adam = torch.optim.Adam(transcoder.parameters(), lr=1e-3, fused=True)
        self._sources = source_layers(transcoder.config)
        self._n_targets = len(target_layers(transcoder.config))
        #: Activations of the sources of other ranks; a real job would return their gradients.
        self._given: dict[int, Tensor] = {}

    def step(self, x_LBD: Tensor, y_MBD: Tensor) -> Tensor:
        """One step, forward, backward and Adam; returns the loss."""
        self._adam.zero_grad()
        for z_BF in self._given.values():
            z_BF.grad = None
        loss = self.loss(x_LBD, y_MBD)
        loss.backward()
        self._adam.step()
        return loss.detach()

    def loss(self, x_LBD: Tensor, y_MBD: Tensor) -> Tensor:
        """Mean over all targets of the squared error, summed over the own targets only."""
        transcoder = self._transcoder
        z = {layer: self._encode(layer, x_BD) for layer, x_BD in zip(transcoder.share.sources, x_LBD, strict=True)}
        losses = []
        for layer, y_BD in zip(transcoder.share.targets, y_MBD, strict=True):
            W_SFD, b_D = transcoder.decoder_matrix(layer), transcoder.decoder_bias(layer)
            yhat_BD = b_D.expand_as(y_BD)
            for source, W_FD in zip(transcoder.sources_of(layer), W_SFD, strict=True):
                z_BF = z[source] if source in z else self._of_others(source, y_BD, W_FD.shape[0])
                yhat_BD = torch.addmm(yhat_BD, z_BF, W_FD)
            losses.append((yhat_BD - y_BD).square().mean())
        return torch.stack(losses).sum() / self._n_targets

    def _encode(self, layer: int, x_BD: Tensor) -> Tensor:
        W_FD, b_F = self._transcoder.encoder(layer)
        pre_BF = torch.addmm(b_F, x_BD, W_FD.T).relu()
        values_BK, indices_BK = pre_BF.topk(self._k, dim=1)
        return torch.zeros_like(pre_BF).scatter(1, indices_BK, values_BK)

    def _of_others(self, source: int, like_BD: Tensor, n_features: int) -> Tensor:
        if source not in self._given:
            draw = torch.Generator(like_BD.device).manual_seed(source)
            shape = len(like_BD), n_features
            scores_BF = torch.rand(shape, generator=draw, device=like_BD.device, dtype=like_BD.dtype)
            values_BK, indices_BK = scores_BF.topk(self._k, dim=1)
            z_BF = torch.zeros_like(scores_BF).scatter(1, indices_BK, values_BK)
            self._given[source] = z_BF.requires_grad_()
        return self._given[source]
