"""Progress and reports that a training job writes beside its weights, and what they say of the transcoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from clt.errors import CheckpointError
from clt.records import TrainingFacts

#: Steps, tokens and place in the store, in each checkpoint.
PROGRESS_FILE = "progress.json"
#: A line of JSON for each report, in the output folder.
METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports of a `metrics.jsonl`; a last line that a killed run left half written is dropped.

    Reports of training have the keys of `TrainingMetrics.scalars`, those of evaluations the tags of `Evaluation`.

    Raises:
        CheckpointError: another line is not a report.
    """
    reports = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            report = json.loads(line)
            report["step"]
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(f"{path}: line {number} is not a report of metrics; move the file away") from None
        reports.append(report)
    return reports


def training_facts(checkpoint: Path) -> TrainingFacts:
    """Steps and tokens of a checkpoint, with the newest FVU, L0 and dead fraction: of held-out tokens where reported.

    Raises:
        CheckpointError: the progress or the reports cannot be read.
    """
    path = checkpoint / PROGRESS_FILE
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        steps, tokens = int(progress["step"]), int(progress["tokens"])
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path}: keys 'step' and 'tokens' are missing; use another checkpoint") from None
    facts = TrainingFacts(steps=steps, tokens=tokens)
    metrics = checkpoint.parent / METRICS_FILE
    reports = read_metrics(metrics) if metrics.exists() else []
    for prefix in ("heldout/", ""):
        measured = [report for report in reports if report["step"] <= steps and f"{prefix}fvu/mean" in report]
        if measured:
            fvu, l0, dead = (measured[-1].get(f"{prefix}{key}/mean") for key in ("fvu", "l0", "dead_fraction"))
            return replace(facts, fvu=fvu, l0=l0, dead_fraction=dead, held_out=bool(prefix))
    return facts
