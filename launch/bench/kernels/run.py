"""The kernels' benchmark: ours against library products, PyTorch's embedding bag and other projects' kernels.

`clt bench kernels` prints it; benchmarks/kernels.md is one run of it. First what the machine can do at most, then every
operation and whole training steps, with features that fire evenly and features that fire by Zipf's law. The same code
measures a GPU (bfloat16, the Triton kernels) and a CPU (float32, the sparse CPU path).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clt.errors import ConfigError
from clt.kernels import ops
from clt.kernels.gpu import configs
from clt.launch.bench.checkout import load_benchmarks
from clt.launch.bench.common.machine import this_machine
from clt.launch.bench.kernels import adam as optimizer
from clt.launch.bench.kernels import backward, forward, step
from clt.launch.bench.kernels.anchors import ceilings, memory_anchors, product_anchor
from clt.launch.bench.kernels.claims import kernel_claims
from clt.launch.bench.kernels.data import DISTRIBUTIONS, SIZES, Problem, Size
from clt.launch.bench.kernels.measure import Case, measure
from clt.launch.bench.kernels.reference import Reference
from clt.launch.bench.kernels.report import KernelReport, Table, make_table
from clt.launch.bench.kernels.rivals import Method
from clt.launch.bench.kernels.work import Ceilings

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "triton", "numpy")
_GIB = 2**30
#: Relative error beyond which a result counts as wrong: several times what a sum in this dtype costs.
_TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}


@dataclass(frozen=True, kw_only=True)
class KernelBenchSettings:
    """What is measured.

    Attributes:
        sizes: names in `SIZES`; empty for those that the device is judged at: A and B, or cpu.
        rounds: runs of every contender; None for 30 on a GPU and 5 on a CPU.
        eleuther: checkout of EleutherAI's clt-training or sparsify, whose kernels are compared; needs a GPU.
        openai: checkout of openai's sparse_autoencoder, likewise.
        quick: a toy size, little memory and two rounds: shows that everything runs, and its numbers mean nothing.
    """

    sizes: tuple[str, ...] = ()
    rounds: int | None = None
    eleuther: Path | None = None
    openai: Path | None = None
    quick: bool = False


def bench_kernels(settings: KernelBenchSettings) -> KernelReport:
    """Runs the benchmark on the first GPU, or on the CPU of a machine without one.

    Args:
        settings: what is measured.

    Returns:
        Ceilings of the machine, tables and promises.

    Raises:
        ConfigError: a size is not known or does not fit into memory, or a checkout is wrong or cannot be used here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = _sizes(settings, device, dtype)
    methods = _peers(settings, device)
    rounds = settings.rounds or (2 if settings.quick else 30 if device.type == "cuda" else 5)
    machine = this_machine(_PACKAGES, Path())
    memory = memory_anchors(device, _anchor_bytes(settings, device), rounds)
    anchors = [*memory]
    tables: list[Table] = []
    for size in sizes:
        product = product_anchor(size, device, dtype, rounds)
        anchors.append(product)
        tables += _tables(size, ceilings(memory, product), methods, device, dtype, rounds)
    return KernelReport(
        machine=machine,
        setting=_setting(device, dtype, rounds),
        sizes=tuple(_words(size, device, dtype) for size in sizes),
        anchors=tuple(anchors),
        tables=tuple(tables),
        claims=kernel_claims(tables, device.type),
    )


def _tables(
    size: Size, roof: Ceilings, methods: Sequence[Method], device: torch.device, dtype: torch.dtype, rounds: int
) -> Iterator[Table]:
    for distribution in DISTRIBUTIONS:
        problem = Problem.make(size, distribution, device, dtype)
        for make in _cases(problem, Reference(problem), methods):
            case = make()
            table = make_table(size.name, distribution, case, measure(case, device, rounds, _TOLERANCE[dtype]), roof)
            # A run that does not reach its report has left its numbers in the log.
            times = "; ".join(f"{row.name} {math.nan if row.ms is None else row.ms:.3f} ms" for row in table.rows)
            log.info("bench: %s: %s", table.key, times)
            yield table


