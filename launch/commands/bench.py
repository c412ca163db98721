"""`clt bench`: how fast the parts of this project are on this machine, beside the usual ways to do the same.

    clt bench kernels --json kernels.json
    clt bench kernels --size A --eleuther ../clt-training
    clt bench train --json train.json
    clt bench baselines --folder runs/demo --json baselines.json

The store has its own, `clt store bench`. A user's mistake is one line on standard error and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clt.launch.logs import set_up_logging
from clt.launch.script import check_writable, guarded, write_text

#: Where configs/ lies: beside launch/ in a checkout.
_CHECKOUT = Path(__file__).resolve().parents[2]

bench_app = typer.Typer(no_args_is_help=True, help="Speed of this machine, part by part.")


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
    from clt.launch.bench.kernels.run import KernelBenchSettings, bench_kernels

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


@bench_app.command()
def train(
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="gpt2, llava-slice, cpu, toy or toy-slice; repeatable.")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Worlds on which bytes are counted: 1, 2, 4; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Measured steps; the best counts.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes: shows that everything runs.")] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Measures whole training steps, memory and bytes between ranks, and projects them to many devices."""
    from clt.launch.bench.training.run import TrainBenchSettings, bench_train

    def work() -> str:
        settings = TrainBenchSettings(
            sizes=tuple(size or ()), ranks=tuple(dict.fromkeys(ranks or ())), steps=steps, quick=quick
        )
        check_writable(file)
        report = bench_train(settings)
        write_text(file, report.to_json())
        return report.to_text()

    set_up_logging()
    raise typer.Exit(guarded(work))


@bench_app.command()
def baselines(
    config: Annotated[Path, typer.Option(help="YAML file like the demo's: model, captures, our training.")] = (
        _CHECKOUT / "configs" / "demo" / "toy.yaml"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of everyone; absent: as configured.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable; by default 0, 1 and 2.")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Keeps the stores here, or takes them from the demo's output.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: shows that everything runs.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Contender that runs beside ours; repeatable.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Trains the algorithms of other projects on the same batches as ours: held-out error, dead features, speed."""
    from clt.launch.bench.baselines.run import BaselineSettings, bench_baselines

    def work() -> str:
        settings = BaselineSettings(
            config=config,
            folder=folder,
            steps=steps,
            seeds=tuple(dict.fromkeys(seed or (0, 1, 2))),
            threads=threads,
            quick=quick,
            only=tuple(only or ()),
        )
        check_writable(file)
        report = bench_baselines(settings)
        write_text(file, report.to_json())
        return report.to_text()

    set_up_logging()
    raise typer.Exit(guarded(work))
