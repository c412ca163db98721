"""`clt store`: size estimates, checks, maintenance, transfer and export of activation stores.

    clt store plan configs/capture/toy.yaml
    clt store status runs/toy/store
    clt store verify runs/toy/store --level chunk
    clt store export-pt runs/toy/store runs/toy/pt

Each command calls one function, which scripts can import. A user error, or a store that `verify` finds damaged, is
one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clt.errors import ConfigError, StoreError
from clt.launch.commands.words import TAKES_WORDS, Words
from clt.launch.script import read_words, report_and_exit, run_and_exit, write_text

if TYPE_CHECKING:
    from clt.capture.upkeep.verify_store import VerifyReport

store_app = typer.Typer(
    no_args_is_help=True, help="Size estimates, checks, maintenance, transfer and export of activation stores."
)

Store = Annotated[str, typer.Argument(metavar="PATH", help="Folder or URL of the store.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")]
LevelOption = Annotated[
    Literal["index", "chunk", "full"],
    typer.Option(help="index: sizes, small files, shard indexes; chunk: every byte; full: also the values."),
]
Jobs = Annotated[int, typer.Option(min=1, help="Number of threads.")]
Revision = Annotated[str | None, typer.Option(help="Branch; for pull also a tag or a commit. [default: main]")]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="Dataset repository, OWNER/NAME.")]

_JOBS = min(8, os.cpu_count() or 1)
#: Files that are not transferred: local ones, and the dataset card on the hub.
_NOT_TRANSFERRED = ("units/leases/*", "quarantine/*", "*.partial", "README.md")


def _report(file: Path | None, make: Callable[[], Any], text: Callable[[Any], str]) -> None:
    """Makes a report (a dataclass or several), writes it as JSON if asked to and prints it as text."""

    def work() -> str:
        report = make()
        tree = [asdict(row) for row in report] if isinstance(report, tuple) else asdict(report)
        write_text(file, json.dumps(tree, indent=1))
        return text(report)

    run_and_exit(work)


@store_app.command(**TAKES_WORDS)
def plan(
    words: Words = None,
    measure: Annotated[bool, typer.Option(help="Time two batches of the model and the disk.")] = True,
    file: JsonFile = None,
) -> None:
    """Estimates size and duration of a capture, and the reading speed.

    CONFIG and its keys are those of `clt capture`.
    """
    from clt.capture.capacity import Capacity, capacity
    from clt.capture.planning import CaptureConfig, plan_capture
    from clt.config import load_config
    from clt.launch.commands.store_text import capacity_text

    def make() -> Capacity:
        job = load_config(CaptureConfig, *read_words(words or ()))
        return capacity(plan_capture(job, longest_answers=True), job.output, measure=measure)

    _report(file, make, capacity_text)


@store_app.command()
def verify(
    path: Store,
    level: LevelOption = "chunk",
    sample: Annotated[float, typer.Option(help="Fraction of the units to read.")] = 1.0,
    jobs: Jobs = _JOBS,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Repair a damaged store, see 'repair'.")] = False,
    file: JsonFile = None,
) -> None:
    """Compares a store with its checksums and records; exit code 2 if there is a problem."""
    from clt.capture.upkeep.repair import repair_store
    from clt.capture.upkeep.verify_store import verify_store
    from clt.launch.commands.store_text import problems_text, repair_text, verified_text

    def work() -> str:
        report = verify_store(path, level, sample=sample, jobs=jobs)
        write_text(file, report.to_json())
        if report.problems:
            print(problems_text(report))
            if not quarantine:
                raise StoreError(f"{path}: {_problems(report)}; run 'clt store repair {path}'")
            print(repair_text(repair_store(path, level=level, jobs=jobs)))
            raise StoreError(f"{path}: {_problems(report)}, moved to quarantine; see the lines above")
        return verified_text(report)

    run_and_exit(work)


@store_app.command()
def repair(
    path: Store,
    level: LevelOption = "chunk",
    jobs: Jobs = _JOBS,
    file: JsonFile = None,
) -> None:
    """Moves damaged files to the folder quarantine/ and rebuilds the files that follow from the rest."""
    from clt.capture.upkeep.repair import repair_store
    from clt.launch.commands.store_text import repair_text

    _report(file, lambda: repair_store(path, level=level, jobs=jobs), repair_text)


@store_app.command()
def status(path: Store, file: JsonFile = None) -> None:
    """Prints the progress of a capture and the workers that run it."""
    from clt.capture.upkeep.store_status import store_status
    from clt.launch.commands.store_text import status_text

    _report(file, lambda: store_status(path), status_text)


@store_app.command()
def gc(
    path: Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the files, delete nothing.")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Also delete the files in quarantine.")] = False,
    file: JsonFile = None,
) -> None:
    """Deletes partial files, files of uncommitted units, and leases."""
    from clt.capture.upkeep.repair import collect_garbage
    from clt.launch.commands.store_text import gc_text

    _report(file, lambda: collect_garbage(path, dry_run=dry_run, quarantine=quarantine), gc_text)


@store_app.command()
def stats(path: Store, file: JsonFile = None) -> None:
    """Prints norms, rms and quantisation error of every site by token class."""
    from clt.capture.reading.open_store import open_store
    from clt.capture.upkeep.store_stats import store_stats
    from clt.launch.commands.store_text import stats_text

    _report(file, lambda: store_stats(open_store(path)), stats_text)


@store_app.command()
def bench(
    folder: Annotated[Path, typer.Option(help="Folder on the disk to measure.")] = Path(),
    size: Annotated[int | None, typer.Option(min=1, metavar="MIB", help="Amount of activations in MiB.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds, of which the best is reported.")] = None,
    file: JsonFile = None,
) -> None:
    """Compares the speed of reader, writer and loader with other formats for activations."""
    from clt.launch.bench.store.run import StoreBenchSettings, bench_store

    given = {"size_mib": size, "rounds": rounds}
    settings = StoreBenchSettings(folder=folder, **{k: v for k, v in given.items() if v is not None})
    report_and_exit(file, lambda: bench_store(settings))


@store_app.command()
def push(
    path: Store,
    repo: Repository,
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    revision: Revision = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Uploads a complete store to a dataset repository of the Hugging Face hub; prints the commit."""
    from clt.capture.capacity import local_folder
    from clt.capture.reading.open_store import open_store
    from clt.capture.store.schema import MANIFEST
    from clt.capture.upkeep.verify_store import verify_store
    from clt.hub.transfer import push_folder

    def work() -> str:
        folder = local_folder(path)
        if folder is None:
            raise StoreError(f"{path}: only a folder can be pushed; copy the store to one, e.g. with 'rclone copy'")
        store = open_store(folder)
        _refuse_damaged(verify_store(folder, "index"))
        summary = message or f"Activation store {store.id[:12]}: {store.num_tokens:,} tokens of {store.model.name}"
        commit = push_folder(
            folder,
            repo,
            private=private,
            revision=revision,
            last=(MANIFEST,),
            ignore=_NOT_TRANSFERRED,
            message=summary,
        )
        return f"{repo}: store {store.id} is commit {commit}"

    run_and_exit(work)


