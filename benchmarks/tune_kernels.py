"""Tuner: measures launch settings on this GPU and writes them into a table. Run manually, never during training:

    python -m benchmarks.tune_kernels --out kernels/gpu/configs.json --size 4096x32768x64 --tokens 4096 --tokens 32768

For every operation a small space is tried. A candidate must give the result of the rule in `clt.kernels.gpu.configs`
before it is timed, and be 2 % faster to replace it. `kernels/gpu/configs.json` is the table that is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs
from clt.kernels.gpu import configs, decode, encode, grad, optim, select
from clt.kernels.gpu.config_table import (
    OPS,
    CodePath,
    GatherConfig,
    GemmConfig,
    Producer,
    SelectConfig,
    Settings,
    key_of,
    write_table,
)
from clt.kernels.pytorch import dense
from clt.launch.bench.common.timing import time_runs
from clt.launch.bench.kernels.data import KernelInputs, KernelSize

#: Least relative gain over the rule; less is noise.
MARGIN = 0.02

#: Shared memory of a streaming multiprocessor that one program may use, bytes.
SHARED_MEMORY = 227 * 1024

#: Largest difference of results, relative to the largest element. Settings only change the order of float32 sums, whose
#: error grows with the root of their length (64 for 4096 addends); bfloat16 results round that once or, between
#: implementations, twice.
TOLERANCE = {torch.bfloat16: 4 * 2.0**-8, torch.float32: 64 * 2.0**-23}

#: Source layers of a target. More only repeat the same work.
SOURCES = 4

#: Microseconds that a call takes.
Measure = Callable[[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedCall:
    """One operation on one set of inputs.

    Attributes:
        run: runs it with settings of its type and returns the results, which must not depend on them.
        reset: restores everything that `run` changes in place.
        precision: dtype in which an implementation may round what it returns in a wider one; None where none does.
    """

    run: Callable[[Any], Sequence[Tensor]]
    reset: Callable[[], object] = lambda: None
    precision: torch.dtype | None = None


class TunedCalls:
    """The operations on random tensors of one target, with uneven feature frequencies."""

    def __init__(self, size: KernelSize, device: torch.device, dtype: torch.dtype) -> None:
        self._inputs = inputs = KernelInputs.make(size, "zipf", device, dtype)
        codes = inputs.values_SBK, inputs.indices_SBK
        values_BK, indices_BK = (tensor_SBK[0] for tensor_SBK in codes)
        self._decoder_inputs = DecoderGradInputs(inputs.grad_BD, *codes, inputs.W_dec_SFD, inputs.csr)
        self._encoder_inputs = EncoderGradInputs(
            values_BK.float(), values_BK, indices_BK, inputs.x_BD, size.n_features, inputs.csr[:1]
        )
        self._decoded = DecodeInputs(*codes, inputs.W_dec_SFD, inputs.b_dec_D, None), inputs.y_BD, None
        self._encoded = inputs.x_BD, inputs.W_enc_FD, inputs.b_enc_F
        self._by_rule = configs.select_config(dtype, size.n_features, size.k)

    def call_of(self, op: str) -> TunedCall:
        """The call of a key of `OPS`."""
        if op == "row_adam":
            return self._row_adam()
        precision = self._inputs.dtype if op.endswith(("_path", "producer")) else None
        return TunedCall(run=getattr(self, f"_{op}"), precision=precision)

    def _pre(self) -> Tensor:
        return torch.addmm(self._inputs.b_enc_F, self._inputs.x_BD, self._inputs.W_enc_FD.T)

    def _decode(self, settings: GatherConfig) -> Sequence[Tensor]:
        return decode.decode_loss(*self._decoded, settings)

    def _decoder_grad(self, settings: GatherConfig) -> Sequence[Tensor]:
        values, grad_W = grad.decoder_grad(self._decoder_inputs, config=settings)
        assert grad_W is not None
        return values, grad_W

    def _encoder_grad(self, settings: GatherConfig) -> Sequence[Tensor]:
        return grad.encoder_grad(self._encoder_inputs, settings)

    @functools.cached_property
    def _stored(self) -> Tensor:
        return self._pre()

    def _select(self, settings: SelectConfig) -> Sequence[Tensor]:
        return select.select_topk(self._stored, self._inputs.size.k, None, settings)

    def _gemm(self, settings: GemmConfig) -> Sequence[Tensor]:
        """The pre-activations, and how far the maxima are from theirs: their own last bit depends on the tile."""
        pre, keys = encode.gemm_group_max(*self._encoded, self._by_rule.group, settings)
        return pre, keys - select.group_max(pre, self._by_rule)

    def _producer(self, settings: Producer) -> Sequence[Tensor]:
        """Sums of the values: where two features tie but for the order of a sum, either may be chosen."""
        if settings == "fused":
            pre, keys = encode.gemm_group_max(*self._encoded, self._by_rule.group)
        else:
            pre = self._pre()
            keys = select.group_max(pre, self._by_rule)
        values, _ = select.select_topk(pre, self._inputs.size.k, keys, self._by_rule)
        return (values.sum(dim=1, dtype=torch.float32),)

    def _decode_path(self, settings: CodePath) -> Sequence[Tensor]:
        return (dense.decode_loss if settings == "dense" else decode.decode_loss)(*self._decoded)

    def _decoder_grad_path(self, settings: CodePath) -> Sequence[Tensor]:
        values, grad_W = (dense.decoder_grad if settings == "dense" else grad.decoder_grad)(self._decoder_inputs)
        assert grad_W is not None
        return values, grad_W

    def _encoder_grad_path(self, settings: CodePath) -> Sequence[Tensor]:
        return (dense.encoder_grad if settings == "dense" else grad.encoder_grad)(self._encoder_inputs)

    def _row_adam(self) -> TunedCall:
        before, gradient = self._inputs.W_dec_SFD[:2]
        param, adam = before.clone(), RowAdam(learning_rate=1e-3)
        state, hyper = RowAdamState.zeros(param, adam), adam.hyper(1, param.device, torch.float32)
        touched = self._inputs.csr.touched()[0]

        def run(settings: GatherConfig) -> Sequence[Tensor]:
            optim.row_adam_(param, gradient, state, hyper, touched, settings)
            return (param,)

        def reset() -> None:
            param.copy_(before)
            state.v_RD.zero_()
            state.last_step_R.zero_()

        return TunedCall(run=run, reset=reset)


def candidates(op: str, dtype: torch.dtype, size: KernelSize) -> list[Settings]:
    """The settings to try for an operation, in a fixed order; the first is the rule's."""
    spaces: dict[str, Iterable[Settings]] = {
        "gather": _gathers(dtype, size),
        "select": (SelectConfig(group=group, num_warps=warps) for group in (16, 32, 64) for warps in (1, 2, 4)),
        "gemm": _gemms(dtype),
        "producer": get_args(Producer),
        "path": get_args(CodePath),
    }
    rule = configs.settings_of(op, dtype, size.d_model, size.n_features, size.k, size.n_tokens)
    return list(dict.fromkeys([rule, *spaces[OPS[op].section]]))


