"""Report of `clt plan`: memory, traffic and speed of a training job before it runs (`clt.planning.plan`).

The model's dimensions come from the job's store unless they are given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clt.capture.capacity import NVME
from clt.capture.reading.open_store import open_store
from clt.config import load_config
from clt.errors import ConfigError, StoreError
from clt.launch.tables import count_text, duration_text, si_text, table
from clt.planning.job import NUMERICS, Job, Sum, decoder_matrices
from clt.planning.plan import MeasuredRun, Plan, alternatives, measured_run, plan, smallest
from clt.planning.speed import MACHINES
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare

_TABLE_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan and its alternatives.

    Attributes:
        plan: on the mesh of the configuration.
        meshes: the fastest meshes of as many devices on which the job fits.
        smallest: per kind of numerics, the job on the fewest devices, None where it fits on none of the tried numbers.
        measured: speed and traffic of a run of the job, None without one.
    """

    plan: Plan
    meshes: tuple[Plan, ...]
    smallest: tuple[Plan | None, ...]
    measured: MeasuredRun | None

    def to_json(self) -> str:
        """The report as JSON; meshes other than the job's in short."""
        tree = _tree(self.plan)
        tree["meshes"] = [_short(p) for p in self.meshes]
        pairs = zip(NUMERICS, self.smallest, strict=True)
        tree["smallest"] = {name: None if p is None else _short(p) for name, p in pairs}
        tree["measured"] = None if self.measured is None else asdict(self.measured)
        return json.dumps(tree, indent=1)

    def to_text(self) -> str:
        """The report as text."""
        parts = (_size_text(self.plan), _memory_text(self.plan), _work_text(self.plan), _speed_text(self))
        return "\n\n".join((*parts, _meshes_text(self), _smallest_text(self)))


def make_plan(
    file: Path | None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    gpu: str = "h200",
    gpus: int | None = None,
    tokens: float | None = None,
    numerics: str | None = None,
) -> PlanReport:
    """Plans a job and compares it with other meshes, other numerics and an existing run of it.

    Args:
        file: YAML file of the training job; None: all keys are in `overrides`.
        overrides: strings `a.b=value`.
        model: "layers=L,width=D"; None: that of the job's store.
        gpu: a key of `clt.planning.speed.MACHINES`.
        gpus: devices; None: one model group, mesh.layer x mesh.column.
        tokens: tokens to train on; None: those of all steps of the job.
        numerics: a key of `clt.planning.job.NUMERICS`; None: that of the configuration.

    Returns:
        The report.

    Raises:
        ConfigError: the configuration, the mesh or an option is wrong.
        StoreError: there is no store and the model's size is not given.
        CheckpointError: the metrics of the run are damaged.
    """
    if gpu not in MACHINES:
        raise ConfigError(f"--gpu {gpu}: unknown machine; choose one of {', '.join(MACHINES)}")
    if numerics is not None and numerics not in NUMERICS:
        raise ConfigError(f"--numerics {numerics}: unknown name; choose one of {', '.join(NUMERICS)}")
    config = load_config(TrainConfig, file, overrides)
    n_layers, d_model = dimensions(config, model)
    architecture = CLTConfig.resolve(config.clt, n_layers, d_model)
    chosen = plan(
        config,
        architecture,
        MACHINES[gpu],
        world=gpus,
        tokens=tokens,
        numerics=None if numerics is None else NUMERICS[numerics],
    )
    return PlanReport(
        plan=chosen,
        meshes=tuple(alternatives(chosen)[:_TABLE_ROWS]),
        smallest=tuple(smallest(chosen, kind) for kind in NUMERICS.values()),
        measured=measured_run(config.output),
    )


def dimensions(config: TrainConfig, model: str | None) -> tuple[int, int]:
    """Decoder layers and width of the model.

    Args:
        config: the job, whose store is read if `model` is None.
        model: "layers=L,width=D", in any order.

    Returns:
        Number of layers L and width D.

    Raises:
        ConfigError: `model` is not of that form, or is missing and the job has no store.
        StoreError: the store cannot be opened.
    """
    hint = "give the model's size, as in --model layers=32,width=4096"
    if model is None:
        if config.store is None:
            raise ConfigError(f"the job streams activations and has no store with the model's size; {hint}")
        try:
            identity = open_store(config.store).model
        except StoreError as error:
            raise StoreError(f"{error}; or {hint}") from None
        return identity.n_layers, identity.d_model
    given = dict(part.split("=", 1) for part in model.split(",") if "=" in part)
    if set(given) != {"layers", "width"} or not all(value.isdigit() and int(value) for value in given.values()):
        raise ConfigError(f"--model {model}: expected two positive numbers, as in layers=32,width=4096")
    return int(given["layers"]), int(given["width"])


def _decoders_text(p: Plan) -> str:
    architecture, matrices = (
        p.job.architecture,
        decoder_matrices(p.job.architecture, LayerShare.everything(p.job.architecture)),
    )
    tied = f", tied for {p.pairs:,} sources and targets" if architecture.tied_decoders else ""
    return f"{matrices:,} of [F,D]{tied}"


def _size_text(p: Plan) -> str:
    job, whole = p.job, p.parameters
    most, least = p.rank_parameters
    skip = f", skip {_g(whole.skip)}" if whole.skip else ""
    rows = [
        ("architecture", _architecture(job)),
        ("parameters", f"{_g(whole.total)}: encoders {_g(whole.encoders)}, decoders {_g(whole.decoders)}{skip}"),
        ("decoders", _decoders_text(p)),
        ("mesh", f"{_mesh(job)} = {job.mesh.world} x {p.machine.name}, ZeRO-{job.mesh.zero}"),
        (
            "a rank",
            f"{_g(least)} to {_g(most)} parameters; sees {job.batch:,} of {job.config.data.batch_tokens:,} tokens",
        ),
        ("numerics", _numerics(job)),
    ]
    return table(rows, left=2)


