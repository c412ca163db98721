"""Report of the kernel benchmark: one table per operation, claims and ceilings, as JSON and as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clt.launch.bench.common.ceilings import Ceiling, ceilings_text
from clt.launch.bench.common.machine import MachineInfo, describe
from clt.launch.bench.common.report import Claim, JsonReport, claim, claims_text, markdown_table
from clt.launch.bench.kernels.cases import OURS, TORCH_TOPK, TWO_PASSES, TWO_PASSES_BAG
from clt.launch.bench.kernels.data import Distribution
from clt.launch.bench.kernels.measure import Case, Measurement
from clt.launch.bench.kernels.roofline import Roofline, total_floor_s
from clt.launch.bench.kernels.step_cases import FORWARD_BACKWARD, STEP


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One implementation in a table. Rates count the work of the operation, not of the implementation.

    Attributes:
        name: of the implementation.
        wall_s: seconds of each round; empty if it could not run.
        ms: of the best round.
        median_ms: of the median round.
        gb_per_s: 1e9 bytes requested from caches and memory per second, of the best round.
        tflop_per_s: 1e12 additions and multiplications per second, of the best round.
        roofline: minimum time by the roofline over the time of the best round.
        error: relative error against float64; None where there is no reference.
        repeats: whether two runs gave the same bits.
        peak_mib: device memory of a run beside its inputs; None on a CPU.
        absent: reason why it could not run, or None.
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
class KernelTable:
    """One operation on given inputs.

    Attributes:
        size: name of the size.
        distribution: distribution of feature frequencies.
        op: the operation.
        title: its description.
        moved_bytes: bytes requested from caches and memory.
        gather_bytes: bytes of gathered rows among them.
        flops: additions and multiplications.
        floor_ms: minimum time by the roofline.
        rows: implementations, ours first.
    """

    size: str
    distribution: Distribution
    op: str
    title: str
    moved_bytes: float
    gather_bytes: float
    flops: float
    floor_ms: float
    rows: tuple[KernelRow, ...]

    @property
    def key(self) -> str:
        """Short name."""
        return f"{self.size}/{self.distribution}/{self.op}"


@dataclass(frozen=True, kw_only=True)
class KernelReport(JsonReport):
    """Outcome of the kernel benchmark.

    Attributes:
        machine: hardware, versions and date.
        setting: device, backend, dtype, threads and rounds, as text.
        sizes: descriptions of the sizes.
        ceilings: measured ceilings of the machine.
        tables: measurements.
        claims: claims and whether they hold.
    """

    machine: MachineInfo
    setting: str
    sizes: tuple[str, ...]
    ceilings: tuple[Ceiling, ...]
    tables: tuple[KernelTable, ...]
    claims: tuple[Claim, ...]

    def to_text(self) -> str:
        """The report as Markdown tables."""
        sizes = "\n".join(f"* {size}" for size in self.sizes)
        parts = [claims_text(self.claims), f"{self.setting}\n\n{sizes}", ceilings_text(self.ceilings)]
        parts += [_table(table) for table in self.tables]
        return "\n\n".join([*parts, describe(self.machine)])


def make_table(
    size: str, distribution: Distribution, case: Case, found: Sequence[Measurement], roof: Roofline
) -> KernelTable:
    """A table from measurements.

    Args:
        size: name of the size.
        distribution: distribution of feature frequencies.
        case: the operation.
        found: one measurement per implementation.
        roof: ceilings of the machine at this size.
    """
    moved, flops = sum(work.moved_bytes for work in case.works), sum(work.flops for work in case.works)
    floor_s = total_floor_s(roof, case.works)
    return KernelTable(
        size=size,
        distribution=distribution,
        op=case.op,
        title=case.title,
        moved_bytes=moved,
        gather_bytes=sum(work.gather_bytes for work in case.works),
        flops=flops,
        floor_ms=floor_s * 1e3,
        rows=tuple(_row(each, moved, flops, floor_s) for each in found),
    )


def _row(found: Measurement, moved: float, flops: float, floor_s: float) -> KernelRow:
    if found.timing is None:
        return KernelRow(name=found.name, error=found.error, absent=found.absent)
    best_s = found.timing.best_s
    return KernelRow(
        name=found.name,
        wall_s=found.timing.wall_s,
        ms=best_s * 1e3,
        median_ms=found.timing.median_s * 1e3,
        gb_per_s=moved / best_s / 1e9,
        tflop_per_s=flops / best_s / 1e12,
        roofline=floor_s / best_s,
        error=found.error,
        repeats=found.repeats,
        peak_mib=None if found.peak_bytes is None else found.peak_bytes / 2**20,
    )


def _table(table: KernelTable) -> str:
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


#: Sizes of the claims for a GPU, and size of those for a CPU.
GPU_SIZES, CPU_SIZE = ("A", "B"), "cpu"
#: Name of EleutherAI's kernels in tables, without the checkout that they come from.
ELEUTHER = "EleutherAI"


def kernel_claims(tables: Sequence[KernelTable], device: str) -> tuple[Claim, ...]:
    """Compares all claims with the best rounds.

    Args:
        tables: measurements.
        device: "cuda" or "cpu", where they were made.

    Returns:
        One claim per statement and table; one without a measurement for a statement that no table covers.
    """
    gpu, cpu = (tables, ()) if device == "cuda" else ((), tables)
    judged = [table for table in gpu if table.size in GPU_SIZES]
    wide, narrow = ([table for table in judged if table.size == size] for size in GPU_SIZES)
    peer = "against EleutherAI's kernels"
    return (
        *_claims(narrow, "encode_topk", "GPU, D=768: encode, against product and torch.topk", 1.6, _over(TORCH_TOPK)),
        *_claims(wide, "encode_topk", "GPU, D=4096: encode, against product and torch.topk", 1.15, _over(TORCH_TOPK)),
        *_claims(judged, "decode", "GPU: gather of decode, the better of TB/s / 6 and roofline / 0.75", 1, _gather),
        *_claims(
            judged, "decoder_grad", "GPU: fused backward, against two passes", 2, _over(TWO_PASSES, TWO_PASSES_BAG)
        ),
        *_claims(judged, FORWARD_BACKWARD, f"GPU: forward and backward, {peer}", 1.5, _over(ELEUTHER)),
        *_claims(judged, STEP, f"GPU: step with optimizer, {peer} and torch's Adam", 3, _over(ELEUTHER)),
        *_cpu_claims([table for table in cpu if table.size == CPU_SIZE]),
    )


def _cpu_claims(tables: Sequence[KernelTable]) -> list[Claim]:
    where = "CPU, D=768 F=16384 k=32"
    return [
        *_claims(tables, FORWARD_BACKWARD, f"{where}: forward and backward, against dense", 1, _over("dense")),
        *_claims(tables, STEP, f"{where}: step with optimizer, against dense and torch's Adam", 1, _over("dense")),
    ]


#: Numerator and denominator from a table; None where not measured.
Ratio = Callable[[KernelTable], tuple[float | None, float | None]]


def _claims(tables: Sequence[KernelTable], op: str, text: str, bound: float, ratio: Ratio) -> list[Claim]:
    claims = []
    for table in tables:
        if table.op == op:
            claims.append(claim(f"{table.size}/{table.distribution}: {text}", *ratio(table), ">=", bound))
    if all(entry.measured is None for entry in claims):
        return [claim(text, None, None, ">=", bound)]
    return claims


def _over(*names: str) -> Ratio:
    """Best time of the fastest of some implementations, by the beginning of their names, over our best time."""

    def ratio(table: KernelTable) -> tuple[float | None, float | None]:
        ours = [row.ms for row in table.rows if row.name.startswith(OURS)][:1]
        theirs = [row.ms for row in table.rows if row.name.startswith(names) and row.ms is not None]
        return min(theirs, default=None), ours[0]

    return ratio


def _gather(table: KernelTable) -> tuple[float | None, float | None]:
    row = table.rows[0]
    if row.ms is None or row.roofline is None:
        return None, None
    return max(table.gather_bytes / (row.ms / 1e3) / 6e12, row.roofline / 0.75), 1.0
