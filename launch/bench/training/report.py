"""Report of the training benchmark: speed, memory, traffic and projections, as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clt.launch.bench.common.ceilings import Ceiling, ceilings_text
from clt.launch.bench.common.machine import MachineInfo, describe
from clt.launch.bench.common.report import Claim, JsonReport, claims_text, markdown_table
from clt.launch.bench.training.measure import TrafficRow, VariantRow
from clt.launch.bench.training.meters import PHASES
from clt.launch.bench.training.projection import DEVICES, LINKED, Projection
from clt.launch.bench.training.rank import DENSE
from clt.launch.tables import count_text, si_text
from clt.planning.job import MeshShape

#: Parts of the minimum time of each phase; that of AuxK is not divided among them.
_LEAST = {
    "encode": ("encode",),
    "decode": ("decode",),
    "backward": ("decoder_gradients", "encoder_gradients"),
    "optimizer": ("optimizer",),
}


@dataclass(frozen=True, kw_only=True)
class SizeTable:
    """Measurements at one size.

    Attributes:
        size: its name.
        words: its description.
        rows: variants, the default first and the default without AuxK second, then the dense baseline.
    """

    size: str
    words: str
    rows: tuple[VariantRow, ...]

    @property
    def plain(self) -> VariantRow:
        """The default without AuxK, which the dense baseline does not have."""
        return self.rows[1]

    @property
    def dense(self) -> VariantRow:
        """The dense baseline in the dtype of the default."""
        return next(row for row in self.rows if row.name in DENSE)


@dataclass(frozen=True, kw_only=True)
class TrainReport(JsonReport):
    """Outcome of the training benchmark.

    Attributes:
        machine: hardware, versions and date.
        setting: device, threads and steps, as text.
        ceilings: measured ceilings of the machine.
        link: bytes/s received per rank in an all-gather by gloo; None without a job of two ranks.
        tables: speed and memory.
        traffic: bytes between ranks.
        projections: jobs on many devices.
        claims: claims and whether they hold.
    """

    machine: MachineInfo
    setting: str
    ceilings: tuple[Ceiling, ...]
    link: float | None
    tables: tuple[SizeTable, ...]
    traffic: tuple[TrafficRow, ...]
    projections: tuple[Projection, ...]
    claims: tuple[Claim, ...]

    def to_text(self) -> str:
        """The report as Markdown tables."""
        link = (
            ()
            if self.link is None
            else (("all-gather by gloo, received by a rank", "-", f"{self.link / 1e9:.4g} GB/s"),)
        )
        parts = [claims_text(self.claims), self.setting, ceilings_text(self.ceilings, *link)]
        parts += [_size_text(table) for table in self.tables]
        parts.append(_traffic_text(self.traffic))
        if self.projections:
            device = self.machine.gpu or f"the CPU of this table ({self.machine.cpu})"
            parts.append(_projection_text(self.projections, device))
        return "\n\n".join([*parts, describe(self.machine)])


def mesh_text(mesh: MeshShape) -> str:
    """A mesh as text."""
    zero = f", ZeRO-{mesh.zero}" if mesh.zero else ""
    return f"data {mesh.data} x layer {mesh.layer} x column {mesh.column}{zero}"


def _size_text(table: SizeTable) -> str:
    head = (
        "",
        "tokens/s best",
        "median",
        "ms best",
        "of the roofline",
        "against dense, float32",
        "peak memory",
        "planned",
    )
    dense, rows = table.dense, []
    for row in table.rows:
        if row.absent is not None:
            rows.append((row.name, row.absent, *[""] * (len(head) - 2)))
            continue
        rows.append(
            (
                row.name,
                count_text(row.tokens / row.best_s),
                count_text(row.tokens / row.median_s),
                f"{row.best_s * 1e3:.1f}",
                "-" if row.least_s is None else f"{row.least_s / row.best_s:.2f}",
                "-" if dense.absent is not None else f"{dense.best_s / row.best_s:.2f}",
                _bytes(row.peak_bytes),
                _bytes(row.planned_bytes),
            )
        )
    return f"**{table.words}**\n\n{markdown_table(head, rows)}\n\n{_phases_text(table.rows)}"


def _phases_text(rows: Sequence[VariantRow]) -> str:
    lines = []
    for row in rows:
        if row.absent is not None or row.least is None:
            continue
        lines.append((row.name, *(f"{row.phases[phase] * 1e3:.1f}" for phase in PHASES), "-"))
        least = (sum(row.least[part] for part in _LEAST.get(phase, ())) for phase in PHASES)
        auxk = f"{row.least['auxk'] * 1e3:.1f}" if row.least["auxk"] else "-"
        lines.append(("least possible", *(f"{seconds * 1e3:.1f}" if seconds else "-" for seconds in least), auxk))
    return markdown_table(("ms of the best step", *PHASES, "AuxK, in all phases"), lines)


def _traffic_text(rows: Sequence[TrafficRow]) -> str:
    lines = []
    for row in rows:
        over = "-" if row.loopback is None or not row.counted else f"{row.loopback / row.counted:.3f}"
        lines.append(
            (
                str(row.mesh.world),
                mesh_text(row.mesh),
                f"{row.counted:,}",
                f"{row.formula:,.0f}",
                f"{row.auxk:,.0f}",
                "not read" if row.loopback is None else f"{row.loopback:,.0f}",
                over,
                _bytes(row.peak_bytes),
            )
        )
    head = (
        "ranks", "mesh", "counted", "formula", "of it AuxK", "loopback", "loopback / counted",
        "peak memory of a rank",
    )  # fmt: skip
    why = "" if all(row.loopback is not None for row in rows) else (
        " The loopback interface was not read: this system does not allow a network namespace (`unshare --net`)."
    )  # fmt: skip
    title = f"**Bytes that a rank sends in a step, size {rows[0].size}, gloo.**{why}"
    return f"{title}\n\n{markdown_table(head, lines)}"


def _projection_text(rows: Sequence[Projection], device: str) -> str:
    lines = []
    for row in rows:
        first = next(other for other in rows if other.job == row.job)
        share = row.tokens_per_s / row.mesh.world / (first.tokens_per_s / first.mesh.world)
        lines.append(
            (
                f"{row.job} ({row.pieces})",
                str(row.mesh.world),
                mesh_text(row.mesh),
                f"{row.tokens:,}",
                *(_seconds(seconds) for seconds in row.seconds.values()),
                _seconds(row.links_s),
                count_text(row.tokens_per_s),
                f"{share:.2f}",
                _bytes(row.model_bytes + row.data_bytes),
                _bytes(row.memory_bytes),
            )
        )
    head = (
        "job (pieces of)", "devices", "mesh", "tokens", *rows[0].seconds, "links", "tokens/s",
        f"per device, of {DEVICES[0]}'s", "received", "memory",
    )  # fmt: skip
    title = (
        f"**Projection to {DEVICES[0]}-{DEVICES[-1]} devices.** Measured: the pieces of a step, on {device}; each is "
        f"scaled by counted work. Counted: bytes received and memory. Assumed: {LINKED.node_link / 1e9:.0f} GB/s "
        f"within {LINKED.per_node} devices, {LINKED.network / 1e9:.0f} GB/s beyond, no overlap, the mesh that "
        f"`clt plan` finds fastest on {LINKED.name}, a store that delivers."
    )
    return f"{title}\n\n{markdown_table(head, lines)}"


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _bytes(value: float | None) -> str:
    return "-" if value is None else si_text(value, "B")
