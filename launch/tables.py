"""Aligned text tables, and numbers, sizes and durations as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clt.capture.capacity import GIB


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as aligned text; the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size_text(n_bytes: float) -> str:
    """Bytes with a binary unit."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes:.0f} bytes"


def si_text(value: float, unit: str) -> str:
    """A number with four digits and a decimal prefix, as vendors give memory and bandwidth."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value * 1e6:.4g} u{unit}" if value else f"0 {unit}"


def count_text(value: float) -> str:
    """A number with three significant digits, with k, M or G."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{three_digits(value / unit)}{letter}"
    return three_digits(value)


def duration_text(seconds: float) -> str:
    """A duration in seconds, minutes, hours or days, by its size."""
    for unit, name in ((172_800, "days"), (7200, "hours"), (120, "minutes")):
        if seconds >= unit:
            return f"{seconds / {'days': 86_400, 'hours': 3600, 'minutes': 60}[name]:.1f} {name}"
    return f"{seconds:.0f} seconds"


def three_digits(value: float) -> str:
    """A number with three significant digits."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 6)}f}"
