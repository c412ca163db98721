"""`clt bench`: speed of kernels and training on this machine, and quality beside other projects' training.

    clt bench kernels --json kernels.json
    clt bench kernels --size A --eleuther ../clt-training
    clt bench train --json train.json
    clt bench baselines --folder runs/demo --json baselines.json

`clt store bench` measures the store. User errors are one line on standard error and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clt.launch.bench.checkout import CHECKOUT, load_benchmarks
from clt.launch.script import Report, report_and_exit

bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks of this machine: kernels, training, other projects.")

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")]


@bench_app.command()
def kernels(
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A, A32k, B, few, many, cpu or toy; repeatable.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds; the best one is reported.")] = None,
    eleuther: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Compare with a checkout of EleutherAI's clt-training or sparsify."),
    ] = None,
    openai: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Compare with a checkout of openai's sparse_autoencoder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy size: only checks that everything runs.")] = False,
    file: JsonFile = None,
) -> None:
    """Time the kernels, single operations and whole training steps, against PyTorch and the machine's limits."""
    from clt.launch.bench.kernels.run import KernelBenchSettings, bench_kernels

    settings = KernelBenchSettings(
        sizes=tuple(size or ()), rounds=rounds, eleuther=eleuther, openai=openai, quick=quick
    )
    report_and_exit(file, lambda: bench_kernels(settings))


@bench_app.command()
def train(
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="gpt2, llava-slice, cpu, toy or toy-slice; repeatable.")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Numbers of ranks for the traffic: 1, 2, 4; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps; the best one is reported.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes: only checks that everything runs.")] = False,
    file: JsonFile = None,
) -> None:
    """Time training steps, measure memory and bytes between ranks, and project them to many devices."""
    from clt.launch.bench.training.run import TrainBenchSettings, bench_train

    settings = TrainBenchSettings(
        sizes=tuple(size or ()), ranks=tuple(dict.fromkeys(ranks or ())), steps=steps, quick=quick
    )
    report_and_exit(file, lambda: bench_train(settings))


@bench_app.command()
def baselines(
    config: Annotated[Path, typer.Option(help="YAML file as of `clt demo`: model, captures, our training.")] = (
        CHECKOUT / "configs" / "demo" / "toy.yaml"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as configured.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable; default: 0, 1 and 2.")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder of the stores; the output of `clt demo` has them.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: only checks that everything runs.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Algorithm to compare with ours; repeatable.")
    ] = None,
    file: JsonFile = None,
) -> None:
    """Train other projects' algorithms on our batches: held-out FVU, dead features, tokens/s (needs a checkout)."""

    def bench() -> Report:
        run = load_benchmarks("benchmarks.baselines.run")
        settings = run.BaselineSettings(
            config=config,
            folder=folder,
            steps=steps,
            seeds=tuple(dict.fromkeys(seed or (0, 1, 2))),
            threads=threads,
            quick=quick,
            only=tuple(only or ()),
        )
        report: Report = run.bench_baselines(settings)
        return report

    report_and_exit(file, bench)
