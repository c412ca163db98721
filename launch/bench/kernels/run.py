"""Kernel benchmark: our kernels against dense products, PyTorch's embedding bag and other projects' kernels.

`clt bench kernels` prints it; benchmarks/kernels.md is a committed run. It measures the ceilings of the machine, then
every operation and whole training steps, with features that fire uniformly and by Zipf's law, on a GPU in bfloat16 with
the Triton kernels or on a CPU in float32 with the sparse CPU path.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clt.errors import ConfigError
from clt.kernels import ops
from clt.kernels.gpu import configs
from clt.launch.bench.checkout import load_benchmarks
from clt.launch.bench.common.ceilings import memory_ceilings, product_ceiling
from clt.launch.bench.common.machine import check_fits, device_words, this_machine
from clt.launch.bench.kernels import cases, optimizer_cases, step_cases
from clt.launch.bench.kernels.baselines import TrainingMethod
from clt.launch.bench.kernels.data import DISTRIBUTIONS, SIZES, KernelInputs, KernelSize
from clt.launch.bench.kernels.measure import Case, measure
from clt.launch.bench.kernels.reference import Reference
from clt.launch.bench.kernels.report import KernelReport, KernelTable, kernel_claims, make_table
from clt.launch.bench.kernels.roofline import Roofline, roofline

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "triton", "numpy")
#: Relative error above which a result counts as wrong: several times the rounding error of a sum in this dtype.
_TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}


@dataclass(frozen=True, kw_only=True)
class KernelBenchSettings:
    """Settings of the kernel benchmark.

    Attributes:
        sizes: names in `SIZES`; default: those of the claims, A and B on a GPU, cpu on a CPU.
        rounds: timed runs of every implementation; default: 30 on a GPU, 5 on a CPU.
        eleuther: checkout of EleutherAI's clt-training or sparsify whose kernels are compared; needs a GPU.
        openai: checkout of openai's sparse_autoencoder, likewise.
        quick: toy size, little memory, two rounds: checks that everything runs; its numbers are meaningless.
    """

    sizes: tuple[str, ...] = ()
    rounds: int | None = None
    eleuther: Path | None = None
    openai: Path | None = None
    quick: bool = False


def bench_kernels(settings: KernelBenchSettings) -> KernelReport:
    """Runs the benchmark on the first GPU, or on the CPU of a machine without one.

    Args:
        settings: sizes, rounds and other projects.

    Raises:
        ConfigError: a size is unknown or does not fit into memory, or a checkout is wrong or cannot be used here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = _sizes(settings, device, dtype)
    methods = _peers(settings, device)
    rounds = settings.rounds or (2 if settings.quick else 30 if device.type == "cuda" else 5)
    machine = this_machine(_PACKAGES, Path())
    memory = memory_ceilings(device, _memory_bytes(settings, device), rounds)
    found = [*memory]
    tables: list[KernelTable] = []
    for size in sizes:
        product = product_ceiling((size.n_tokens, size.d_model, size.n_features), device, dtype, rounds)
        found.append(product)
        tables += _tables(size, roofline(memory, product), methods, device, dtype, rounds)
    return KernelReport(
        machine=machine,
        setting=_setting(device, dtype, rounds),
        sizes=tuple(_words(size, device, dtype) for size in sizes),
        ceilings=tuple(found),
        tables=tuple(tables),
        claims=kernel_claims(tables, device.type),
    )


