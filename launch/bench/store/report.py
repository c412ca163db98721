"""Report of the store benchmark: throughput tables, claims and tokens/s for known models, as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clt.launch.bench.common.machine import MachineInfo, describe
from clt.launch.bench.common.report import Claim, JsonReport, claims_text, markdown_table
from clt.launch.bench.common.timing import Timing
from clt.launch.tables import count_text

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class ThroughputRow:
    """One reader or writer in a table.

    Attributes:
        name: of the format or library.
        checksums: whether checksums are written and verified.
        wall_s: seconds of each round; empty if it was not measured.
        cpu_s: CPU seconds of each round.
        gb_per_s: 1e9 bytes of activations per second in the best round.
        median_gb_per_s: the same of the median round.
        cpu_s_per_gb: least CPU seconds per 1e9 bytes of a round.
        median_cpu_s_per_gb: the same of the median round.
        absent: reason why it was not measured, or None.
    """

    name: str
    checksums: bool
    wall_s: tuple[float, ...] = ()
    cpu_s: tuple[float, ...] = ()
    gb_per_s: float | None = None
    median_gb_per_s: float | None = None
    cpu_s_per_gb: float | None = None
    median_cpu_s_per_gb: float | None = None
    absent: str | None = None


@dataclass(frozen=True, kw_only=True)
class ThroughputTable:
    """The same work by several readers or writers in the same rounds.

    Attributes:
        key: short name used in claims.
        title: description of the work.
        nbytes: bytes of activations moved per round.
        bytes_per_token: bytes of one token in them.
        rounds: rounds.
        rows: readers or writers, ours first.
    """

    key: str
    title: str
    nbytes: int
    bytes_per_token: int
    rounds: int
    rows: tuple[ThroughputRow, ...]

    def row(self, name: str) -> ThroughputRow | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, kw_only=True)
class ModelSpeed:
    """Tokens per second for a model whose MLP inputs and outputs are all stored as bfloat16.

    Attributes:
        model: its name.
        bytes_per_token: 2 sites x layers x width x 2 bytes.
        tokens_per_s: by table key, tokens per second at the best measured GB/s of the store, the first row.
    """

    model: str
    bytes_per_token: int
    tokens_per_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StoreBenchReport(JsonReport):
    """Outcome of the store benchmark.

    Attributes:
        machine: hardware, versions and date.
        tables: measurements.
        claims: claims and whether they hold.
        models: tokens per second for known models.
    """

    machine: MachineInfo
    tables: tuple[ThroughputTable, ...]
    claims: tuple[Claim, ...]
    models: tuple[ModelSpeed, ...]

    def to_text(self) -> str:
        """The report as Markdown tables."""
        parts = [claims_text(self.claims)]
        parts += [_table(table) for table in self.tables]
        parts.append(_models(self.models))
        return "\n\n".join([*parts, describe(self.machine)])


def measured_row(name: str, checksums: bool, timing: Timing, nbytes: int) -> ThroughputRow:
    """A row from its rounds.

    Args:
        name: of the format or library.
        checksums: whether checksums are written and verified.
        timing: the rounds.
        nbytes: bytes of activations moved per round.
    """
    return ThroughputRow(
        name=name,
        checksums=checksums,
        wall_s=timing.wall_s,
        cpu_s=timing.cpu_s,
        gb_per_s=nbytes / GB / timing.best_s,
        median_gb_per_s=nbytes / GB / timing.median_s,
        cpu_s_per_gb=timing.best_cpu_s / (nbytes / GB),
        median_cpu_s_per_gb=timing.median_cpu_s / (nbytes / GB),
    )


def _table(table: ThroughputTable) -> str:
    rows = []
    for row in table.rows:
        if row.absent is not None:
            rows.append((row.name, "", row.absent, "", "", "", ""))
            continue
        assert row.gb_per_s is not None
        rows.append(
            (
                row.name,
                "yes" if row.checksums else "no",
                f"{row.gb_per_s:.2f}",
                f"{row.median_gb_per_s:.2f}",
                f"{row.cpu_s_per_gb:.3f}",
                f"{row.median_cpu_s_per_gb:.3f}",
                count_text(row.gb_per_s * GB / table.bytes_per_token),
            )
        )
    head = ("", "checksums", "GB/s best", "median", "CPU s/GB best", "median", "tokens/s")
    amount = (
        f"{table.nbytes / 2**20:.0f} MiB a round, {table.rounds} rounds, {table.bytes_per_token:,} bytes per token."
    )
    return f"**{table.title}** {amount}\n\n{markdown_table(head, rows)}"


def _models(models: Sequence[ModelSpeed]) -> str:
    keys = list(models[0].tokens_per_s)
    rows = [
        (entry.model, f"{entry.bytes_per_token:,}", *(count_text(entry.tokens_per_s[key]) for key in keys))
        for entry in models
    ]
    return f"**Tokens per second of this machine**\n\n{markdown_table(('model', 'bytes per token', *keys), rows)}"
