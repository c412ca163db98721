"""Parts of a benchmark's report: claims about ratios, Markdown tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class JsonReport:
    """A dataclass that a benchmark writes as JSON."""

    def to_json(self) -> str:
        """The report as JSON, every measurement included."""
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of this project about a ratio, and its measurement.

    Attributes:
        text: the claim.
        measured: the ratio; None if one side was not measured.
        relation: required relation of ratio and bound.
        bound: the bound.
        ok: whether the claim holds; None if the ratio is not known.
    """

    text: str
    measured: float | None
    relation: Literal[">=", "<="]
    bound: float
    ok: bool | None


def claim(text: str, ours: float | None, theirs: float | None, relation: Literal[">=", "<="], bound: float) -> Claim:
    """Compares the ratio of two measurements with a bound.

    Args:
        text: the claim.
        ours: numerator of the ratio.
        theirs: denominator.
        relation: required relation of ratio and bound.
        bound: the bound.
    """
    ratio = None if ours is None or theirs is None else ours / theirs
    ok = None if ratio is None else ratio >= bound if relation == ">=" else ratio <= bound
    return Claim(text=text, measured=ratio, relation=relation, bound=bound, ok=ok)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def claims_text(claims: Sequence[Claim]) -> str:
    """Claims as a Markdown table."""
    rows = []
    for entry in claims:
        measured = "not measured" if entry.measured is None else f"{entry.measured:.2f}"
        verdict = {True: "yes", False: "**no**", None: "-"}[entry.ok]
        rows.append((entry.text, f"{entry.relation} {entry.bound:g}", measured, verdict))
    return markdown_table(("claim", "promised", "measured", "holds"), rows)