def _tables(
    size: KernelSize,
    roof: Roofline,
    methods: Sequence[TrainingMethod],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[KernelTable]:
    for distribution in DISTRIBUTIONS:
        inputs = KernelInputs.make(size, distribution, device, dtype)
        for make in _cases(inputs, Reference(inputs), methods):
            case = make()
            table = make_table(size.name, distribution, case, measure(case, device, rounds, _TOLERANCE[dtype]), roof)
            # The log keeps the numbers of an aborted run.
            times = "; ".join(f"{row.name} {math.nan if row.ms is None else row.ms:.3f} ms" for row in table.rows)
            log.info("bench %s: %s", table.key, times)
            yield table


def _cases(inputs: KernelInputs, reference: Reference, methods: Sequence[TrainingMethod]) -> list[Callable[[], Case]]:
    """Constructors of cases, to be called in turn: a case holds the tensors that its implementations share."""
    return [
        lambda: cases.encode_case(inputs, reference),
        lambda: cases.select_case(inputs, reference),
        lambda: cases.threshold_case(inputs),
        lambda: cases.csr_case(inputs),
        lambda: cases.decode_case(inputs, reference, methods),
        lambda: cases.loss_case(inputs, reference),
        lambda: cases.decoder_case(inputs, reference, methods),
        lambda: cases.encoder_case(inputs, reference),
        lambda: optimizer_cases.adam_case(inputs, reference),
        lambda: optimizer_cases.fused_step_case(inputs, reference),
        lambda: step_cases.forward_backward_case(inputs, reference, methods),
        lambda: step_cases.step_case(inputs, reference, methods),
    ]


def _sizes(settings: KernelBenchSettings, device: torch.device, dtype: torch.dtype) -> list[KernelSize]:
    usual = ("A", "B") if device.type == "cuda" else ("cpu",)
    names = dict.fromkeys(settings.sizes or (("toy",) if settings.quick else usual))
    for name in names:
        if name not in SIZES:
            raise ConfigError(f"--size {name}: unknown size; choose from {', '.join(SIZES)}")
    sizes = [SIZES[name] for name in names]
    for size in sizes:
        check_fits(size.name, _memory(size, device, dtype), device)
    return sizes


def _memory(size: KernelSize, device: torch.device, dtype: torch.dtype) -> float:
    """Peak bytes, at the step with Adam; a CPU holds all its implementations at once."""
    weights = size.n_sources * size.n_features * size.d_model * dtype.itemsize
    preactivations = size.n_tokens * size.n_features * dtype.itemsize
    if device.type == "cuda":
        return 7.0 * weights + 4 * preactivations
    return 14.0 * weights + 3 * size.n_sources * preactivations


def _peers(settings: KernelBenchSettings, device: torch.device) -> list[TrainingMethod]:
    """Kernels of other projects, which benchmarks/kernel_peers.py of our checkout loads from theirs."""
    methods = []
    for project, checkout in (("eleuther", settings.eleuther), ("openai", settings.openai)):
        if checkout is None:
            continue
        if not checkout.is_dir():
            raise ConfigError(f"--{project} {checkout}: no such folder; give the folder of a checkout")
        if device.type != "cuda":
            raise ConfigError(f"--{project} {checkout}: these kernels need a CUDA device; remove the option")
        methods.append(getattr(load_benchmarks("benchmarks.kernel_peers"), project)(checkout))
    return methods


def _memory_bytes(settings: KernelBenchSettings, device: torch.device) -> int:
    if settings.quick:
        return 64 * 2**20
    return (4 if device.type == "cuda" else 1) * 512 * 2**20


def _setting(device: torch.device, dtype: torch.dtype, rounds: int) -> str:
    kind = str(dtype).removeprefix("torch.")
    backend = ops.backend_of(torch.empty(0, device=device, dtype=dtype))
    tuned = f" Launch settings: {configs.fingerprint()}." if backend == "triton" else ""
    return f"{device_words(device)}; backend {backend}, {kind}; {rounds} rounds.{tuned}"


def _words(size: KernelSize, device: torch.device, dtype: torch.dtype) -> str:
    """The size and, with Triton, the code path of each operation."""
    if ops.backend_of(torch.empty(0, device=device, dtype=dtype)) != "triton":
        return str(size)
    numbers = (dtype, size.d_model, size.n_features, size.k, size.n_tokens)
    paths = (f"{op} {configs.settings_of(f'{op}_path', *numbers)}" for op in ("decode", "decoder_grad", "encoder_grad"))
    return f"{size}; encode by {configs.settings_of('producer', *numbers)}, {', '.join(paths)}"