def _memory_text(p: Plan) -> str:
    usable = p.machine.memory * p.machine.usable
    rows = [("memory of a rank", ""), *_rows(p.memory, "B")]
    rows += [("total", si_text(p.memory.total, "B")), (f"usable on one {p.machine.name}", si_text(usable, "B"))]
    verdict = "it fits" if p.fits else f"IT DOES NOT FIT: {p.memory.total / usable:.2f} times the usable memory"
    return f"{table(rows)}\n{verdict}"


def _work_text(p: Plan) -> str:
    received = [("received by a rank in a step", ""), *_rows(p.traffic, "B"), ("total", si_text(p.traffic.total, "B"))]
    work = [("arithmetic of a step, all ranks", ""), *_rows(p.flops, "FLOP"), ("total", si_text(p.flops.total, "FLOP"))]
    work.append(("if every feature were decoded", si_text(p.dense_flops, "FLOP")))
    return f"{table(received)}\n\n{table(work)}"


def _speed_text(report: PlanReport) -> str:
    p = report.plan
    rows = [("projected step", ""), *_rows(p.step, "s"), ("total", si_text(p.step.total, "s"))]
    nodes = -(-p.job.mesh.world // p.machine.per_node)
    disk = count_text(NVME * nodes / p.store_bytes * p.tokens)
    facts = [
        ("projected", f"{_rate(p)} tokens/s; {p.tokens:,.0f} tokens in {duration_text(p.seconds)}"),
        ("rates", p.machine.rates.source),
        ("store", f"{si_text(p.store_bytes, 'B')} for these tokens in bfloat16"),
        (
            "it must deliver",
            f"{si_text(p.store_rate, 'B')}/s; one disk of 7 GB/s per node: {disk} tokens/s",
        ),
    ]
    if report.measured is not None:
        seen = report.measured
        share = seen.tokens_per_second / p.tokens_per_second
        facts.append(("measured", f"{count_text(seen.tokens_per_second)} tokens/s, {share:.2f} of the projection"))
        if seen.bytes_per_step:
            counted = f"{si_text(seen.bytes_per_step, 'B')} per step, {si_text(p.traffic.total, 'B')} by the plan"
            facts.append(("sent by a rank", counted))
    return table(rows) + "\n\n" + table(facts, left=2)


def _meshes_text(report: PlanReport) -> str:
    p = report.plan
    if not report.meshes:
        return f"fits on no mesh of {p.job.mesh.world} {p.machine.name}"
    rows = [(f"meshes of {p.job.mesh.world} that fit", "ZeRO", "memory", "received", "tokens/s")]
    rows += [
        (
            _mesh(each.job),
            str(each.job.mesh.zero),
            si_text(each.memory.total, "B"),
            si_text(each.traffic.total, "B"),
            _rate(each),
        )
        for each in report.meshes
    ]
    return table(rows)


def _smallest_text(report: PlanReport) -> str:
    rows = [("numerics", "bytes/parameter", "fewest", "mesh", "tokens/s", "all tokens in")]
    for (name, kind), p in zip(NUMERICS.items(), report.smallest, strict=True):
        found = ("none", "-", "-", "-")
        if p is not None:
            found = (str(p.job.mesh.world), _mesh(p.job), _rate(p), duration_text(p.seconds))
        rows.append((name, str(kind.bytes_per_parameter), *found))
    return table(rows)


def _architecture(job: Job) -> str:
    architecture = job.architecture
    targets = f"{architecture.n_targets} target layers" if architecture.n_targets else "all targets"
    first = "its own layer" if architecture.first_offset == 0 else "the next layer"
    return (
        f"{architecture.n_layers} layers of {architecture.d_model:,}; {architecture.n_features:,} features each, "
        f"{architecture.sparsity.kind} k={architecture.k}, "
        f"{targets} from {first} on"
    )


def _numerics(job: Job) -> str:
    return f"{job.numerics.name}: {job.numerics.bytes_per_parameter} bytes per parameter without ZeRO"


def _mesh(job: Job) -> str:
    return f"data {job.mesh.data} x layer {job.mesh.layer} x column {job.mesh.column}"


def _rate(p: Plan) -> str:
    return count_text(p.tokens_per_second)


def _rows(numbers: Sum, unit: str) -> list[tuple[str, str]]:
    """The numbers that are not zero, by name."""
    return [(name.replace("_", " "), si_text(value, unit)) for name, value in vars(numbers).items() if value]


def _g(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.3f} M"


def _tree(p: Plan) -> dict[str, Any]:
    tree = _short(p)
    tree |= {name: vars(getattr(p, name)) for name in ("parameters", "memory", "traffic", "flops", "step")}
    tree |= {"pairs": p.pairs, "tokens": p.tokens, "store_bytes": p.store_bytes, "dense_flops": p.dense_flops}
    return tree


def _short(p: Plan) -> dict[str, Any]:
    return {
        "machine": p.machine.name,
        "mesh": asdict(p.job.mesh),
        "numerics": p.job.numerics.name,
        "parameters_total": p.parameters.total,
        "memory_bytes": p.memory.total,
        "fits": p.fits,
        "received_bytes": p.traffic.total,
        "step_seconds": p.step.total,
        "tokens_per_second": p.tokens_per_second,
        "seconds": p.seconds,
    }
