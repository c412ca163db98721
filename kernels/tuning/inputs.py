"""Inputs on which `clt.kernels.tuning.tune` measures settings: random layers with uneven feature frequencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.common.interface import DecoderGradInputs, EncoderGradInputs
from clt.kernels.gpu import configs, decode, encode, grad, optim, select
from clt.kernels.gpu.config_table import CodePath, GatherConfig, GemmConfig, Producer, SelectConfig
from clt.kernels.pytorch import dense

#: Source layers of a target. More only repeat the same work.
SOURCES = 4


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Shape of a layer: D channels, F features, k slots, B tokens."""

    d_model: int
    n_features: int
    k: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TunedCall:
    """One operation on one set of inputs.

    Attributes:
        run: runs it with settings of its type and returns the results, which must not depend on them.
        reset: restores everything that `run` changes in place.
        precision: dtype in which an implementation may round what it returns in a wider one; None where none does.
    """

    run: Callable[[Any], Sequence[Tensor]]
    reset: Callable[[], None] = lambda: None
    precision: torch.dtype | None = None


class TuningInputs:
    """Tensors of one layer on a device, created when first needed, from a fixed seed."""

    def __init__(self, dtype: torch.dtype, shape: LayerShape, device: str) -> None:
        self.dtype, self.shape, self.device = dtype, shape, device
        self.generator = torch.Generator(device).manual_seed(0)

    def call_of(self, op: str) -> TunedCall:
        """The call of a key of `OPS`."""
        if op == "row_adam":
            return self._row_adam()
        run = getattr(self, f"_{op}")
        return TunedCall(run=run, precision=self.dtype if op.endswith(("_path", "producer")) else None)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    @cached_property
    def x(self) -> Tensor:
        return self._normal(self.shape.tokens, self.shape.d_model)

    @cached_property
    def weights(self) -> Tensor:
        """[S,F,D] decoders; the first source's also serve as encoder and as the parameter of Adam."""
        return self._normal(SOURCES, self.shape.n_features, self.shape.d_model)

    @cached_property
    def bias(self) -> Tensor:
        return self._normal(self.shape.n_features)

    @cached_property
    def pre(self) -> Tensor:
        return torch.addmm(self.bias, self.x, self.weights[0].T)

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor]:
        """Values and indices [S,B,K]: k different features per token, drawn by lognormal frequencies (sigma 1).

        The k largest u^(1/w) of uniform u are a draw without replacement by weight w (Efraimidis and Spirakis 2006).
        """
        frequencies = torch.randn(self.shape.n_features, generator=self.generator, device=self.device).exp()
        indices = []
        for _ in range(SOURCES):
            shape = (self.shape.tokens, self.shape.n_features)
            uniform = torch.rand(shape, generator=self.generator, device=self.device)
            chosen = uniform.log().div_(frequencies).topk(self.shape.k, dim=1).indices
            indices.append(chosen.sort(dim=1).values.int())
        values = self._normal(SOURCES, self.shape.tokens, self.shape.k).abs() + 0.1
        return values, torch.stack(indices)

    @cached_property
    def csr(self) -> FeatureCSR:
        return FeatureCSR.build(*self.codes, self.shape.n_features)

    @property
    def decoder_inputs(self) -> DecoderGradInputs:
        return DecoderGradInputs(self.x, *self.codes, self.weights, self.csr)

    @property
    def encoder_inputs(self) -> EncoderGradInputs:
        values, indices = (codes[0] for codes in self.codes)
        return EncoderGradInputs(values.float(), values, indices, self.x, self.shape.n_features, self.csr[:1])

    def _decode(self, settings: GatherConfig) -> Sequence[Tensor]:
        return decode.decode_loss(*self.codes, self.weights, self.x[0], self.x, None, None, settings)

    def _decoder_grad(self, settings: GatherConfig) -> Sequence[Tensor]:
        values, grad_W = grad.decoder_grad(self.decoder_inputs, config=settings)
        assert grad_W is not None
        return values, grad_W

    def _encoder_grad(self, settings: GatherConfig) -> Sequence[Tensor]:
        return grad.encoder_grad(self.encoder_inputs, settings)

    def _select(self, settings: SelectConfig) -> Sequence[Tensor]:
        return select.select_topk(self.pre, self.shape.k, None, settings)

    def _gemm(self, settings: GemmConfig) -> Sequence[Tensor]:
        """The pre-activations, and how far the maxima are from theirs: their own last bit depends on the tile."""
        by_rule = configs.select_config(self.dtype, self.shape.n_features, self.shape.k)
        pre, keys = encode.gemm_group_max(self.x, self.weights[0], self.bias, by_rule.group, settings)
        return pre, keys - select.group_max(pre, by_rule)

    def _producer(self, settings: Producer) -> Sequence[Tensor]:
        """Sums of the values: where two features tie but for the order of a sum, either may be chosen."""
        by_rule = configs.select_config(self.dtype, self.shape.n_features, self.shape.k)
        if settings == "fused":
            pre, keys = encode.gemm_group_max(self.x, self.weights[0], self.bias, by_rule.group)
        else:
            pre = torch.addmm(self.bias, self.x, self.weights[0].T)
            keys = select.group_max(pre, by_rule)
        values, _ = select.select_topk(pre, self.shape.k, keys, by_rule)
        return (values.sum(dim=1, dtype=torch.float32),)

    def _decode_path(self, settings: CodePath) -> Sequence[Tensor]:
        run = dense.decode_loss if settings == "dense" else decode.decode_loss
        return run(*self.codes, self.weights, self.x[0], self.x, None, None)

    def _decoder_grad_path(self, settings: CodePath) -> Sequence[Tensor]:
        run = dense.decoder_grad if settings == "dense" else grad.decoder_grad
        values, grad_W = run(self.decoder_inputs)
        assert grad_W is not None
        return values, grad_W

    def _encoder_grad_path(self, settings: CodePath) -> Sequence[Tensor]:
        run = dense.encoder_grad if settings == "dense" else grad.encoder_grad
        return run(self.encoder_inputs)

    def _row_adam(self) -> TunedCall:
        param, gradient = self.weights[0].clone(), self.weights[1]
        adam = RowAdam(learning_rate=1e-3)
        state, hyper = RowAdamState.zeros(param, adam), adam.hyper(1, self.device, torch.float32)
        touched = self.csr.touched()[0]

        def run(settings: GatherConfig) -> Sequence[Tensor]:
            optim.row_adam_(param, gradient, state, hyper, touched, settings)
            return (param,)

        def reset() -> None:
            param.copy_(self.weights[0])
            state.v_RD.zero_()
            state.last_step_R.zero_()

        return TunedCall(run=run, reset=reset)
