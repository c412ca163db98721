"""Inputs of the kernel benchmark: sizes, and codes whose features fire uniformly or by Zipf's law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.roofline import Shape

Distribution = Literal["uniform", "zipf"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("uniform", "zipf")

#: Largest share of tokens on which a feature fires; at 1 its bias would be infinite.
_MOST = 0.99
#: Pre-activations above this are among the k largest, on average over tokens.
_CUT = 3.0
#: Pre-activations held at once while codes are drawn.
_DRAWN = 2**24


@dataclass(frozen=True, kw_only=True)
class KernelSize:
    """One target layer of a cross-layer transcoder and a batch.

    Attributes:
        name: on the command line and in tables.
        d_model: width of the model, D.
        n_features: features per layer, F.
        n_tokens: tokens of a batch, N.
        k: slots per token and layer.
        n_sources: source layers that write to the target, S.
    """

    name: str
    d_model: int
    n_features: int
    n_tokens: int
    k: int
    n_sources: int

    def __str__(self) -> str:
        return (
            f"{self.name}: D={self.d_model} F={self.n_features} N={self.n_tokens} k={self.k}, {self.n_sources} sources"
        )


#: A: a wide model with 16 sources per target; A32k: A with more tokens; B: GPT-2; few and many: few and many features
#: for the k; cpu: B reduced for two cores; toy: only checks that everything runs.
SIZES = {
    size.name: size
    for size in (
        KernelSize(name="A", d_model=4096, n_features=32768, n_tokens=4096, k=64, n_sources=16),
        KernelSize(name="A32k", d_model=4096, n_features=32768, n_tokens=32768, k=64, n_sources=16),
        KernelSize(name="B", d_model=768, n_features=16384, n_tokens=8192, k=32, n_sources=12),
        KernelSize(name="few", d_model=4096, n_features=8192, n_tokens=4096, k=128, n_sources=16),
        KernelSize(name="many", d_model=768, n_features=131072, n_tokens=8192, k=32, n_sources=12),
        KernelSize(name="cpu", d_model=768, n_features=16384, n_tokens=1024, k=32, n_sources=3),
        KernelSize(name="toy", d_model=48, n_features=256, n_tokens=64, k=8, n_sources=2),
    )
}


@dataclass(frozen=True, kw_only=True)
class KernelInputs:
    """Tensors of one size and one distribution of features.

    Attributes:
        size: the numbers.
        distribution: distribution of feature frequencies.
        x_BD: encoder inputs.
        W_enc_FD: encoder of the last source layer.
        b_enc_F: its bias, chosen so that features fire at the wanted rates.
        values_SBK: activations of the source layers, all slots filled.
        indices_SBK: feature numbers, int32.
        W_dec_SFD: decoders.
        b_dec_D: bias.
        y_BD: target of the reconstruction.
        grad_BD: a gradient of the reconstruction.
        csr: the codes, grouped by feature.
    """

    size: KernelSize
    distribution: Distribution
    x_BD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    values_SBK: Tensor
    indices_SBK: Tensor
    W_dec_SFD: Tensor
    b_dec_D: Tensor
    y_BD: Tensor
    grad_BD: Tensor
    csr: ops.FeatureCSR

    @classmethod
    def make(
        cls, size: KernelSize, distribution: Distribution, device: torch.device, dtype: torch.dtype
    ) -> KernelInputs:
        """Draws all tensors from one seed.

        Args:
            size: the sizes.
            distribution: of firing rates.
            device: of the tensors.
            dtype: of weights, activations and gradients.
        """
        generator = torch.Generator(device).manual_seed(20261120)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

        n, d, f = size.n_tokens, size.d_model, size.n_features
        rates_SF = [firing_rates(f, size.k, distribution, generator) for _ in range(size.n_sources)]
        codes = [_draw(n, size.k, _bias(rates_F), dtype, generator) for rates_F in rates_SF]
        values_SBK = torch.stack([values_BK for values_BK, _ in codes])
        indices_SBK = torch.stack([indices_BK for _, indices_BK in codes])
        return cls(
            size=size,
            distribution=distribution,
            x_BD=normal(n, d),
            W_enc_FD=normal(f, d, scale=1 / math.sqrt(d)),
            b_enc_F=_bias(rates_SF[-1]).to(dtype),
            values_SBK=values_SBK,
            indices_SBK=indices_SBK,
            W_dec_SFD=normal(size.n_sources, f, d, scale=1 / math.sqrt(d)),
            b_dec_D=normal(d),
            y_BD=normal(n, d),
            grad_BD=normal(n, d),
            csr=ops.feature_csr(values_SBK, indices_SBK, f),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, activations and gradients."""
        return self.x_BD.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.x_BD.device

    @property
    def touched(self) -> Tensor:
        """[S,F] bool, features that fire in the batch."""
        return self.csr.bounds.diff(dim=1) > 0

    @property
    def shape(self) -> Shape:
        """Sizes that determine the work."""
        return Shape(
            d_model=self.size.d_model,
            n_features=self.size.n_features,
            n_tokens=self.size.n_tokens,
            k=self.size.k,
            n_sources=self.size.n_sources,
            itemsize=self.dtype.itemsize,
            touched=tuple(self.touched.sum(dim=1).tolist()),
        )


def firing_rates(n_features: int, k: int, distribution: Distribution, generator: torch.Generator) -> Tensor:
    """Share of tokens on which each feature fires, in random order.

    Args:
        n_features: F.
        k: features per token, the sum of the shares.
        distribution: uniform, or zipf: in proportion to 1/rank, clipped at 0.99.
        generator: of the order; the result is on its device.

    Returns:
        [F] float64.
    """
    if distribution == "uniform":
        return torch.full((n_features,), k / n_features, dtype=torch.float64, device=generator.device)
    inverse_F = 1.0 / torch.arange(1, n_features + 1, dtype=torch.float64)
    low, high = 0.0, float(n_features)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (inverse_F * middle).clamp(max=_MOST).sum() < k else (low, middle)
    order = torch.randperm(n_features, generator=generator, device=generator.device)
    return (inverse_F * low).clamp(max=_MOST).to(generator.device)[order]


def _bias(rates_F: Tensor) -> Tensor:
    """[F] float32, means of normal pre-activations of variance 1 that exceed `_CUT` at the given rates."""
    return (torch.special.ndtri(rates_F) + _CUT).float()


def _draw(
    n_tokens: int, k: int, bias_F: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes [N,k] of random pre-activations, positive and ascending by feature."""
    values, indices = [], []
    rows = max(1, _DRAWN // len(bias_F))
    for start in range(0, n_tokens, rows):
        shape = min(rows, n_tokens - start), len(bias_F)
        pre_BF = torch.randn(shape, generator=generator, device=bias_F.device).add_(bias_F)
        indices_BK = pre_BF.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        indices.append(indices_BK.int())
        values.append(pre_BF.gather(1, indices_BK).to(dtype))
    return torch.cat(values), torch.cat(indices)
