"""Training algorithm of EleutherAI's clt-training (commit cf9821f), re-implemented in plain PyTorch for a CPU.

One coder per source layer: TopK of the ReLU per token, decoders to all later layers, summed. The loss is the sum over
targets of the FVU of the batch, in the model's units. Their backward pass goes target by target, with the same
gradients as one pass. Two bugs are fixed:

* untied decoders, which raise an error at that commit, work;
* the loss for dead features, which only runs under tensor parallelism, reads the inputs of the encoder, and its
  gradients are those of its value (their backward pass multiplies the encoder's by the weights once more).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.data import BaselineData, RawBatch
from benchmarks.baselines.measure import Prediction, Setting, Trained, learn
from clt.transcoder.architecture import CLTConfig

Tying = Literal["none", "target"]

CHOICES = (
    "EleutherAI/clt-training (commit cf9821f): TopK of ReLU per token and layer; x sqrt(d) / mean norm of the first "
    "batch, outputs likewise (`normalize_io`, on in all their scripts); encoder as nn.Linear starts it, decoders "
    "zero, b_dec of the own layer the mean output, b_enc minus the image of the mean input; `post_enc` trained; sum "
    "over targets of the batch's FVU in the model's units; Adam (0.9, 0.999), lr 2e-4 / sqrt(F / 2^14), linear from 0 "
    "in 50 steps (README, scripts; the default of 1000 is made for long runs) and to 0 at the end. No skip connection "
    "(default), no k annealing (default), dead features left alone (default `dead_latent_penalty` 0). untied: a "
    "decoder and a bias per pair (`coalesce_topk=none`, default), without `post_enc_scale` (default), whose zeros "
    "would keep zero decoders zero. tied: one decoder per target (`coalesce_topk=concat`) with `post_enc_scale`, as "
    "in their gpt2 script. dead-latent loss: untied, plus -penalty x sum over tokens and inactive features of "
    "pre-activation x norm of the own layer's decoder, both with gradients; they give no value, so the penalty is "
    "chosen with the learning rate. Fixed: untied decoders run (theirs raise an error), and that loss has the "
    "gradient of its own value"
)
WARMUP_STEPS = 50


def published_learning_rate(n_features: int) -> float:
    """Their default learning rate for Adam."""
    return 2e-4 / math.sqrt(n_features / 2**14)


def rate_factor(step: int, warmup: int, steps: int) -> float:
    """Learning-rate factor: linear from 0 during warm-up, then linear to 0.

    Args:
        step: counted from 0.
        warmup: steps of the warm-up.
        steps: of the training.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def fvu(found_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Squared error over the squared deviation from the mean of the batch."""
    return (y_BD - found_BD).square().sum() / (y_BD - y_BD.mean(dim=0)).square().sum()


def dead_latent_loss(pre_BF: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Negative sum of the pre-activations of inactive features, weighted by decoder norm.

    Args:
        pre_BF: pre-activations, zero for selected features.
        W_dec_FD: decoder of the own layer.
    """
    return -(pre_BF.sum(dim=0) * W_dec_FD.norm(dim=1)).sum()


@dataclass(frozen=True, kw_only=True)
class LayerCodes:
    """Codes of one layer.

    Attributes:
        values_BK: activations, >= 0.
        indices_BK: feature numbers.
        inactive_BF: pre-activations before the ReLU, zero for selected features.
    """

    values_BK: Tensor
    indices_BK: Tensor
    inactive_BF: Tensor


class Coders(nn.Module):
    """The coders of all layers.

    Args:
        architecture: sizes.
        tying: a decoder per pair of layers, or one per target.
        first: the first batch, which initialises scales and biases.
        seed: of the encoders.
    """

    def __init__(self, architecture: CLTConfig, tying: Tying, first: RawBatch, seed: int) -> None:
        super().__init__()
        self.k, self.tying, D = architecture.k, tying, architecture.d_model
        layers, n_features = range(architecture.n_layers), architecture.n_features
        pairs = [(source, target) for target in layers for source in range(target + 1)]
        generator = torch.Generator().manual_seed(seed)
        drawn_LFD = torch.rand(len(layers), n_features, D, generator=generator)
        bound = 1 / math.sqrt(D)
        self.scale_x = [math.sqrt(D) / float(x_BD.norm(dim=1).mean()) for x_BD in first.x_LBD]
        self.scale_y = [math.sqrt(D) / float(y_BD.norm(dim=1).mean()) for y_BD in first.y_LBD]
        self.W_enc = nn.ParameterList((2 * drawn_FD - 1) * bound for drawn_FD in drawn_LFD)
        self.b_enc = nn.ParameterList(
            -(W_FD.detach() @ x_BD.mean(dim=0)) * scale
            for W_FD, x_BD, scale in zip(self.W_enc, first.x_LBD, self.scale_x, strict=True)
        )
        names = [_name(*pair) for pair in pairs]
        owners = names if tying == "none" else [_name(layer, layer) for layer in layers]
        self.W_dec = nn.ParameterDict({name: nn.Parameter(torch.zeros(n_features, D)) for name in owners})
        self.b_dec = nn.ParameterDict({name: nn.Parameter(torch.zeros(D)) for name in owners})
        with torch.no_grad():
            for layer in layers:
                mean_D = first.y_LBD[layer].mean(dim=0)
                self.b_dec[_name(layer, layer)].copy_(mean_D * self.scale_y[layer])
        self.post_enc = nn.ParameterDict({name: nn.Parameter(torch.zeros(n_features)) for name in names})
        self.post_scale = nn.ParameterDict(
            {_name(s, t): nn.Parameter(torch.full((n_features,), float(s == t))) for s, t in pairs}
            if tying == "target"
            else {}
        )

    def encode(self, layer: int, x_BD: Tensor) -> LayerCodes:
        """LayerCodes of one layer from raw inputs."""
        pre_BF = F.linear(x_BD * self.scale_x[layer], self.W_enc[layer], self.b_enc[layer])
        values_BK, indices_BK = pre_BF.relu().topk(self.k, dim=1)
        return LayerCodes(
            values_BK=values_BK,
            indices_BK=indices_BK,
            inactive_BF=pre_BF.scatter(1, indices_BK, 0.0),
        )

    def decode(self, target: int, codes: Sequence[LayerCodes]) -> Tensor:
        """[B,D] output of a layer, in the model's units, from the codes of the layers up to it."""
        y_BD = codes[0].values_BK.new_zeros(())
        for source, code in enumerate(codes[: target + 1]):
            name = _name(source, target)
            owner = name if self.tying == "none" else _name(target, target)
            active_BK = (code.values_BK > 0).to(code.values_BK)
            values_BK = code.values_BK + F.embedding(code.indices_BK, self.post_enc[name][:, None])[..., 0] * active_BK
            if self.tying == "target":
                values_BK = values_BK * F.embedding(code.indices_BK, self.post_scale[name][:, None])[..., 0]
            weights = self.W_dec[owner]
            y_BD = y_BD + F.embedding_bag(code.indices_BK, weights, per_sample_weights=values_BK, mode="sum")
            if self.tying == "none":
                y_BD = y_BD + self.b_dec[name]
        if self.tying == "target":
            y_BD = y_BD + self.b_dec[_name(target, target)]
        return y_BD / self.scale_y[target]

    def loss(self, batch: RawBatch, dead_penalty: float) -> Tensor:
        """Sum over targets of the FVU, plus the loss for dead features with its weight."""
        codes = [self.encode(layer, x_BD) for layer, x_BD in enumerate(batch.x_LBD)]
        total = torch.zeros(())
        for target, y_BD in enumerate(batch.y_LBD):
            total = total + fvu(self.decode(target, codes), y_BD)
            if dead_penalty:
                own_FD = self.W_dec[_name(target, target)]
                total = total + dead_penalty * dead_latent_loss(codes[target].inactive_BF, own_FD)
        return total


def _name(source: int, target: int) -> str:
    return f"{source}_{target}"


class EleutherLearner:
    """Trains `Coders`.

    Args:
        data: batches and sizes.
        tying: as in `Coders`.
        seed: of weights and batches.
        setting: learning rate and weight of the loss for dead features.
    """

    def __init__(self, data: BaselineData, tying: Tying, seed: int, setting: Setting) -> None:
        self._penalty = setting.dead_penalty
        self.coders = Coders(data.architecture, tying, data.first_batch(seed), seed)
        self._adam = torch.optim.Adam(self.coders.parameters(), lr=setting.learning_rate)
        warmup, steps = min(WARMUP_STEPS, data.job.steps // 2), data.job.steps
        self._rate = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: rate_factor(step, warmup, steps))

    def step(self, batch: RawBatch) -> None:
        """One step of Adam."""
        self._adam.zero_grad()
        loss = self.coders.loss(batch, self._penalty)
        loss.backward()
        self._adam.step()
        self._rate.step()

    def predict(self, x_LBD: Tensor) -> Prediction:
        """As `Learner`."""
        coders = self.coders
        codes = [coders.encode(layer, x_BD) for layer, x_BD in enumerate(x_LBD)]
        active = [
            torch.zeros_like(code.inactive_BF, dtype=torch.bool).scatter(1, code.indices_BK, code.values_BK > 0)
            for code in codes
        ]
        y_LBD = torch.stack([coders.decode(target, codes) for target in range(len(x_LBD))])
        return Prediction(y_LBD=y_LBD, active_LBF=torch.stack(active))


def train(data: BaselineData, seed: int, setting: Setting, tying: Tying) -> Trained:
    """Trains `Coders`.

    Args:
        data: batches and sizes.
        seed: of weights and batches.
        setting: hyperparameters.
        tying: a decoder per pair of layers, or one per target.
    """
    return learn(EleutherLearner(data, tying, seed, setting), data.batches(seed))
