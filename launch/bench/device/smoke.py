"""Section smoke: every operation in two dtypes, on the sparse and the dense path, against float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

from clt.kernels import ops
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs
from clt.kernels.pytorch import reference
from clt.launch.bench.device.check_report import CheckReport, DeviceCheck, Value

Inputs = TypeVar("Inputs", DecoderGradInputs, EncoderGradInputs)

#: Sources, tokens, slots, features, channels: both paths, ragged sizes, rows of 4096 channels.
_SHAPES = ((3, 512, 16, 4096, 768), (2, 333, 5, 1001, 100), (2, 256, 64, 2048, 512), (4, 2048, 32, 8192, 4096))
_DRY_SHAPES = ((2, 3, 2, 130, 8),)


def check_operations(check: DeviceCheck, report: CheckReport) -> None:
    """Reports relative errors of all operations, case by case."""
    for shape in _DRY_SHAPES if check.dry else _SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            sources, tokens, k, n_features, d_model = shape
            name = f"S{sources} B{tokens} k{k} F{n_features} D{d_model} {str(dtype).removeprefix('torch.')}"
            with report.case(name):
                torch.manual_seed(0)
                layer = _LayerErrors(check, shape, dtype)
                report.add(name, **layer.decoder_errors(), **layer.encoder_errors(), **layer.step_errors())
    name = "the same feature twice (tied decoders)"
    with report.case(name):
        values, indices = check.codes(1, 64, 8, 128, torch.float32)
        values, indices, W = torch.cat([values] * 2, dim=2), torch.cat([indices] * 2, dim=2), check.normal(1, 128, 64)
        ours, bias = ops.decode(values, indices, W, W.new_zeros(64)), W.new_zeros(64)
        exact = reference.decode(DecodeInputs(values.double(), indices, W.double(), bias.double(), None))
        report.add(name, decode=_error(ours, exact))


class _LayerErrors:
    """Random inputs of one shape, and the errors of the operations on them."""

    def __init__(self, check: DeviceCheck, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
        sources, tokens, self.k, self.n_features, d_model = shape
        self.check, self.dtype = check, dtype
        self.values, self.indices = check.codes(sources, tokens, self.k, self.n_features, dtype, filled=0.9)
        normal = functools.partial(check.normal, dtype=dtype)
        self.W, self.b, self.y = normal(sources, self.n_features, d_model), normal(d_model), normal(tokens, d_model)
        self.W_enc, self.b_enc = normal(self.n_features, d_model), normal(self.n_features)
        self.csr = ops.feature_csr(self.values, self.indices, self.n_features)
        self.scale, self.weights = torch.tensor(0.37, device=check.device), torch.rand(tokens, device=check.device)
        self.factors = (self.weights, self.scale)

    def decoder_errors(self) -> dict[str, Value]:
        """Of `decode`, `decode_loss` and `decoder_grad`, and whether two runs of the last agree in every bit."""
        codes = (self.values, self.indices, self.W)
        wide = DecodeInputs(self.values.double(), self.indices, self.W.double(), self.b.double(), None)
        exact = reference.decode(wide)
        loss, residual = ops.decode_loss(*codes, self.b, self.y)
        grads, again = (ops.decoder_grad(self.y, *codes, self.csr, *self.factors) for _ in range(2))
        exact_grads = reference.decoder_grad(_wide(DecoderGradInputs(self.y, *codes, self.csr, *self.factors)))
        assert exact_grads[1] is not None
        return {
            "decode": _error(ops.decode(*codes, self.b), exact),
            "loss": _error(loss, (exact - self.y.double()).square().mean()),
            "residual": _error(residual, exact - self.y.double()),
            "grad_values": _error(grads[0], exact_grads[0]),
            "grad_W_dec": _error(grads[1], exact_grads[1]),
            "same_bits": all(map(torch.equal, grads, again)),
        }

    def encoder_errors(self) -> dict[str, Value]:
        """Of `encode_topk`, `encoder_grad`, `batch_threshold`; `missed` is the share of slots below the k-th value."""
        values, indices = ops.encode_topk(self.y, self.W_enc, self.b_enc, self.k)
        pre = reference.preactivations(self.y.double(), self.W_enc.double(), self.b_enc.double())
        chosen, kth = pre.gather(1, indices.long()), pre.topk(self.k, dim=1).values[:, -1:].clamp(min=0)
        tolerance = 0.02 if self.dtype == torch.bfloat16 else 1e-4
        own = (self.values[0].float(), self.values[0], self.indices[0], self.y, self.n_features, self.csr[:1])
        grads, exact = ops.encoder_grad(*own), reference.encoder_grad(_wide(EncoderGradInputs(*own)))
        rounded, wanted = pre.to(self.dtype), self.k * len(pre)
        pairs = zip(ops.batch_threshold(rounded, wanted), reference.batch_threshold(rounded, wanted), strict=True)
        return {
            "encode": _error(values, torch.where(values == 0, 0, chosen)),
            "missed": float(((chosen < kth * (1 - tolerance)) & (values > 0)).double().mean()),
            "grad_W_enc": _error(grads[0], exact[0]),
            "grad_b_enc": _error(grads[1], exact[1]),
            "same_threshold": all(torch.equal(ours, theirs) for ours, theirs in pairs),
        }

    def step_errors(self) -> dict[str, Value]:
        """Of the weights' change in two steps of row Adam, against the reference backend, by dtype of the moments."""
        errors: dict[str, Value] = {}
        for moments in (torch.float32, torch.bfloat16, torch.uint8):
            ours, theirs = self._change(moments, self.check.backend), self._change(moments, "reference")
            errors[f"step_{str(moments).removeprefix('torch.')}"] = _error(ours, theirs)
        return errors

    def _change(self, moments: torch.dtype, backend: str) -> Tensor:
        ops.use_backend(backend)  # type: ignore[arg-type]
        try:
            adam, W = ops.RowAdam(learning_rate=1e-2), self.W.clone()
            state = ops.RowAdamState.zeros(W, adam, moments)
            for step in (1, 2):
                hyper = adam.hyper(step, self.check.device, self.dtype)
                ops.decoder_step_(self.y, self.values, self.indices, W, self.csr, state, hyper, *self.factors)
        finally:
            ops.use_backend(self.check.backend)
        return W.double() - self.W.double()


def _wide(inputs: Inputs) -> Inputs:
    """The inputs with their floating-point tensors in float64."""
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    wide: dict[str, Any] = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return dataclasses.replace(inputs, **wide)


def _error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN for a result that is not finite."""
    result, exact = result.double(), exact.double()
    if not torch.isfinite(result).all():
        return float("nan")
    return float((result - exact).norm() / (exact.norm() + 1e-30))
