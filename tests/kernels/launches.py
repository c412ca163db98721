"""One call of every operation that launches Triton kernels, on tensors without memory, for `machine_code`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.common.csr import SPLIT, FeatureCSR
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs


@dataclass(frozen=True, kw_only=True)
class CompiledSize:
    """Shape of a layer: B tokens, D channels, F features, k slots, S sources."""

    name: str
    tokens: int
    d_model: int
    n_features: int
    k: int
    sources: int


SIZES = (
    CompiledSize(name="large", tokens=4096, d_model=4096, n_features=32768, k=64, sources=16),
    CompiledSize(name="small", tokens=8192, d_model=768, n_features=16384, k=32, sources=12),
)
DTYPES = (torch.bfloat16, torch.float32)

#: Precisions of Adam's moments.
MOMENTS = (torch.float32, torch.uint8)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Tensors without memory of one size and dtype."""

    size: CompiledSize
    dtype: torch.dtype

    @property
    def x(self) -> Tensor:
        return _empty(self.size.tokens, self.size.d_model, dtype=self.dtype)

    @property
    def w_enc(self) -> Tensor:
        return _empty(self.size.n_features, self.size.d_model, dtype=self.dtype)

    @property
    def b_enc(self) -> Tensor:
        return _empty(self.size.n_features, dtype=self.dtype)

    @property
    def pre(self) -> Tensor:
        return _empty(self.size.tokens, self.size.n_features, dtype=self.dtype)

    @property
    def w_dec(self) -> Tensor:
        return _empty(self.size.sources, self.size.n_features, self.size.d_model, dtype=self.dtype)

    @property
    def b_dec(self) -> Tensor:
        return _empty(self.size.d_model, dtype=self.dtype)

    @property
    def weights(self) -> Tensor:
        return _empty(self.size.tokens, dtype=torch.float32)

    @property
    def scale(self) -> Tensor:
        return torch.empty((), device="meta")

    @property
    def hyper(self) -> Tensor:
        return _empty(9, dtype=torch.float32)

    def codes(self, sources: int) -> tuple[Tensor, Tensor]:
        """Values and indices [S,B,K]."""
        shape = (sources, self.size.tokens, self.size.k)
        return _empty(*shape, dtype=self.dtype), _empty(*shape, dtype=torch.int32)

    def csr(self, sources: int) -> FeatureCSR:
        """A grouping of S layers' codes."""
        features, slots = self.size.n_features, self.size.tokens * self.size.k
        widths = (features + 1, slots, slots, features + 1, slots // SPLIT)
        return FeatureCSR.from_tensors([_empty(sources, width, dtype=torch.int32) for width in widths])

    def adam(self, param: Tensor, beta1: float, moments: torch.dtype = torch.float32) -> RowAdamState:
        return RowAdamState.zeros(param, RowAdam(learning_rate=1e-3, beta1=beta1), moments)


def _decode(layer: Layer) -> None:
    from clt.kernels.gpu.decode import decode, decode_loss

    inputs = DecodeInputs(*layer.codes(layer.size.sources), layer.w_dec, layer.b_dec, layer.x)
    decode(replace(inputs, skip_BD=None))
    decode_loss(inputs, layer.x, layer.weights)


def _decoder_grad(layer: Layer) -> None:
    from clt.kernels.gpu.grad import decoder_grad, decoder_step_

    codes = (layer.x, *layer.codes(layer.size.sources), layer.w_dec, layer.csr(layer.size.sources))
    decoder_grad(DecoderGradInputs(*codes, layer.weights, layer.scale))
    inputs = DecoderGradInputs(*codes, None, layer.scale)
    for moments in MOMENTS:
        decoder_step_(inputs, layer.adam(layer.w_dec, 0.9, moments), layer.hyper)


def _encoder_grad(layer: Layer) -> None:
    from clt.kernels.gpu.grad import encoder_grad, encoder_step_

    values, indices = (codes[0] for codes in layer.codes(1))
    inputs = EncoderGradInputs(values.float(), values, indices, layer.x, layer.size.n_features, layer.csr(1))
    encoder_grad(inputs)
    for moments in MOMENTS:
        state = layer.adam(layer.w_enc, 0.0, moments)
        encoder_step_(inputs, layer.w_enc, state, layer.hyper)


def _row_adam(layer: Layer, moments: torch.dtype = torch.float32) -> None:
    from clt.kernels.gpu.optim import row_adam_

    for beta1 in (0.0, 0.9):
        weights, touched = layer.w_enc, _empty(layer.size.n_features, dtype=torch.bool)
        row_adam_(weights, weights, layer.adam(weights, beta1, moments), layer.hyper, touched)


def _select(layer: Layer) -> None:
    from clt.kernels.gpu.select import select_topk

    select_topk(layer.pre, layer.size.k)


def _encode(layer: Layer) -> None:
    from clt.kernels.gpu.encode import gemm_group_max

    gemm_group_max(layer.x, layer.w_enc, layer.b_enc, 32)


def _threshold(layer: Layer) -> None:
    from clt.kernels.gpu.threshold import batch_threshold, select_above

    threshold, quota = batch_threshold(layer.pre, layer.size.k * layer.size.tokens)
    select_above(layer.pre, threshold, quota, 4 * layer.size.k)


CASES: dict[str, Callable[[Layer], None]] = {
    "decode": _decode,
    "decoder_grad": _decoder_grad,
    "encoder_grad": _encoder_grad,
    "row_adam": _row_adam,
    "row_adam_codes": functools.partial(_row_adam, moments=torch.uint8),
    "select": _select,
    "encode": _encode,
    "threshold": _threshold,
}
