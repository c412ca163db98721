"""Text output of the `clt store` commands."""

from __future__ import annotations

from collections.abc import Sequence

from clt.capture.capacity import GB, NVME, PCIE, Capacity, StoreSize
from clt.capture.upkeep.export_pt import ExportReport
from clt.capture.upkeep.repair import GcReport, RepairReport
from clt.capture.upkeep.store_stats import ClassStats
from clt.capture.upkeep.store_status import StoreStatus
from clt.capture.upkeep.verify_store import VerifyReport
from clt.launch.tables import count_text, duration_text, size_text, table, three_digits

_MOST_PROBLEMS = 20


def capacity_text(report: Capacity) -> str:
    """Output of `clt store plan`."""
    blocks = [_size_lines(report.size, report.output), _space_lines(report)]
    if report.speeds is not None:
        blocks.append(_capture_lines(report))
    blocks.append(_reading_lines(report))
    blocks.append(_model_table(report))
    return "\n\n".join(blocks)


def stats_text(rows: Sequence[ClassStats]) -> str:
    """Output of `clt store stats`."""
    head = ("site", "tokens of class", "tokens", "mean norm", "rms", "absmax", "fvu", "fvu p99")
    body = [
        (
            row.site if i == 0 or rows[i - 1].site != row.site else "",
            row.token_class,
            f"{row.tokens:,}",
            f"{row.mean_norm:.4g}",
            f"{row.rms:.4g}",
            f"{row.absmax:.4g}",
            "-" if row.fvu is None else f"{row.fvu:.1e}",
            "-" if row.fvu_p99 is None else f"{row.fvu_p99:.1e}",
        )
        for i, row in enumerate(rows)
    ]
    return table([head, *body], left=2)


def status_text(report: StoreStatus) -> str:
    """Output of `clt store status`."""
    share = f"{report.committed:,} of {report.units:,}"
    rows = [
        ("store", report.location),
        ("state", f"complete, id {report.store_id}" if report.complete else "unfinished"),
        ("units", f"{share} committed, {len(report.leases):,} being captured, {report.pending:,} pending"),
        ("tokens", f"{report.tokens:,} of {report.planned_tokens:,}"),
        ("size", size_text(report.bytes)),
    ]
    for lease in report.leases:
        rows.append((f"unit {lease.unit}", f"captured by process {lease.process} on {lease.host.split()[0]}"))
    if report.garbage_files:
        garbage = f"{report.garbage_files:,} files, {size_text(report.garbage_bytes)}"
        rows.append(("garbage", f"{garbage}; 'clt store gc' deletes them when no capture is running"))
    if report.quarantine_bytes:
        moved = f"{size_text(report.quarantine_bytes)} of damaged files moved by a repair"
        rows.append(("quarantine", f"{moved}; 'clt store gc --quarantine' deletes them"))
    return table(rows, left=2)


def verified_text(report: VerifyReport) -> str:
    """Output of `clt store verify` for a store without problems."""
    state = f"store {report.store_id}" if report.complete else f"unfinished store, {report.committed} units committed"
    looked = f"{report.checked} of {report.units} units, {report.files:,} files, {size_text(report.bytes)}"
    return (
        f"{report.location}: {state}\nno problems at level {report.level}: {looked} compared in {report.seconds:.1f} s"
    )


def problems_text(report: VerifyReport) -> str:
    """Output of `clt store verify` for a damaged store, one line per problem."""
    lines = [problem.message for problem in report.problems[:_MOST_PROBLEMS]]
    if len(report.problems) > _MOST_PROBLEMS:
        lines.append(f"... and {len(report.problems) - _MOST_PROBLEMS:,} more; --json FILE lists all")
    return "\n".join(lines)


def repair_text(report: RepairReport) -> str:
    """Output of `clt store repair`."""
    if not report.problems and report.previous_id == report.store_id:
        return f"{report.location}: nothing to repair"
    folders = sorted({"/".join(to.split("/")[:2]) for _, to in report.moved})
    lines = [f"moved {len(report.moved):,} files to {folder}" for folder in folders]
    lines += [f"rebuilt: {key}" for key in report.rebuilt]
    if report.store_id is not None:
        same = "as before" if report.store_id == report.previous_id else f"before {report.previous_id}"
        return "\n".join([*lines, f"{report.location}: complete, id {report.store_id} ({same})"])
    again = f", units to capture again: {', '.join(map(str, report.recapture))}" if report.recapture else ""
    return "\n".join([*lines, f"{report.location}: unfinished{again}; run the same capture"])


