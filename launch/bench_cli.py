"""`clt bench`: how fast the parts of this project are on this machine, beside the usual ways to do the same.

    clt bench kernels --json kernels.json
    clt bench kernels --size A --eleuther ../clt-training

The store has its own, `clt store bench`. A user's mistake is one line on standard error and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clt.launch.logs import set_up_logging
from clt.launch.script import check_writable, guarded, write_text

bench_app = typer.Typer(no_args_is_help=True, help="Speed of this machine, part by part.")


@bench_app.callback()
def _group() -> None:
    """Keeps `kernels` a subcommand while it is the only one."""


@bench_app.command()
def kernels(
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A, A32k, B, few, many, cpu or toy; repeatable.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of everything; the best counts.")] = None,
    eleuther: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Checkout of EleutherAI's clt-training or sparsify.")
    ] = None,
    openai: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Checkout of openai's sparse_autoencoder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A toy size: shows that everything runs.")] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Measures the kernels, op by op and in whole training steps, against library products and other kernels."""
    from clt.launch.bench.kernels import KernelBenchSettings, bench_kernels

    def work() -> str:
        settings = KernelBenchSettings(
            sizes=tuple(size or ()), rounds=rounds, eleuther=eleuther, openai=openai, quick=quick
        )
        check_writable(file)
        report = bench_kernels(settings)
        write_text(file, report.to_json())
        return report.to_text()

    set_up_logging()
    raise typer.Exit(guarded(work))