def _gathers(dtype: torch.dtype, size: KernelSize) -> Iterator[GatherConfig]:
    """One or two loads of 16 bytes per row and lane."""
    for block_d, unroll, loads in itertools.product((128, 256, 512, 1024), (4, 8, 16), (1, 2)):
        if block_d < 2 * size.d_model:
            warps = max(1, block_d * dtype.itemsize // (512 * loads))
            yield GatherConfig(block_d=block_d, unroll=unroll, num_warps=warps)


def _gemms(dtype: torch.dtype) -> Iterator[GemmConfig]:
    """Tiles whose pipeline fits in shared memory; without tensor cores, of a quarter of the size."""
    shrink = 1 if dtype == torch.bfloat16 else 2
    for m, n, warps, stages in itertools.product((64, 128), (128, 256), (4, 8), (2, 3, 4)):
        block_m, block_n, block_k = m // shrink, n // shrink, 64 // shrink
        if (block_m + block_n) * block_k * dtype.itemsize * stages <= SHARED_MEMORY:
            yield GemmConfig(
                block_m=block_m, block_n=block_n, block_k=block_k, group_m=8, num_warps=warps, num_stages=stages
            )


def agree(result: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    """True if integers are equal and numbers agree within `TOLERANCE`; false if any is NaN.

    Args:
        result: tensors to check.
        expected: tensors of the reference, in the same order.
        dtype: the tolerance's dtype; None for that of each tensor.
    """
    for got, wanted in zip(result, expected, strict=True):
        if wanted.is_floating_point():
            limit = TOLERANCE[dtype or wanted.dtype] * wanted.abs().max()
            # Written so that NaN anywhere fails.
            if not (got.double() - wanted.double()).abs().max() <= limit:
                return False
        elif not torch.equal(got, wanted):
            return False
    return True


def fastest(
    trials: Sequence[Settings], call: TunedCall, measure: Measure, report: Callable[[str], None]
) -> tuple[Settings, float]:
    """Times settings one after the other.

    Args:
        trials: settings; the first is the one to beat.
        call: the operation on its inputs.
        measure: gives microseconds of a call.
        report: takes one line per candidate.

    Returns:
        The fastest settings, or the first where none is faster by `MARGIN`, and their microseconds.

    Raises:
        ValueError: a candidate gives another result than the first.
    """
    expected: list[Tensor] = []
    times: list[float] = []
    for trial in trials:
        call.reset()
        try:
            result = call.run(trial)
        except OutOfResources as error:
            if not expected:
                raise
            times.append(math.inf)
            report(f"{trial}: does not fit: {str(error).splitlines()[0]}")
            continue
        if not expected:
            expected = [tensor.clone() for tensor in result]
        elif not agree(result, expected, call.precision):
            raise ValueError(f"{trial} gives another result than {trials[0]}")
        times.append(measure(functools.partial(call.run, trial)))
        report(f"{trial}: {times[-1]:.1f} us")
    best = min(range(len(times)), key=times.__getitem__)
    chosen = best if times[best] < (1 - MARGIN) * times[0] else 0
    return trials[chosen], times[chosen]


def tune(
    ops: Sequence[str],
    dtype: torch.dtype,
    size: KernelSize,
    call_of: Callable[[str], TunedCall],
    measure: Measure,
    report: Callable[[str], None] = print,
) -> dict[str, Settings]:
    """Fastest settings of operations on this device.

    Args:
        ops: keys of `OPS`.
        dtype: of weights and activations.
        size: of the layer and the batch.
        call_of: gives the call of an operation.
        measure: gives microseconds of a call.
        report: takes one line per candidate and result.

    Returns:
        The settings by their key in the table.
    """
    architecture, triton = configs.architecture(), configs.triton_version()
    assert architecture is not None and triton is not None, "tuning needs a device and Triton"
    name, found = str(dtype).removeprefix("torch."), {}
    sizes = {"d_model": size.d_model, "n_features": size.n_features, "k": size.k, "tokens": size.n_tokens}
    for op in ops:
        report(f"{op} {name} {size}")
        settings, microseconds = fastest(candidates(op, dtype, size), call_of(op), measure, report)
        report(f"{op}: {settings}, {microseconds:.1f} us")
        found[key_of(op, architecture, name, triton, sizes)] = settings
    return found


def cuda_microseconds(call: Callable[[], object]) -> float:
    """Median of 20 timed calls, each with a cold L2 cache."""
    for _ in range(3):
        call()
    return 1e6 * time_runs(call, torch.device("cuda"), 20).median_s


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be DxFxK, for example 4096x32768x64")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tuner from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_kernels", description="measure launch settings")
    parser.add_argument("--out", type=Path, required=True, help="table to write or to add to")
    parser.add_argument("--size", type=_shape, action="append", required=True, help="DxFxK; may be repeated")
    parser.add_argument("--tokens", type=int, action="append", help="tokens in a batch; may be repeated (4096)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--op", choices=list(OPS), action="append", help="only these; may be repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune_kernels: needs a CUDA device, and there is none")
    measured = f"{datetime.datetime.now(datetime.UTC).date().isoformat()} {torch.cuda.get_device_name()}"
    dtype = getattr(torch, options.dtype)
    for (d_model, n_features, k), tokens in itertools.product(options.size, options.tokens or [4096]):
        size = KernelSize(name="tuned", d_model=d_model, n_features=n_features, n_tokens=tokens, k=k, n_sources=SOURCES)
        calls = TunedCalls(size, torch.device("cuda"), dtype)
        # Written after every size: what was measured is kept if a later one fails.
        found = tune(options.op or list(OPS), dtype, size, calls.call_of, cuda_microseconds)
        write_table(options.out, found, measured)


if __name__ == "__main__":
    main()