def gc_text(report: GcReport) -> str:
    """Output of `clt store gc`."""
    lines = [f"{entry.key}  {size_text(entry.bytes)}" for entry in report.files if report.dry_run]
    verb = "would be deleted" if report.dry_run else "deleted"
    return "\n".join([*lines, f"{report.location}: {len(report.files):,} files, {size_text(report.bytes)} {verb}"])


def export_text(report: ExportReport, out: str) -> str:
    """Output of `clt store export-pt`."""
    files = f"{report.files:,} files ({report.written:,} of them new)"
    return f"{out}: {report.samples:,} samples in {files}, {size_text(report.bytes)}"


def _size_lines(size: StoreSize, output: str) -> str:
    words = f"{size.shortest} to {size.longest} tokens each" if size.shortest < size.longest else f"{size.longest} each"
    packed = "" if size.compression == "none" else f", {size.compression}"
    rows = [
        ("output", output),
        ("samples", f"{size.samples:,}, {words}"),
        ("tokens", f"{size.tokens:,}"),
        ("units", f"{size.units:,} of up to {size.rows_per_unit:,} tokens, read {size.chunk_tokens:,} at a time"),
        ("values", f"{size.sites} sites, {size.store_dtype}{packed}"),
        ("bytes per token", f"{size.bytes_per_token:,} of activations, {size.total_bytes / size.tokens:,.0f} in all"),
        ("memory of a unit", size_text(size.memory_bytes)),
        ("total size", f"{size_text(size.total_bytes)}{', before compression' if packed else ''}"),
    ]
    return table([(key, value) for key, value in rows], left=2)


def _space_lines(report: Capacity) -> str:
    rows = []
    if report.committed_tokens:
        done = f"{report.committed_tokens:,} tokens, {size_text(report.needed_bytes)} left"
        rows.append(("already committed", done))
    if report.free_bytes is None:
        rows.append(("free space", "unknown (object store)"))
    else:
        rows.append(("free space", size_text(report.free_bytes)))
    text = table(rows, left=2)
    if not report.fits:
        assert report.free_bytes is not None
        missing = size_text(report.needed_bytes - report.free_bytes)
        text += f"\nwarning: {missing} too little disk space; free some, change output, or store int8 or fewer samples"
    return text


def _capture_lines(report: Capacity) -> str:
    speeds, size = report.speeds, report.size
    assert speeds is not None and report.capture_tokens_per_s is not None and report.capture_s is not None
    cost = size.bytes_per_token
    measured = [
        ("model, activations recorded", speeds.model * cost),
        ("commit: moments, checksums, fsync", speeds.commit * cost),
        ("write and fsync alone", speeds.write),
        ("read, this disk, one thread", speeds.read),
        ("read, page cache, one thread", speeds.read_cached),
    ]
    rows = [(name, count_text(speed / cost), f"{speed / GB:.3f}") for name, speed in measured]
    lines = [table([("measured here", "tokens/s", "GB/s"), *rows])]
    if size.compression != "none":
        stored = speeds.stored_fraction
        lines.append(f"compression keeps {stored:.0%}: about {size_text(size.total_bytes * stored)} in all")
    lines.append(
        f"capture: {count_text(report.capture_tokens_per_s)} tokens/s with one worker, about "
        f"{duration_text(report.capture_s)}; {report.limited_by} takes most of it"
    )
    return "\n".join(lines)


def _reading_lines(report: Capacity) -> str:
    rows = [("training on all sites, limited by", "GB/s", "tokens/s")]
    for item in report.readings:
        rows.append((item.source, three_digits(item.bytes_per_s / GB), count_text(item.tokens_per_s)))
    return table(rows)


def _model_table(report: Capacity) -> str:
    head = (
        "model",
        "bytes/token",
        "GB/s at 1 M tokens/s",
        f"at {NVME / GB:g} GB/s",
        f"at {PCIE / GB:g} GB/s",
        "100 M tokens",
    )
    rows = [
        (
            model.model,
            f"{model.bytes_per_token:,}",
            three_digits(model.bytes_per_s / GB),
            f"{count_text(model.nvme_tokens_per_s)}/s",
            f"{count_text(model.pcie_tokens_per_s)}/s",
            f"{three_digits(model.terabytes)} TB",
        )
        for model in report.models
    ]
    return table([head, *rows])
