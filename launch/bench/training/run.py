"""The training benchmark: whole steps of `clt train` beside the naive way, bytes between ranks, and a projection.

`clt bench train` prints it; benchmarks/train.md is one run of it. First what the machine can do at most, then every
size in processes of its own: tokens/s, memory, the share of the roofline, where the time goes. Bytes are counted on 1,
2 and 4 gloo ranks of this machine. Activations lie where the step needs them: the store has its own benchmark.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from clt.errors import ConfigError
from clt.kernels import ops
from clt.launch.bench.common.machine import this_machine
from clt.launch.bench.common.report import Claim, claim
from clt.launch.bench.kernels.anchors import memory_anchors
from clt.launch.bench.training.anchors import anchored_machine, size_anchors
from clt.launch.bench.training.measure import MESHES, TrafficRow, can_isolate, measure_size, measure_traffic
from clt.launch.bench.training.projection import PROJECTED, Pieces, Projection, project
from clt.launch.bench.training.report import SizeTable, TrainReport
from clt.launch.bench.training.sizes import DEFAULT, SIZES, Size, planned_job
from clt.planning.counts import memory

#: Sizes whose numbers mean nothing, and of which nothing is promised.
_TOYS = ("toy", "toy-slice")
_PACKAGES = ("torch", "triton", "deepspeed", "numpy")
_GIB = 2**30
#: What travels is counted at this size, which is quick to train and large against the headers of packets.
_TRAFFIC_SIZE = "cpu"
#: Headers and acknowledgements add so much, relatively, to what is sent.
_HEADERS = 1.05


@dataclass(frozen=True, kw_only=True)
class TrainBenchSettings:
    """What is measured.

    Attributes:
        sizes: names in `SIZES`; empty for gpt2 and llava-slice on a GPU, cpu on a CPU.
        ranks: worlds on which bytes are counted, of 1, 2 and 4; empty for all three.
        steps: measured steps; None for 20 on a GPU and 5 in each of three turns on a CPU.
        quick: a toy size, one mesh of two ranks, two steps: shows that everything runs, and its numbers mean nothing.
    """

    sizes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    steps: int | None = None
    quick: bool = False


def bench_train(settings: TrainBenchSettings) -> TrainReport:
    """Runs the benchmark on the first GPU, or on the CPU of a machine without one.

    Args:
        settings: what is measured.

    Returns:
        Ceilings, speed and memory, bytes, projections and promises.

    Raises:
        ConfigError: a size or a number of ranks is not known, or a size does not fit into memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, worlds = _sizes(settings, device), _worlds(settings)
    steps = settings.steps or (2 if settings.quick else 20 if device.type == "cuda" else 5)
    turns = 1 if settings.quick or device.type == "cuda" else 3
    machine = this_machine(_PACKAGES, Path())
    rounds, n_bytes = (2, 2**26) if settings.quick else (10, (4 if device.type == "cuda" else 1) * 2**29)
    stream = memory_anchors(device, n_bytes, rounds)
    anchors, tables = [*stream], []
    pieces: list[Pieces] = []
    for size in sizes:
        found = size_anchors(size, device, rounds)
        anchors += [*found.products.values(), found.gather]
        ceilings = anchored_machine(stream, found)
        rows = measure_size(size, steps, turns, ceilings)
        tables.append(SizeTable(size=size.name, words=str(size), rows=rows))
        if rows[0].absent is None:
            pieces.append(Pieces(size=size, row=rows[0], machine=ceilings))
    traffic_size = SIZES["toy" if settings.quick else _TRAFFIC_SIZE]
    meshes = [mesh for world in worlds for mesh in MESHES[world][: 1 if settings.quick else None]]
    traffic, link = measure_traffic(traffic_size, meshes, 2, can_isolate())
    return TrainReport(
        machine=machine,
        setting=_setting(device, turns, steps),
        anchors=tuple(anchors),
        link=link,
        tables=tuple(tables),
        traffic=traffic,
        projections=_projections(pieces),
        claims=(*_speed_claims(tables), *_traffic_claims(traffic)),
    )


def _sizes(settings: TrainBenchSettings, device: torch.device) -> list[Size]:
    usual = ("gpt2", "llava-slice") if device.type == "cuda" else ("cpu",)
    names = dict.fromkeys(settings.sizes or (("toy-slice",) if settings.quick else usual))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _physical_memory()
    for name in names:
        if name not in SIZES:
            raise ConfigError(f"--size {name}: not known; take one of {', '.join(SIZES)}")
        job = planned_job(SIZES[name], DEFAULT)
        needed = memory(job, job.shares()[0]).total
        if needed > free:
            raise ConfigError(
                f"--size {name}: needs about {needed / _GIB:.0f} GiB, and there are {free / _GIB:.0f}; take a smaller "
                "one"
            )
    return [SIZES[name] for name in names]


def _worlds(settings: TrainBenchSettings) -> tuple[int, ...]:
    for ranks in settings.ranks:
        if ranks not in MESHES:
            raise ConfigError(f"--ranks {ranks}: not measured; take {', '.join(map(str, MESHES))}")
    return settings.ranks or ((2,) if settings.quick else tuple(MESHES))


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _projections(pieces: list[Pieces]) -> tuple[Projection, ...]:
    """Each job from its own pieces, or from those of the first size that was measured."""
    if not pieces:
        return ()
    by_name = {each.size.name: each for each in pieces}
    return tuple(projection for name in PROJECTED for projection in project(by_name.get(name, pieces[0]), SIZES[name]))


def _speed_claims(tables: list[SizeTable]) -> list[Claim]:
    """Without AuxK, which the naive way does not have."""
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
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{where}; backend {backend}; {steps} steps after three others, in each of {turns} turns; one process, its "
        "activations in memory; every feature that the step before did not use counts as dead. Dense: all features "
        "decoded, torch.topk, autograd, fused Adam, no clipping. Planned: memory by `clt plan`."
    )
