"""Inputs on which `clt.kernels.tuning.tune` tries settings: random layers whose features fire as unevenly as trained
ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.gpu import decode, encode, grad, optim, select
from clt.kernels.gpu.config_table import Choice, GatherConfig, GemmConfig, SelectConfig, Settings
from clt.kernels.pytorch import dense

#: Source layers of a target. More only repeat the same work.
SOURCES = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a layer: D channels, F features, k slots, B tokens."""

    d_model: int
    n_features: int
    k: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operation on one set of inputs.

    Attributes:
        run: does it with given settings and returns what must not depend on them.
        reset: puts everything that `run` changes in place back to where it began.
        precision: dtype in which an implementation may round what it returns in a wider one; None where none does.
    """

    run: Callable[[Settings], Sequence[Tensor]]
    reset: Callable[[], None] = lambda: None
    precision: torch.dtype | None = None


class Problems:
    """One layer's tensors on a device, made when they are first needed, from a fixed seed."""

    def __init__(self, dtype: torch.dtype, size: Size, device: str) -> None:
        self.dtype, self.size, self.device = dtype, size, device
        self.generator = torch.Generator(device).manual_seed(0)

    def of(self, op: str) -> Problem:
        """The problem of a key of `OPS`."""
        runs: dict[str, Callable[[Settings], Sequence[Tensor]]] = {
            "decode": self._decode,
            "decoder_grad": self._decoder_grad,
            "encoder_grad": self._encoder_grad,
            "select": self._select,
            "gemm": self._gemm,
            "producer": self._producer,
            "decode_path": self._decode_path,
            "decoder_grad_path": self._decoder_grad_path,
            "encoder_grad_path": self._encoder_grad_path,
        }
        if op == "row_adam":
            return self._row_adam()
        return Problem(run=runs[op], precision=self.dtype if op.endswith(("_path", "producer")) else None)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    @cached_property
    def x(self) -> Tensor:
        return self._normal(self.size.tokens, self.size.d_model)

    @cached_property
    def weights(self) -> Tensor:
        """[S,F,D] decoders; the first source's also serve as encoder and as the parameter of Adam."""
        return self._normal(SOURCES, self.size.n_features, self.size.d_model)

    @cached_property
    def bias(self) -> Tensor:
        return self._normal(self.size.n_features)

    @cached_property
    def pre(self) -> Tensor:
        return torch.addmm(self.bias, self.x, self.weights[0].T)

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor]:
        """Values and indices [S,B,K]: k different features per token, drawn by lognormal frequencies (sigma 1).

        The k largest u^(1/w) of uniform u are a draw without replacement by weight w (Efraimidis and Spirakis 2006).
        """
        frequencies = torch.randn(self.size.n_features, generator=self.generator, device=self.device).exp()
        indices = []
        for _ in range(SOURCES):
            shape = (self.size.tokens, self.size.n_features)
            uniform = torch.rand(shape, generator=self.generator, device=self.device)
            chosen = uniform.log().div_(frequencies).topk(self.size.k, dim=1).indices
            indices.append(chosen.sort(dim=1).values.int())
        values = self._normal(SOURCES, self.size.tokens, self.size.k).abs() + 0.1
        return values, torch.stack(indices)

    @cached_property
    def csr(self) -> FeatureCSR:
        return FeatureCSR.build(*self.codes, self.size.n_features)

    def _decode(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, GatherConfig)
        return decode.decode_loss(*self.codes, self.weights, self.x[0], self.x, None, None, settings)

    def _decoder_grad(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, GatherConfig)
        values, grad_W = grad.decoder_grad(
            self.x, *self.codes, self.weights, self.csr, weights_B=None, scale=None, config=settings
        )
        assert grad_W is not None
        return values, grad_W

    def _encoder_grad(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, GatherConfig)
        values, indices = self.codes
        return grad.encoder_grad(
            values[0].float(), values[0], indices[0], self.x, self.size.n_features, self.csr[:1], config=settings
        )

    def _select(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, SelectConfig)
        return select.select_topk(self.pre, self.size.k, None, settings)

    def _gemm(self, settings: Settings) -> Sequence[Tensor]:
        """The pre-activations, and how far the maxima are from theirs: their own last bit depends on the tile."""
        assert isinstance(settings, GemmConfig)
        by_rule = select.configs.select_config(self.dtype, self.size.n_features, self.size.k)
        pre, keys = encode.gemm_group_max(self.x, self.weights[0], self.bias, by_rule.group, settings)
        return pre, keys - select.group_max(pre, by_rule)

    def _producer(self, settings: Settings) -> Sequence[Tensor]:
        """Sums of the values: where two features tie but for the order of a sum, either may be chosen."""
        assert isinstance(settings, Choice)
        by_rule = select.configs.select_config(self.dtype, self.size.n_features, self.size.k)
        if settings.choice == "fused":
            pre, keys = encode.gemm_group_max(self.x, self.weights[0], self.bias, by_rule.group)
        else:
            pre = torch.addmm(self.bias, self.x, self.weights[0].T)
            keys = select.group_max(pre, by_rule)
        values, _ = select.select_topk(pre, self.size.k, keys, by_rule)
        return (values.sum(dim=1, dtype=torch.float32),)

    def _decode_path(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, Choice)
        run = dense.decode_loss if settings.choice == "dense" else decode.decode_loss
        return run(*self.codes, self.weights, self.x[0], self.x, None, None)

    def _decoder_grad_path(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, Choice)
        if settings.choice == "dense":
            values, grad_W = dense.decoder_grad(self.x, *self.codes, self.weights, None, None)
        else:
            values, grad_W = grad.decoder_grad(self.x, *self.codes, self.weights, self.csr, None, None)
        assert grad_W is not None
        return values, grad_W

    def _encoder_grad_path(self, settings: Settings) -> Sequence[Tensor]:
        assert isinstance(settings, Choice)
        values, indices = self.codes
        inputs = (values[0].float(), values[0], indices[0], self.x, self.size.n_features)
        return dense.encoder_grad(*inputs) if settings.choice == "dense" else grad.encoder_grad(*inputs, self.csr[:1])

    def _row_adam(self) -> Problem:
        param, gradient = self.weights[0].clone(), self.weights[1]
        adam = RowAdam(learning_rate=1e-3)
        state, hyper = RowAdamState.zeros(param, adam), adam.hyper(1, self.device, torch.float32)
        touched = self.csr.touched()[0]

        def run(settings: Settings) -> Sequence[Tensor]:
            assert isinstance(settings, GatherConfig)
            optim.row_adam_(param, gradient, state, hyper, touched, settings)
            return (param,)

        def reset() -> None:
            param.copy_(self.weights[0])
            state.v_RD.zero_()
            state.last_step_R.zero_()

        return Problem(run=run, reset=reset)
