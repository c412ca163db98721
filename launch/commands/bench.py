"""`clt bench`: speed of this project's parts on this machine, compared with the usual alternatives.

    clt bench kernels --json kernels.json
    clt bench kernels --size A --eleuther ../clt-training
    clt bench train --json train.json
    clt bench baselines --folder runs/demo --json baselines.json

The store's benchmark is `clt store bench`. An error of the user is one line on standard error and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clt.launch.script import check_writable, run_and_exit, write_text

#: Where configs/ lies: beside launch/ in a checkout.
_CHECKOUT = Path(__file__).resolve().parents[2]

bench_app = typer.Typer(no_args_is_help=True, help="Measures the speed of kernels, training and comparable projects on this machine.")


@bench_app.command()
def kernels(
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A, A32k, B, few, many, cpu or toy; repeatable.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Repetitions; the fastest is reported.")] = None,
    eleuther: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Checkout of EleutherAI's clt-training or sparsify.")
    ] = None,
    openai: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Checkout of openai's sparse_autoencoder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A toy size, to check that everything runs.")] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Measures the kernels, alone and in whole training steps, against dense library products and other kernels."""
    from clt.launch.bench.kernels.run import KernelBenchSettings, bench_kernels

    def work() -> str:
        settings = KernelBenchSettings(
            sizes=tuple(size or ()), rounds=rounds, eleuther=eleuther, openai=openai, quick=quick
        )
        check_writable(file)
        report = bench_kernels(settings)
        write_text(file, report.to_json())
        return report.to_text()

    run_and_exit(work)


@bench_app.command()
def train(
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="gpt2, llava-slice, cpu, toy or toy-slice; repeatable.")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(metavar="N", help="World sizes for which traffic is counted: 1, 2, 4; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Measured steps; the fastest is reported.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, to check that everything runs.")] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Measures training steps, memory and traffic between ranks, and projects them to many devices."""
    from clt.launch.bench.training.run import TrainBenchSettings, bench_train

    def work() -> str:
        settings = TrainBenchSettings(
            sizes=tuple(size or ()), ranks=tuple(dict.fromkeys(ranks or ())), steps=steps, quick=quick
        )
        check_writable(file)
        report = bench_train(settings)
        write_text(file, report.to_json())
        return report.to_text()

    run_and_exit(work)


@bench_app.command()
def baselines(
    config: Annotated[Path, typer.Option(help="YAML file like the demo's: model, captures, our training.")] = (
        _CHECKOUT / "configs" / "demo" / "toy.yaml"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every method. [default: those of the file]")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Random seed, repeatable. [default: 0, 1 and 2]")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder for the stores; those of an earlier run or of the demo are reused.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to check that everything runs.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Method to compare with ours, repeatable. [default: all]")
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Trains with the algorithms of other projects on the same batches: held-out error, dead features, speed."""
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

    run_and_exit(work)
