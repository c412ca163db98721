"""BatchTopK training of curt-tigges/crosslayer-coding (commit 9499108), re-implemented in plain PyTorch for a CPU.

Every channel is standardised; a batch keeps the k x tokens pre-activations of all layers with the largest z-scores
within their feature, with their values, which may be negative. The loss is the MSE in the model's units, plus a loss on
negative pre-activations and AuxK: the dead features of a layer reconstruct the residual of that layer through its own
decoder. Their trainer encodes three or four times per step and has a product per pair of layers; one encoding and one
product per target give the same numbers in less time. One bug is fixed: AuxK compares outputs and residuals in the same
units (theirs compares standardised with raw ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.data import BaselineData, ChannelMoments, RawBatch
from benchmarks.baselines.measure import Prediction, Setting, Trained, learn
from clt.transcoder.architecture import CLTConfig

CHOICES = (
    "curt-tigges/crosslayer-coding (commit 9499108 and its tutorial 1B): BatchTopK of k x layers per token over "
    "layers and tokens, ranked by z-score of the batch, values raw; `mean_std` per channel and layer; untied decoders "
    "with a bias per pair (`decoder_tying=none`, default), encoders U(+-1/sqrt F), decoders U(+-1/sqrt(L d)), biases "
    "0; sum over layers of the MSE in the model's units; no tanh penalty (with BatchTopK the tutorial turns it off: k "
    "sets L0), pre-activation loss 3e-6 (default); AuxK 1/32 with 512 features (tutorial), dead after 200 steps "
    "(tutorial, which trains for 1000; default 1000); AdamW (0.9, 0.98), constant and linear to 0 in the last fifth "
    "(tutorial); lr 3e-4 (default of their command). Fixed: AuxK compares in one unit; theirs compares standardised "
    "outputs with raw residuals"
)
PUBLISHED_LEARNING_RATE = 3e-4
K_AUX, AUX_WEIGHT, PRE_WEIGHT, DEAD_STEPS = 512, 1 / 32, 3e-6, 200
_FIRES = 1e-6


def rate_factor(step: int, steps: int) -> float:
    """Learning-rate factor at a step, counted from 0: constant, then linear to 0 in the last fifth."""
    start = int(0.8 * steps)
    return 1.0 if step < start else max(0.0, (steps - step) / (steps - start))


def batch_topk(pre_LBF: Tensor, k: int) -> Tensor:
    """Selects the k x B pre-activations of a batch with the largest z-scores.

    Args:
        pre_LBF: pre-activations.
        k: features per token over all layers.

    Returns:
        [L,B,F] bool.
    """
    std_L1F, mean_L1F = torch.std_mean(pre_LBF, dim=1, keepdim=True)
    z_N = ((pre_LBF - mean_L1F) / (std_L1F + 1e-6)).flatten()
    chosen = z_N.topk(min(k * pre_LBF.shape[1], len(z_N)), sorted=False).indices
    return torch.zeros_like(z_N, dtype=torch.bool).index_fill(0, chosen, True).view_as(pre_LBF)


def dead_codes(pre_BF: Tensor, dead_F: Tensor) -> Tensor:
    """[B,F] largest pre-activations of dead features, up to `K_AUX` per token, of either sign."""
    k = min(K_AUX, int(dead_F.sum()))
    values_BK, indices_BK = pre_BF.masked_fill(~dead_F, -torch.inf).topk(k, dim=1)
    return torch.zeros_like(pre_BF).scatter(1, indices_BK, values_BK)


@dataclass(frozen=True, kw_only=True)
class Units:
    """Standardisation of L sites per channel.

    Attributes:
        mean_L1D: means.
        std_L1D: standard deviations.
    """

    mean_L1D: Tensor
    std_L1D: Tensor

    @classmethod
    def of(cls, moments: ChannelMoments) -> Units:
        """Units in which these moments are 0 and 1."""
        return cls(mean_L1D=moments.mean_LD[:, None], std_L1D=moments.std_LD[:, None])


class CrosslayerTranscoder(nn.Module):
    """Encoders of all layers and a decoder per pair of layers; decoders into one target are concatenated.

    Args:
        architecture: sizes.
        x: units of the inputs.
        y: units of the outputs.
        seed: of the weights.
    """

    def __init__(self, architecture: CLTConfig, x: Units, y: Units, seed: int) -> None:
        super().__init__()
        L, n_features, D = architecture.n_layers, architecture.n_features, architecture.d_model
        self.x, self.y, self.k, self.n_features = x, y, architecture.k * L, n_features
        generator = torch.Generator().manual_seed(seed)

        def uniform(rows: int, columns: int, bound: float) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(rows, columns, generator=generator) - 1) * bound)

        self.W_enc = nn.ParameterList(uniform(n_features, D, 1 / math.sqrt(n_features)) for _ in range(L))
        self.b_enc = nn.ParameterList(torch.zeros(n_features) for _ in range(L))
        self.W_dec = nn.ParameterList(uniform((t + 1) * n_features, D, 1 / math.sqrt(L * D)) for t in range(L))
        self.b_dec = nn.ParameterList(torch.zeros(t + 1, D) for t in range(L))

    def encode(self, x_LBD: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations [L,B,F] of raw inputs, and the selection [L,B,F] bool."""
        x_LBD = (x_LBD - self.x.mean_L1D) / self.x.std_L1D
        weights = zip(x_LBD, self.W_enc, self.b_enc, strict=True)
        pre_LBF = torch.stack([F.linear(x_BD, W_FD, b_F) for x_BD, W_FD, b_F in weights])
        return pre_LBF, batch_topk(pre_LBF.detach(), self.k)

    def decode(self, codes_LBF: Tensor) -> Tensor:
        """Raw outputs [L,B,D]."""
        codes_BN = codes_LBF.transpose(0, 1).flatten(1)
        outputs = [
            codes_BN[:, : len(W_ND)] @ W_ND + b_SD.sum(dim=0) for W_ND, b_SD in zip(self.W_dec, self.b_dec, strict=True)
        ]
        return torch.stack(outputs) * self.y.std_L1D + self.y.mean_L1D

    def loss(self, batch: RawBatch, dead_LF: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the features that fired [L,F] bool."""
        pre_LBF, kept_LBF = self.encode(batch.x_LBD)
        codes_LBF = pre_LBF * kept_LBF
        missing_LBD = batch.y_LBD - self.decode(codes_LBF)
        total = missing_LBD.square().mean(dim=(1, 2)).sum() + PRE_WEIGHT * (-pre_LBF).relu().mean()
        for layer, dead_F in enumerate(dead_LF):
            if dead_F.any():
                aux_BD = self._own_layer(layer, dead_codes(pre_LBF[layer], dead_F))
                total = total + AUX_WEIGHT * F.mse_loss(aux_BD, missing_LBD[layer])
        return total, (codes_LBF.detach() > _FIRES).any(dim=1)

    def _own_layer(self, layer: int, codes_BF: Tensor) -> Tensor:
        """[B,D] contribution of a layer to its own output, in the model's units and without mean, as the residual."""
        own_FD = self.W_dec[layer][-self.n_features :]
        return (codes_BF @ own_FD + self.b_dec[layer][layer]) * self.y.std_L1D[layer]


class CrosslayerLearner:
    """Trains a `CrosslayerTranscoder`.

    Args:
        data: batches and sizes.
        seed: of weights and batches.
        setting: the learning rate.
    """

    def __init__(self, data: BaselineData, seed: int, setting: Setting) -> None:
        architecture, steps = data.architecture, data.job.steps
        self.transcoder = CrosslayerTranscoder(architecture, Units.of(data.x), Units.of(data.y), seed)
        self._adam = torch.optim.AdamW(self.transcoder.parameters(), lr=setting.learning_rate, betas=(0.9, 0.98))
        self._rate = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: rate_factor(step, steps))
        self._silent_LF = torch.zeros(architecture.n_layers, architecture.n_features, dtype=torch.int64)

    def step(self, batch: RawBatch) -> None:
        """One step of AdamW."""
        self._adam.zero_grad()
        loss, fired_LF = self.transcoder.loss(batch, self._silent_LF > DEAD_STEPS)
        loss.backward()
        self._adam.step()
        self._rate.step()
        self._silent_LF = torch.where(fired_LF, 0, self._silent_LF + 1)

    def predict(self, x_LBD: Tensor) -> Prediction:
        """As `Learner`; selects over the batch, as their evaluation does."""
        pre_LBF, kept_LBF = self.transcoder.encode(x_LBD)
        codes_LBF = pre_LBF * kept_LBF
        return Prediction(y_LBD=self.transcoder.decode(codes_LBF), active_LBF=codes_LBF != 0)


def train(data: BaselineData, seed: int, setting: Setting) -> Trained:
    """Trains `CrosslayerTranscoder` with BatchTopK.

    Args:
        data: batches and sizes.
        seed: of weights and batches.
        setting: hyperparameters.
    """
    return learn(CrosslayerLearner(data, seed, setting), data.batches(seed))
