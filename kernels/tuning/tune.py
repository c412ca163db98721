"""Tuner: measures launch settings on this GPU and writes them into a table. Run manually, never during training:

    python -m clt.kernels.tuning.tune --out kernels/gpu/configs.json --size 4096x32768x64 --tokens 4096 --tokens 32768

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
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from clt.kernels.gpu import configs
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
from clt.kernels.tuning.inputs import LayerShape, TunedCall, TuningInputs

#: Least relative gain over the rule; less is noise.
MARGIN = 0.02

#: Shared memory of a streaming multiprocessor that one program may use, bytes.
SHARED_MEMORY = 227 * 1024

#: Largest difference of results, relative to the largest element. Settings only change the order of float32 sums, whose
#: error grows with the root of their length (64 for 4096 addends); bfloat16 results round that once or, between
#: implementations, twice.
TOLERANCE = {torch.bfloat16: 4 * 2.0**-8, torch.float32: 64 * 2.0**-23}


#: Microseconds that a call takes.
Measure = Callable[[Callable[[], object]], float]


def rule(op: str, dtype: torch.dtype, shape: LayerShape) -> Settings:
    """Settings that `clt.kernels.gpu.configs` gives for an operation, from its table or by rule.

    Args:
        op: a key of `OPS`.
        dtype: dtype of the weights.
        shape: sizes of the layer and the batch.
    """
    d_model, n_features, k, tokens = dataclasses.astuple(shape)
    match OPS[op].section:
        case "gather":
            return configs.gather_config(op, dtype, d_model, n_features, k, tokens)
        case "select":
            return configs.select_config(dtype, n_features, k)
        case "gemm":
            return configs.gemm_config(dtype, d_model, n_features, tokens)
        case "producer":
            return configs.producer(dtype, d_model, n_features, k, tokens)
        case _:
            return configs.path(op.removesuffix("_path"), n_features, k, dtype, d_model, tokens)


def candidates(op: str, dtype: torch.dtype, shape: LayerShape) -> list[Settings]:
    """The settings to try for an operation, in a fixed order.

    Args:
        op: a key of `OPS`.
        dtype: dtype of the weights.
        shape: sizes of the layer and the batch.

    Returns:
        Distinct settings; the first is that of `rule`.
    """
    spaces: dict[str, Iterable[Settings]] = {
        "gather": _gathers(dtype, shape),
        "select": (SelectConfig(group=group, num_warps=warps) for group in (16, 32, 64) for warps in (1, 2, 4)),
        "gemm": _gemms(dtype),
        "producer": get_args(Producer),
        "path": get_args(CodePath),
    }
    return list(dict.fromkeys([rule(op, dtype, shape), *spaces[OPS[op].section]]))


def _gathers(dtype: torch.dtype, shape: LayerShape) -> Iterator[GatherConfig]:
    """One or two loads of 16 bytes per row and lane."""
    for block_d, unroll, loads in itertools.product((128, 256, 512, 1024), (4, 8, 16), (1, 2)):
        if block_d < 2 * shape.d_model:
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
    shape: LayerShape,
    call_of: Callable[[str], TunedCall],
    measure: Measure,
    report: Callable[[str], None] = print,
) -> dict[str, Settings]:
    """Fastest settings of operations on this device.

    Args:
        ops: keys of `OPS`.
        dtype: of weights and activations.
        shape: of the layer.
        call_of: gives the call of an operation.
        measure: gives microseconds of a call.
        report: takes one line per candidate and result.

    Returns:
        The settings by their key in the table.
    """
    architecture, triton = configs.architecture(), configs.triton_version()
    assert architecture is not None and triton is not None, "tuning needs a device and Triton"
    found = {}
    for op in ops:
        report(f"{op} {dtype} {shape}")
        settings, microseconds = fastest(candidates(op, dtype, shape), call_of(op), measure, report)
        report(f"{op}: {settings}, {microseconds:.1f} us")
        name = str(dtype).removeprefix("torch.")
        found[key_of(op, architecture, name, triton, dataclasses.asdict(shape))] = settings
    return found


def cuda_microseconds(call: Callable[[], object]) -> float:
    """Median of 20 timed calls, each with a cold L2 cache."""
    flush = torch.empty(2**29, dtype=torch.int8, device="cuda")
    times = []
    for number in range(23):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be DxFxK, for example 4096x32768x64")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tuner from the command line."""
    parser = argparse.ArgumentParser(prog="python -m clt.kernels.tuning.tune", description="measure launch settings")
    parser.add_argument("--out", type=Path, required=True, help="table to write or to add to")
    parser.add_argument("--size", type=_shape, action="append", required=True, help="DxFxK; may be repeated")
    parser.add_argument("--tokens", type=int, action="append", help="tokens in a batch; may be repeated (4096)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--op", choices=list(OPS), action="append", help="only these; may be repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("clt.kernels.tuning.tune: needs a CUDA device, and there is none")
    measured = f"{datetime.datetime.now(datetime.UTC).date().isoformat()} {torch.cuda.get_device_name()}"
    dtype = getattr(torch, options.dtype)
    for (d_model, n_features, k), tokens in itertools.product(options.size, options.tokens or [4096]):
        shape = LayerShape(d_model=d_model, n_features=n_features, k=k, tokens=tokens)
        inputs = TuningInputs(dtype, shape, "cuda")
        # Written after every shape: measurements are kept if a later one fails.
        found = tune(options.op or list(OPS), dtype, shape, inputs.call_of, cuda_microseconds)
        write_table(options.out, found, measured)


if __name__ == "__main__":
    main()
