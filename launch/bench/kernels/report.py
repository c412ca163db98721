"""What the kernels' benchmark reports, as JSON and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from clt.launch.bench.common.machine import Machine, describe
from clt.launch.bench.common.report import Claim, claims_text, markdown_table
from clt.launch.bench.kernels.anchors import Anchor
from clt.launch.bench.kernels.data import Distribution
from clt.launch.bench.kernels.measure import Case, Sample
from clt.launch.bench.kernels.work import Ceilings, total_floor_s


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in a table. Rates count the work that has to be done, whatever the contender did.

    Attributes:
        name: who.
        wall_s: seconds of each round; empty if it could not run.
        ms: of the best round.
        median_ms: of the median round.
        gb_per_s: bytes asked of caches and memory, 1e9 per second, of the best round.
        tflop_per_s: additions and multiplications, 1e12 per second, of the best round.
        roofline: share of the least possible time in the best round.
        error: relative error against float64; None where there is no reference.
        repeats: whether two runs gave the same bits.
        peak_mib: device memory that a run takes beside its inputs; None on a CPU.
        absent: why it could not run, else None.
    """

    name: str
    wall_s: tuple[float, ...] = ()
    ms: float | None = None
    median_ms: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roofline: float | None = None
    error: float | None = None
    repeats: bool | None = None
    peak_mib: float | None = None
    absent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One operation on one problem.

    Attributes:
        size: name of the size.
        distribution: how often features fire.
        op: the operation.
        title: what is done.
        moved_bytes: bytes asked of caches and memory.
        gather_bytes: rows gathered among them.
        flops: additions and multiplications.
        floor_ms: the least possible time by the ceilings of the machine.
        rows: the contenders, ours first.
    """

    size: str
    distribution: Distribution
    op: str
    title: str
    moved_bytes: float
    gather_bytes: float
    flops: float
    floor_ms: float
    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        """Short name."""
        return f"{self.size}/{self.distribution}/{self.op}"


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Outcome of the benchmark.

    Attributes:
        machine: where and when.
        setting: device, backend, dtype, threads and rounds, in words.
        sizes: the sizes, in words.
        anchors: what the machine can do at most.
        tables: what was measured.
        claims: what was promised.
    """

    machine: Machine
    setting: str
    sizes: tuple[str, ...]
    anchors: tuple[Anchor, ...]
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]

    def to_json(self) -> str:
        """The report as JSON, every round of every row included."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_text(self) -> str:
        """The report as Markdown tables."""
        sizes = "\n".join(f"* {size}" for size in self.sizes)
        parts = [claims_text(self.claims), f"{self.setting}\n\n{sizes}", _anchors(self.anchors)]
        parts += [_table(table) for table in self.tables]
        return "\n\n".join([*parts, describe(self.machine)])


def make_table(size: str, distribution: Distribution, case: Case, samples: Sequence[Sample], roof: Ceilings) -> Table:
    """A table from what was measured.

    Args:
        size: name of the size.
        distribution: how often features fire.
        case: the operation.
        samples: one per contender.
        roof: ceilings of the machine at this size.
    """
    moved, flops = sum(work.moved_bytes for work in case.works), sum(work.flops for work in case.works)
    floor_s = total_floor_s(roof, case.works)
    return Table(
        size=size,
        distribution=distribution,
        op=case.op,
        title=case.title,
        moved_bytes=moved,
        gather_bytes=sum(work.gather_bytes for work in case.works),
        flops=flops,
        floor_ms=floor_s * 1e3,
        rows=tuple(_row(sample, moved, flops, floor_s) for sample in samples),
    )


def _row(sample: Sample, moved: float, flops: float, floor_s: float) -> Row:
    if sample.timing is None:
        return Row(name=sample.name, error=sample.error, absent=sample.absent)
    best_s = sample.timing.best_s
    return Row(
        name=sample.name,
        wall_s=sample.timing.wall_s,
        ms=best_s * 1e3,
        median_ms=sample.timing.median_s * 1e3,
        gb_per_s=moved / best_s / 1e9,
        tflop_per_s=flops / best_s / 1e12,
        roofline=floor_s / best_s,
        error=sample.error,
        repeats=sample.repeats,
        peak_mib=None if sample.peak_bytes is None else sample.peak_bytes / 2**20,
    )


def _anchors(anchors: Sequence[Anchor]) -> str:
    rows = []
    for anchor in anchors:
        scale, unit = (1e12, "TFLOP/s") if anchor.unit == "FLOP/s" else (1e9, "GB/s")
        rows.append((anchor.name, f"{anchor.best_s * 1e3:.3f}", f"{anchor.rate / scale:.4g} {unit}"))
    return f"**Ceilings of the machine**\n\n{markdown_table(('', 'ms best', 'rate'), rows)}"


def _table(table: Table) -> str:
    memory = any(row.peak_mib is not None for row in table.rows)
    head = ("", "ms best", "median", "GB/s", "TFLOP/s", "roofline", "error", "same bits", *(("MiB",) if memory else ()))
    rows = []
    for row in table.rows:
        if row.absent is not None:
            cells = [row.name, row.absent, *[""] * (len(head) - 2)]
        else:
            cells = [
                row.name,
                _number(row.ms, "{:.3f}"),
                _number(row.median_ms, "{:.3f}"),
                _number(row.gb_per_s, "{:.4g}"),
                _number(row.tflop_per_s, "{:.3g}"),
                _number(row.roofline, "{:.2f}"),
                _number(row.error, "{:.1e}"),
                {True: "yes", False: "no", None: "-"}[row.repeats],
                *((_number(row.peak_mib, "{:.0f}"),) if memory else ()),
            ]
        rows.append(cells)
    head_line = f"**{table.key}** {table.title} Least possible: {table.floor_ms:.3f} ms."
    return f"{head_line}\n\n{markdown_table(head, rows)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