@store_app.command()
def pull(
    repo: Repository,
    path: Annotated[Path, typer.Argument(help="New folder, or one with an unfinished pull.")],
    revision: Revision = None,
) -> None:
    """Downloads a store from a dataset repository of the Hugging Face hub and verifies every byte."""
    from clt.capture.store.schema import MANIFEST
    from clt.capture.upkeep.verify_store import verify_store
    from clt.hub.transfer import pull_folder
    from clt.launch.commands.store_text import verified_text

    def work() -> str:
        pull_folder(repo, path, revision=revision, last=(MANIFEST,), ignore=_NOT_TRANSFERRED)
        report = verify_store(path, "chunk", jobs=_JOBS)
        _refuse_damaged(report)
        return verified_text(report)

    run_and_exit(work)


@store_app.command("export-pt")
def export_pt(
    path: Store,
    out: Annotated[str, typer.Argument(help="New folder, or one with the same export unfinished.")],
    layout: Annotated[
        Literal["activations", "samples"],
        typer.Option(help="activations: L0/batch_0_x.pt and _y.pt; samples: sample_0000.pt, pooled over tokens."),
    ] = "activations",
    n_targets: Annotated[
        int | None, typer.Option(help="activations: target layers per source layer. [default: 16]")
    ] = None,
    batch_samples: Annotated[int | None, typer.Option(help="activations: samples per file. [default: 1]")] = None,
    transcoder: Annotated[
        str | None, typer.Option("--clt", help="samples: pool the features of this transcoder, a folder or hub name.")
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None, typer.Option(help="Type of the tensors. [default: as stored]")
    ] = None,
    read_site: Annotated[str | None, typer.Option(help="Site that encoders read, if the store has several.")] = None,
) -> None:
    """Writes a store as .pt files in a layout of the vlm-clt-training format."""
    from clt.capture.reading.open_store import open_store
    from clt.capture.upkeep.export_pt import export_activations, export_samples
    from clt.launch.commands.store_text import export_text

    def work() -> str:
        numbers = {"n_targets": n_targets, "batch_samples": batch_samples}
        given = {name: value for name, value in numbers.items() if value is not None}
        if layout == "activations":
            if transcoder is not None:
                raise ConfigError("--clt: needs --layout samples; the layout 'activations' holds no features")
            return export_text(
                export_activations(open_store(path), out, dtype=dtype, read_site=read_site, **given), out
            )
        for name in given:
            raise ConfigError(f"--{name.replace('_', '-')}: needs --layout activations; leave it out")
        return export_text(
            export_samples(open_store(path), out, transcoder=transcoder, dtype=dtype, read_site=read_site), out
        )

    run_and_exit(work)


def _refuse_damaged(report: VerifyReport) -> None:
    if report.problems:
        raise StoreError(f"{report.location}: {_problems(report)}: {report.problems[0].message}")


def _problems(report: VerifyReport) -> str:
    count = len(report.problems)
    return f"{count} problem{'' if count == 1 else 's'} at level {report.level}"
