"""Report of `clt bench baselines`, as JSON and as text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from benchmarks.baselines.measure import SeedRun, Setting
from clt.launch.bench.common.machine import MachineInfo, describe
from clt.launch.bench.common.report import Claim, claim, claims_text, markdown_table

How = Literal["published", "published, also best", "tuned", "configured", "configured, also best"]

#: Name of this project's training in tables.
OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Result of one setting of an algorithm on the validation tokens.

    Attributes:
        name: of the algorithm.
        setting: the setting.
        fvu: mean over layers.
        dead_fraction: mean over layers.
    """

    name: str
    setting: Setting
    fvu: float
    dead_fraction: float


@dataclass(frozen=True, kw_only=True)
class AlgorithmRow:
    """Results of an algorithm with one setting.

    Attributes:
        name: of the algorithm.
        how: origin of the setting: its authors, the trials, or our configuration.
        setting: the setting.
        runs: one per seed.
    """

    name: str
    how: How
    setting: Setting
    runs: tuple[SeedRun, ...]

    @property
    def fvu(self) -> float:
        """Mean over layers and seeds."""
        return statistics.fmean(run.heldout.mean_fvu for run in self.runs)

    @property
    def dead_fraction(self) -> float:
        """Mean over layers and seeds."""
        return statistics.fmean(run.heldout.mean_dead for run in self.runs)

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Of the best window of all runs, and of the median one."""
        speeds = [speed for run in self.runs for speed in run.tokens_per_s]
        return max(speeds), statistics.median(speeds)

    def by_layer(self, measure: Literal["fvu", "l0", "dead_fraction"]) -> list[float]:
        """Mean over seeds of a measure, by layer."""
        seeds = [getattr(run.heldout, measure) for run in self.runs]
        return [statistics.fmean(layer) for layer in zip(*seeds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class BaselineReport:
    """Outcome of the comparison.

    Attributes:
        machine: hardware, versions and date.
        setting: sizes, as text.
        choices: descriptions of the algorithms.
        trials: all trials.
        rows: algorithms, ours first.
        features: features of a transcoder over all layers.
    """

    machine: MachineInfo
    setting: str
    choices: tuple[str, ...]
    trials: tuple[Trial, ...]
    rows: tuple[AlgorithmRow, ...]
    features: int

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Claims: lower FVU and no more dead features than every other algorithm, ours with its best setting."""
        ours = [row for row in self.rows if row.name == OURS][-1]
        others = [row for row in self.rows if row.name != OURS]
        claims = []
        for row in others:
            against = f"ours / {row.name}, {row.how}"
            claims.append(claim(f"held-out FVU, {against}", ours.fvu, row.fvu, "<=", 1))
        for row in others:
            against = f"ours / {row.name}, {row.how}"
            mine, theirs = (1 + each.dead_fraction * self.features for each in (ours, row))
            claims.append(claim(f"1 + dead features, {against}", mine, theirs, "<=", 1))
        return tuple(claims)

    def to_json(self) -> str:
        """The report as JSON, every run and window included."""
        return json.dumps(asdict(self) | {"claims": [asdict(entry) for entry in self.claims]}, indent=1) + "\n"

    def to_text(self) -> str:
        """The report as Markdown."""
        parts = [
            claims_text(self.claims),
            self.setting,
            _results(self.rows),
            _layers(self.rows),
            _trials(self.trials),
            "\n".join(f"* {text}." for text in self.choices),
            describe(self.machine),
        ]
        return "\n\n".join(parts)


def _results(rows: Sequence[AlgorithmRow]) -> str:
    head = ("", "setting", "FVU", "lowest, highest seed", "L0, all layers", "dead", "tokens/s best", "median")
    cells = []
    for row in rows:
        fvus = [run.heldout.mean_fvu for run in row.runs]
        best, median = row.tokens_per_s
        cells.append(
            (
                row.name,
                f"{row.how}: {row.setting}",
                f"{row.fvu:.5f}",
                f"{min(fvus):.5f}, {max(fvus):.5f}",
                f"{statistics.fmean(run.heldout.total_l0 for run in row.runs):.2f}",
                f"{row.dead_fraction:.4f}",
                f"{best:,.0f}",
                f"{median:,.0f}",
            )
        )
    return f"**Held-out tokens, final weights; means over seeds**\n\n{markdown_table(head, cells)}"


def _layers(rows: Sequence[AlgorithmRow]) -> str:
    cells = [
        (
            f"{row.name}, {row.how}",
            ", ".join(f"{value:.4f}" for value in row.by_layer("fvu")),
            ", ".join(f"{value:.1f}" for value in row.by_layer("l0")),
            ", ".join(f"{value:.3f}" for value in row.by_layer("dead_fraction")),
        )
        for row in rows
    ]
    return f"**By layer**\n\n{markdown_table(('', 'FVU', 'L0', 'dead'), cells)}"


def _trials(trials: Sequence[Trial]) -> str:
    cells = [(trial.name, str(trial.setting), f"{trial.fvu:.5f}", f"{trial.dead_fraction:.4f}") for trial in trials]
    table = markdown_table(("", "setting", "FVU", "dead"), cells)
    return f"**Trials: one run each, other seed, the quarter of the held-out tokens that is not reported**\n\n{table}"
