"""Measures launch settings on this GPU and writes them into a table. Run by hand, never while a model trains:

    python -m clt.kernels.tuning.tune --out kernels/gpu/configs.json --size 4096x32768x64 --tokens 4096 --tokens 32768

A small space is tried for every operation, after the rule of `clt.kernels.gpu.configs`: each candidate must give the
rule's result before it is timed, and be 2 % faster to replace it. `kernels/gpu/configs.json` is the table that is read.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from clt.kernels.gpu import configs
from clt.kernels.gpu.config_table import (
    OPS,
    Basis,
    Choice,
    Entry,
    GatherConfig,
    GemmConfig,
    SelectConfig,
    Settings,
    key_of,
    merge,
    read_table,
    render,
)
from clt.kernels.tuning.problems import Problem, Problems, Size

#: How much faster than the rule a candidate must be: less is noise.
MARGIN = 0.02

#: Shared memory of a streaming multiprocessor that one program may use, bytes.
SHARED_MEMORY = 227 * 1024

#: How far results may lie apart, relative to the largest element. Settings only change the order of float32 sums, whose
#: error grows with the root of their length (64 for 4096 addends); bfloat16 results round that once or, between
#: implementations, twice.
TOLERANCE = {torch.bfloat16: 4 * 2.0**-8, torch.float32: 64 * 2.0**-23}


#: Microseconds that a call takes.
Measure = Callable[[Callable[[], object]], float]


def rule(op: str, dtype: torch.dtype, size: Size) -> Settings:
    """What `clt.kernels.gpu.configs` gives for an operation, from its table or by rule."""
    shape = (size.d_model, size.n_features, size.k, size.tokens)
    if OPS[op].settings is GatherConfig:
        return configs.gather_config(op, dtype, *shape)
    if OPS[op].settings is SelectConfig:
        return configs.select_config(dtype, size.n_features, size.k)
    if OPS[op].settings is GemmConfig:
        return configs.gemm_config(dtype, size.d_model, size.n_features, size.tokens)
    if op == "producer":
        return Choice(choice=configs.producer(dtype, *shape))
    path = configs.path(op.removesuffix("_path"), size.n_features, size.k, dtype, size.d_model, size.tokens)
    return Choice(choice=path)


def candidates(op: str, dtype: torch.dtype, size: Size) -> list[Settings]:
    """The settings to try for an operation, in a fixed order; the first is the rule's."""
    space: Iterator[Settings]
    if OPS[op].settings is GatherConfig:
        space = _gathers(dtype, size)
    elif OPS[op].settings is SelectConfig:
        space = (SelectConfig(group=group, num_warps=warps) for group in (16, 32, 64) for warps in (1, 2, 4))
    elif OPS[op].settings is GemmConfig:
        space = _gemms(dtype)
    else:
        space = (Choice(choice=choice) for choice in OPS[op].choices)
    return list(dict.fromkeys([rule(op, dtype, size), *space]))


def _gathers(dtype: torch.dtype, size: Size) -> Iterator[GatherConfig]:
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
    """Whether integers are equal and numbers within the `TOLERANCE` of a dtype, None for that of each tensor."""
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
    trials: Sequence[Settings], problem: Problem, measure: Measure, report: Callable[[str], None]
) -> tuple[Settings, float]:
    """Times settings one after the other.

    Args:
        trials: settings; the first is the one to beat.
        problem: the operation.
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
        problem.reset()
        try:
            result = problem.run(trial)
        except OutOfResources as error:
            if not expected:
                raise
            times.append(math.inf)
            report(f"{trial}: does not fit: {str(error).splitlines()[0]}")
            continue
        if not expected:
            expected = [tensor.clone() for tensor in result]
        elif not agree(result, expected, problem.precision):
            raise ValueError(f"{trial} gives another result than {trials[0]}")
        times.append(measure(functools.partial(problem.run, trial)))
        report(f"{trial}: {times[-1]:.1f} us")
    best = min(range(len(times)), key=times.__getitem__)
    chosen = best if times[best] < (1 - MARGIN) * times[0] else 0
    return trials[chosen], times[chosen]


def tune(
    ops: Sequence[str],
    dtype: torch.dtype,
    size: Size,
    problem_of: Callable[[str], Problem],
    measure: Measure,
    basis: Basis,
    report: Callable[[str], None] = print,
) -> list[Entry]:
    """Entries for this device of the fastest settings of operations.

    Args:
        ops: keys of `OPS`.
        dtype: of weights and activations.
        size: the shape.
        problem_of: gives the problem of an operation.
        measure: gives microseconds of a call.
        basis: what the entries will say they rest on.
        report: takes one line per candidate and result.

    Returns:
        One entry per operation, in their order.
    """
    architecture, triton = configs.architecture(), configs.triton_version()
    assert architecture is not None and triton is not None, "tuning needs a device and Triton"
    entries = []
    for op in ops:
        report(f"{op} {dtype} {size}")
        settings, microseconds = fastest(candidates(op, dtype, size), problem_of(op), measure, report)
        report(f"{op}: {settings}, {microseconds:.1f} us")
        sizes = {name: getattr(size, name) for name in OPS[op].sizes}
        entries.append(Entry(key=key_of(op, architecture, dtype, triton, **sizes), settings=settings, basis=basis))
    return entries


def write(file: Path, entries: Sequence[Entry]) -> None:
    """Merges entries into a table, which is created where there is none."""
    old = read_table(file) if file.exists() else []
    file.write_text(render(merge(old, entries)), encoding="utf-8")


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
    """The command of this module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m clt.kernels.tuning.tune", description="measure launch settings")
    parser.add_argument("--out", type=Path, required=True, help="table to write or to add to")
    parser.add_argument("--size", type=_shape, action="append", required=True, help="DxFxK; may be repeated")
    parser.add_argument("--tokens", type=int, action="append", help="tokens in a batch; may be repeated (4096)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--op", choices=list(OPS), action="append", help="only these; may be repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("clt.kernels.tuning.tune: needs a CUDA device, and there is none")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    basis = Basis(kind="timed", date=today, machine=torch.cuda.get_device_name())
    dtype = getattr(torch, options.dtype)
    for (d_model, n_features, k), tokens in itertools.product(options.size, options.tokens or [4096]):
        size = Size(d_model=d_model, n_features=n_features, k=k, tokens=tokens)
        problems = Problems(dtype, size, "cuda")
        # Written after every size: what was measured is kept if a later one fails.
        write(options.out, tune(options.op or list(OPS), dtype, size, problems.of, cuda_microseconds, basis))


if __name__ == "__main__":
    main()