def _cases(problem: Problem, reference: Reference, methods: Sequence[Method]) -> list[Callable[[], Case]]:
    """One by one: a case holds what its contenders share, and that is freed with it."""
    return [
        lambda: forward.encode_case(problem, reference),
        lambda: forward.select_case(problem, reference),
        lambda: forward.threshold_case(problem),
        lambda: forward.csr_case(problem),
        lambda: forward.decode_case(problem, reference, methods),
        lambda: forward.loss_case(problem, reference),
        lambda: backward.decoder_case(problem, reference, methods),
        lambda: backward.encoder_case(problem, reference),
        lambda: optimizer.adam_case(problem, reference),
        lambda: optimizer.fused_step_case(problem, reference),
        lambda: step.forward_backward_case(problem, reference, methods),
        lambda: step.step_case(problem, reference, methods),
    ]


def _sizes(settings: KernelBenchSettings, device: torch.device, dtype: torch.dtype) -> list[Size]:
    usual = ("A", "B") if device.type == "cuda" else ("cpu",)
    names = dict.fromkeys(settings.sizes or (("toy",) if settings.quick else usual))
    for name in names:
        if name not in SIZES:
            raise ConfigError(f"--size {name}: not known; take one of {', '.join(SIZES)}")
    sizes = [SIZES[name] for name in names]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _physical_memory()
    for size in sizes:
        needed = _memory(size, device, dtype)
        if needed > free:
            raise ConfigError(
                f"--size {size.name}: needs about {needed / _GIB:.0f} GiB, and there are {free / _GIB:.0f}; take a "
                f"smaller one"
            )
    return sizes


def _memory(size: Size, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes at the worst moment: the step with Adam, whose contenders are all set up at once on a CPU."""
    weights = size.n_sources * size.n_features * size.d_model * dtype.itemsize
    preactivations = size.n_tokens * size.n_features * dtype.itemsize
    if device.type == "cuda":
        return 7.0 * weights + 4 * preactivations
    return 14.0 * weights + 3 * size.n_sources * preactivations


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _peers(settings: KernelBenchSettings, device: torch.device) -> list[Method]:
    """Kernels of other projects, which benchmarks/kernel_peers.py of our checkout loads from theirs."""
    methods = []
    for project, checkout in (("eleuther", settings.eleuther), ("openai", settings.openai)):
        if checkout is None:
            continue
        if not checkout.is_dir():
            raise ConfigError(f"--{project} {checkout}: no such folder; name the folder of a checkout")
        if device.type != "cuda":
            raise ConfigError(f"--{project} {checkout}: these kernels need a CUDA device; leave the option out here")
        methods.append(getattr(load_benchmarks("benchmarks.kernel_peers"), project)(checkout))
    return methods


def _anchor_bytes(settings: KernelBenchSettings, device: torch.device) -> int:
    if settings.quick:
        return 64 * 2**20
    return (4 if device.type == "cuda" else 1) * 512 * 2**20


def _setting(device: torch.device, dtype: torch.dtype, rounds: int) -> str:
    kind = str(dtype).removeprefix("torch.")
    backend = ops.backend_of(torch.empty(0, device=device, dtype=dtype))
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    tuned = f" Launch settings: {configs.fingerprint()}." if backend == "triton" else ""
    return f"{where}; backend {backend}, {kind}; {rounds} rounds.{tuned}"


def _words(size: Size, device: torch.device, dtype: torch.dtype) -> str:
    """The size and, where kernels are launched, which way the operations take."""
    if ops.backend_of(torch.empty(0, device=device, dtype=dtype)) != "triton":
        return str(size)
    chosen = configs.describe(dtype, size.d_model, size.n_features, size.k, size.n_tokens)
    return (
        f"{size}; encode by {chosen.producer}, decode {chosen.decode_path}, decoder_grad {chosen.decoder_grad_path}, "
        f"encoder_grad {chosen.encoder_grad_path}"
    )
