"""What a benchmark reports, as JSON and as text: tables of measured rows, claims with their verdicts, the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from clt.launch.bench.common.machine import Machine, describe
from clt.launch.bench.common.timing import Timing

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rival in a table.

    Attributes:
        name: who.
        checksums: whether checksums are written and verified.
        wall_s: seconds of each round; empty if it was not measured.
        cpu_s: CPU seconds of each round.
        gb_per_s: of the best round, 1e9 bytes of activations per second.
        median_gb_per_s: of the median round.
        cpu_s_per_gb: CPU seconds per 1e9 bytes, of the most frugal round.
        median_cpu_s_per_gb: the same of the median round.
        absent: why it was not measured, else None.
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
class Table:
    """Rivals that did the same work in the same rounds.

    Attributes:
        key: short name, which claims use.
        title: what was done.
        nbytes: bytes of activations that every round moved.
        bytes_per_token: bytes of one token in them.
        rounds: rounds.
        rows: the rivals.
    """

    key: str
    title: str
    nbytes: int
    bytes_per_token: int
    rounds: int
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something this project promises about a ratio, and what was measured.

    Attributes:
        text: the promise.
        measured: the ratio; None if one side was not measured.
        relation: how it must compare with the bound.
        bound: the bound.
        ok: whether the promise holds; None if the ratio is not known.
    """

    text: str
    measured: float | None
    relation: Literal[">=", "<="]
    bound: float
    ok: bool | None


@dataclass(frozen=True, kw_only=True)
class ModelSpeed:
    """What the measured speeds mean for a model, all of whose MLP inputs and outputs are stored as bfloat16.

    Attributes:
        model: its name.
        bytes_per_token: 2 sites x layers x width x 2 bytes.
        tokens_per_s: by table key, tokens per second at the best measured GB/s of ours, the first row.
    """

    model: str
    bytes_per_token: int
    tokens_per_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Outcome of a benchmark.

    Attributes:
        machine: where and when.
        tables: what was measured.
        claims: what was promised.
        models: what it means for models; empty where it means nothing.
    """

    machine: Machine
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]
    models: tuple[ModelSpeed, ...] = ()

    def to_json(self) -> str:
        """The report as JSON, every round of every row included."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_text(self) -> str:
        """The report as Markdown tables."""
        parts = [claims_text(self.claims)]
        parts += [_table(table) for table in self.tables]
        if self.models:
            parts.append(_models(self.models))
        return "\n\n".join([*parts, describe(self.machine)])


def measured_row(name: str, checksums: bool, timing: Timing, nbytes: int) -> Row:
    """A row from its rounds.

    Args:
        name: who.
        checksums: whether checksums are written and verified.
        timing: the rounds.
        nbytes: bytes of activations that every round moved.
    """
    return Row(
        name=name,
        checksums=checksums,
        wall_s=timing.wall_s,
        cpu_s=timing.cpu_s,
        gb_per_s=nbytes / GB / timing.best_s,
        median_gb_per_s=nbytes / GB / timing.median_s,
        cpu_s_per_gb=timing.best_cpu_s / (nbytes / GB),
        median_cpu_s_per_gb=timing.median_cpu_s / (nbytes / GB),
    )


def claim(text: str, ours: float | None, theirs: float | None, relation: Literal[">=", "<="], bound: float) -> Claim:
    """Judges the ratio of two measurements; `ours / theirs` must be on the right side of the bound."""
    if ours is None or theirs is None:
        return Claim(text=text, measured=None, relation=relation, bound=bound, ok=None)
    ratio = ours / theirs
    return Claim(
        text=text,
        measured=ratio,
        relation=relation,
        bound=bound,
        ok=ratio >= bound if relation == ">=" else ratio <= bound,
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def claims_text(claims: Sequence[Claim]) -> str:
    """Promises with their verdicts as a Markdown table."""
    rows = []
    for entry in claims:
        measured = "not measured" if entry.measured is None else f"{entry.measured:.2f}"
        verdict = {True: "yes", False: "**no**", None: "-"}[entry.ok]
        rows.append((entry.text, f"{entry.relation} {entry.bound:g}", measured, verdict))
    return markdown_table(("claim", "promised", "measured", "holds"), rows)


def _table(table: Table) -> str:
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
                _count(row.gb_per_s * GB / table.bytes_per_token),
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
        (entry.model, f"{entry.bytes_per_token:,}", *(_count(entry.tokens_per_s[key]) for key in keys))
        for entry in models
    ]
    return f"**Tokens per second of this machine**\n\n{markdown_table(('model', 'bytes per token', *keys), rows)}"


def _count(value: float) -> str:
    """Three significant digits, with k or M."""
    size, letter = next(((size, letter) for size, letter in ((1e6, " M"), (1e3, " k")) if value >= size), (1.0, ""))
    digits = max(0, 2 - math.floor(math.log10(value / size)))
    return f"{value / size:.{digits}f}{letter}"
