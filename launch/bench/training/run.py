"""Training benchmark: steps of `clt train` against a dense baseline, bytes between ranks, and projections.

`clt bench train` prints it; benchmarks/train.md is a committed run. It measures the ceilings of the machine, then every
size in its own processes: tokens/s, memory, share of the roofline, time by phase. Bytes are counted on 1, 2 and 4 gloo
ranks of this machine. Activations are in memory: the store has its own benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from clt.errors import ConfigError
from clt.kernels import ops
from clt.launch.bench.common.ceilings import memory_ceilings
from clt.launch.bench.common.machine import check_fits, device_words, this_machine
from clt.launch.bench.common.report import Claim, claim
from clt.launch.bench.training.measure import MESHES, TrafficRow, can_isolate, measure_size, measure_traffic
from clt.launch.bench.training.projection import PROJECTED, Pieces, Projection, project
from clt.launch.bench.training.report import SizeTable, TrainReport
from clt.launch.bench.training.roofline import measured_machine, size_ceilings
from clt.launch.bench.training.sizes import DEFAULT, SIZES, TrainSize, planned_job
from clt.planning.counts import memory

#: Sizes without claims, since their numbers are meaningless.
_TOYS = ("toy", "toy-slice")
_PACKAGES = ("torch", "triton", "deepspeed", "numpy")
#: Size of the traffic measurement: quick to train, its bytes large against packet headers.
_TRAFFIC_SIZE = "cpu"
#: Bound on bytes with headers and acknowledgements over bytes sent.
_HEADERS = 1.05


@dataclass(frozen=True, kw_only=True)
class TrainBenchSettings:
    """Settings of the training benchmark.

    Attributes:
        sizes: names in `SIZES`; default: gpt2 and llava-slice on a GPU, cpu on a CPU.
        ranks: numbers of ranks of the traffic measurement; default: 1, 2 and 4.
        steps: measured steps; default: 20 on a GPU, 5 in each of three turns on a CPU.
        quick: toy size, one mesh of two ranks, two steps: checks that everything runs; its numbers are meaningless.
    """

    sizes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    steps: int | None = None
    quick: bool = False


def bench_train(settings: TrainBenchSettings) -> TrainReport:
    """Runs the benchmark on the first GPU, or on the CPU of a machine without one.

    Args:
        settings: sizes, ranks and steps.

    Raises:
        ConfigError: a size or a number of ranks is unknown, or a size does not fit into memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, worlds = _sizes(settings, device), _worlds(settings)
    steps = settings.steps or (2 if settings.quick else 20 if device.type == "cuda" else 5)
    turns = 1 if settings.quick or device.type == "cuda" else 3
    machine = this_machine(_PACKAGES, Path())
    rounds, n_bytes = (2, 2**26) if settings.quick else (10, (4 if device.type == "cuda" else 1) * 2**29)
    stream = memory_ceilings(device, n_bytes, rounds)
    ceilings, tables = [*stream], []
    pieces: list[Pieces] = []
    for size in sizes:
        found = size_ceilings(size, device, rounds)
        ceilings += [*found.products.values(), found.gather]
        measured = measured_machine(stream, found)
        rows = measure_size(size, steps, turns, measured)
        tables.append(SizeTable(size=size.name, words=str(size), rows=rows))
        if rows[0].absent is None:
            pieces.append(Pieces(size=size, row=rows[0], machine=measured))
    traffic_size = SIZES["toy" if settings.quick else _TRAFFIC_SIZE]
    meshes = [mesh for world in worlds for mesh in MESHES[world][: 1 if settings.quick else None]]
    traffic, link = measure_traffic(traffic_size, meshes, 2, can_isolate())
    return TrainReport(
        machine=machine,
        setting=_setting(device, turns, steps),
        ceilings=tuple(ceilings),
        link=link,
        tables=tuple(tables),
        traffic=traffic,
        projections=_projections(pieces),
        claims=(*_speed_claims(tables), *_traffic_claims(traffic)),
    )


def _sizes(settings: TrainBenchSettings, device: torch.device) -> list[TrainSize]:
    usual = ("gpt2", "llava-slice") if device.type == "cuda" else ("cpu",)
    names = dict.fromkeys(settings.sizes or (("toy-slice",) if settings.quick else usual))
    for name in names:
        if name not in SIZES:
            raise ConfigError(f"--size {name}: unknown size; choose from {', '.join(SIZES)}")
        job = planned_job(SIZES[name], DEFAULT)
        check_fits(name, memory(job, job.shares()[0]).total, device)
    return [SIZES[name] for name in names]


def _worlds(settings: TrainBenchSettings) -> tuple[int, ...]:
    for ranks in settings.ranks:
        if ranks not in MESHES:
            raise ConfigError(f"--ranks {ranks}: not supported; choose from {', '.join(map(str, MESHES))}")
    return settings.ranks or ((2,) if settings.quick else tuple(MESHES))


def _projections(pieces: list[Pieces]) -> tuple[Projection, ...]:
    """Each job from the measurement of its own size, or from the first one."""
    if not pieces:
        return ()
    by_name = {each.size.name: each for each in pieces}
    return tuple(projection for name in PROJECTED for projection in project(by_name.get(name, pieces[0]), SIZES[name]))


def _speed_claims(tables: list[SizeTable]) -> list[Claim]:
    """Claims without AuxK, which the dense baseline does not have."""
    claims = []
    for table in tables:
        if table.size in _TOYS:
            continue
        text = f"{table.size}: step of a job without AuxK, against dense products, torch.topk and fused Adam"
        theirs, ours = (None if row.absent else row.best_s for row in (table.dense, table.plain))
        claims.append(claim(text, theirs, ours, ">=", 1))
    return claims


def _traffic_claims(rows: tuple[TrafficRow, ...]) -> list[Claim]:
    differ = float(sum(row.counted != row.formula for row in rows))
    exact = "bytes counted while training equal the formula, AuxK's included: meshes on which they do not"
    claims = [Claim(text=exact, measured=differ, relation="<=", bound=0, ok=differ == 0)]
    read = [
        (row.loopback, row.counted)
        for row in rows
        if row.loopback is not None and row.counted and row.size not in _TOYS
    ]
    text = "bytes read off the loopback interface, headers included, over bytes counted: the largest ratio"
    over, counted = max(read, key=lambda pair: pair[0] / pair[1], default=(None, None))
    return [*claims, claim(text, over, counted, "<=", _HEADERS)]


def _setting(device: torch.device, turns: int, steps: int) -> str:
    backend = ops.backend_of(torch.empty(0, device=device))
    return (
        f"{device_words(device)}; backend {backend}; {steps} steps after three others, in each of {turns} turns; one "
        "process, activations in memory; every feature that the previous step did not use counts as dead. Dense: all "
        "features decoded, torch.topk, autograd, fused Adam, no clipping. Planned: memory by `clt plan`."
    )
