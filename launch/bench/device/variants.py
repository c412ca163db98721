"""Section variants: times of the alternatives that `clt.kernels.gpu.configs` chooses from."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from clt.kernels import ops
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs
from clt.kernels.gpu import configs
from clt.kernels.gpu.configs import GatherConfig
from clt.launch.bench.device.check_report import CheckReport, DeviceCheck

_DTYPE = torch.bfloat16

#: Name, tokens, channels, features, slots, sources.
_SHAPES = (("B", 8192, 768, 16384, 32, 12), ("A", 4096, 4096, 32768, 64, 16))
_DRY_SHAPES = (("toy", 64, 64, 256, 8, 2),)

#: block_d, unroll, num_warps.
_GATHERS = ((64, 8, 1), (128, 8, 1), (256, 8, 1), (256, 16, 1), (512, 8, 1), (512, 8, 2), (1024, 8, 4))

#: beta1 and dtype of the moments.
_STATES = ((0.0, torch.uint8), (0.0, torch.bfloat16), (0.0, torch.float32), (0.9, torch.float32))


def time_variants(check: DeviceCheck, report: CheckReport) -> None:
    """Reports milliseconds of encoders, groupings, launch settings and optimizer states."""
    for name, tokens, d_model, n_features, k, sources in _DRY_SHAPES if check.dry else _SHAPES:
        runs = {
            **_encoder_runs(check, tokens, d_model, n_features, k),
            **_decoder_runs(check, tokens, d_model, n_features, k, sources),
        }
        gathered = 2 * sources * tokens * k * d_model
        for label, run in runs.items():
            with report.case(f"{name} {label}"):
                ms = check.milliseconds(run, rounds=5)
                rate = {"TB_per_s": gathered / max(ms, 1e-9) / 1e9} if "block_d" in label else {}
                report.add(f"{name} {label}", ms=ms, **rate)
        del runs, run
        check.release()


def _encoder_runs(
    check: DeviceCheck, tokens: int, d_model: int, n_features: int, k: int
) -> dict[str, Callable[[], object]]:
    from clt.kernels.gpu import encode, select

    x, W, b = (
        check.normal(*shape, dtype=_DTYPE) for shape in ((tokens, d_model), (n_features, d_model), (n_features,))
    )
    pre, config = torch.addmm(b, x, W.T), configs.select_config(_DTYPE, n_features, k)
    return {
        "addmm": lambda: torch.addmm(b, x, W.T),
        "addmm float32": lambda: torch.addmm(b.float(), x.float(), W.float().T),
        "gemm_group_max": lambda: encode.gemm_group_max(x, W, b, config.group),
        "group_max": lambda: select.group_max(pre, config),
        "select_topk": lambda: select.select_topk(pre, k),
        "torch.topk": lambda: pre.topk(k, dim=1),
    }


def _decoder_runs(
    check: DeviceCheck, tokens: int, d_model: int, n_features: int, k: int, sources: int
) -> dict[str, Callable[[], object]]:
    from clt.kernels.gpu import decode, grad

    values, indices = check.codes(sources, tokens, k, n_features, _DTYPE)
    W = torch.empty(sources, n_features, d_model, device=check.device, dtype=_DTYPE).normal_()
    b, y = check.normal(d_model, dtype=_DTYPE), check.normal(tokens, d_model, dtype=_DTYPE)
    csr = ops.feature_csr(values, indices, n_features)
    decoded = DecodeInputs(values, indices, W, b, None)
    inputs = DecoderGradInputs(y, values, indices, W, csr)
    runs: dict[str, Callable[[], object]] = {
        "feature_csr, all sources at once": lambda: ops.feature_csr(values, indices, n_features),
        "feature_csr, source by source": lambda: [
            ops.feature_csr(values[s : s + 1], indices[s : s + 1], n_features) for s in range(sources)
        ],
    }
    for block_d, unroll, num_warps in _GATHERS:
        if block_d <= d_model:
            config = GatherConfig(block_d=block_d, unroll=unroll, num_warps=num_warps)
            label = f"block_d={block_d} unroll={unroll} num_warps={num_warps}"
            runs[f"decode {label}"] = functools.partial(decode.decode, decoded, config)
            runs[f"decoder_grad {label}"] = functools.partial(grad.decoder_grad, inputs, True, config)

    def step(beta1: float, moments: torch.dtype) -> None:
        adam = ops.RowAdam(learning_rate=1e-4, beta1=beta1)
        key = (beta1, moments)
        if key not in states:
            states.clear()  # one state at a time fits beside the weights
            states[key] = ops.RowAdamState.zeros(W, adam, moments)
        ops.decoder_step_(y, values, indices, W, csr, states[key], adam.hyper(3, check.device, _DTYPE))

    states: dict[tuple[float, torch.dtype], ops.RowAdamState] = {}
    for beta1, moments in _STATES:
        name = f"decoder_step_ beta1={beta1} moments={str(moments).removeprefix('torch.')}"
        runs[name] = functools.partial(step, beta1, moments)
    return runs
