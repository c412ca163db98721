"""The `clt` command: each subcommand is the thin face of a function that scripts import.

    clt demo --out runs/demo
    clt capture --config configs/capture/toy.yaml --set source.toy.n=100
    clt plan configs/train/llava_7b.yaml --model layers=32,width=4096 --gpus 8
    clt train --config configs/train/toy.yaml --dry-run
    clt join runs/seed/clt runs/seed/layer_*
    clt convert runs/toy/clt runs/toy/circuit_tracer --to circuit_tracer --calibrate runs/toy/store
    clt push runs/toy/clt OWNER/NAME
    clt evaluate --config configs/evaluate/toy.yaml
    clt attribute --config configs/attribute/toy.yaml --set index=3
    clt view runs/demo/graph

A user's mistake is one line on standard error and exit code 2. Training on several processes is
`torchrun launch/train.py CONFIG`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from clt.config import config_to_yaml, load_config
from clt.convert import Combination, Format
from clt.launch.commands.bench import bench_app
from clt.launch.commands.store import store_app
from clt.launch.logs import set_up_logging
from clt.launch.script import check_writable, guarded, write_text
from clt.transcoder.architecture import ReadSite

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")

#: Where configs/ and examples/ lie: beside launch/ in a checkout.
CHECKOUT = Path(__file__).resolve().parents[2]

Config = Annotated[Path, typer.Option(help="YAML file of the job.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replaces a value, repeatable.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and end.")]


def _run(work: Callable[[], Any]) -> None:
    set_up_logging()
    raise typer.Exit(guarded(work))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything written.")],
    config: Config = CHECKOUT / "configs" / "demo" / "toy.yaml",
    overrides: Overrides = None,
) -> None:
    """Runs the whole journey on the toy model and prints its summary."""
    from clt.launch.demo import DemoConfig, demo, describe

    _run(lambda: describe(demo(load_config(DemoConfig, config, overrides or ()), out)))


@app.command()
def capture(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Captures the activations of a model into a store; prints the store's id."""
    from clt.capture.planning import CaptureConfig
    from clt.capture.run import capture
    from clt.launch.capture import LEFT_TO_OTHERS, describe

    def work() -> str:
        job = load_config(CaptureConfig, config, overrides or ())
        return describe(job) if dry_run else capture(job, progress=sys.stderr.isatty()) or LEFT_TO_OTHERS

    _run(work)


@app.command()
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Trains a transcoder in one process; prints the folder of its last checkpoint."""
    from clt.launch.train import train_until_stopped
    from clt.training.settings import TrainConfig

    def work() -> object:
        job = load_config(TrainConfig, config, overrides or ())
        return config_to_yaml(job).rstrip() if dry_run else train_until_stopped(job)

    _run(work)


@app.command()
def join(
    out: Annotated[Path, typer.Argument(help="Folder for the whole transcoder.")],
    folders: Annotated[list[Path], typer.Argument(help="Outputs of jobs with `clt.source`, one for every source.")],
) -> None:
    """Makes one transcoder of source layers that were trained independently, each by its own job; prints its folder."""
    from clt.checkpoint.join import join_folders

    _run(lambda: join_folders(folders, out))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the transcoder.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
    read_as: Annotated[Format, typer.Option("--from", help="Format of the source.")] = "native",
    write_as: Annotated[Format, typer.Option("--to", help="Format of the target.")] = "native",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="STORE", help="Give every feature a threshold, or measure the seed's mapping, on its tokens."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of that store; all are held in memory.")] = 100_000,
    read_site: Annotated[ReadSite | None, typer.Option(help="What encoders read, if the files do not say it.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="kokosdev: active features of a TopK transcoder.")] = None,
    combine: Annotated[
        Combination | None, typer.Option(help="kokosdev: how a target's sources are combined; absent: their sum.")
    ] = None,
) -> None:
    """Converts a transcoder from or to the format of another project (docs/formats.md); prints the new folder."""
    from clt.launch.commands.convert import ConvertRequest, run

    request = ConvertRequest(
        source=source,
        target=target,
        read_as=read_as,
        write_as=write_as,
        store=calibrate,
        tokens=tokens,
        read_site=read_site,
        k=k,
        combine=combine,
    )
    _run(lambda: run(request))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Transcoder, or output of a training job: its newest checkpoint.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Model repository of the hub, OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch. Absent: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Summary of the commits.")] = None,
) -> None:
    """Sends a transcoder with a model card to the Hugging Face hub; prints the commit."""
    from clt.hub.pretrained import push_pretrained

    def work() -> str:
        commit = push_pretrained(folder, name, private=private, revision=revision, message=message)
        return f"{name}: commit {commit}"

    _run(work)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the training job.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(metavar="layers=L,width=D", help="Size of the model; absent: the job's store says.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, or cpu as measured in benchmarks/kernels.md.")] = "h200",
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices; absent: mesh.layer x mesh.column.")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Tokens to train on; absent: all steps.")] = None,
    numerics: Annotated[
        str | None, typer.Option(help="What-if of other types: a name of the last table of the report.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Counts memory, traffic and arithmetic of a training job, projects its speed, and says where it fits."""
    from clt.launch.commands.plan import PlanRequest, make_plan

    def work() -> str:
        request = PlanRequest(
            config=config,
            overrides=overrides or (),
            model=model,
            gpu=gpu,
            gpus=gpus,
            tokens=tokens,
            numerics=numerics,
        )
        check_writable(file)
        report = make_plan(request)
        write_text(file, report.to_json())
        return report.to_text()

    _run(work)


@app.command()
def evaluate(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measures a transcoder on held-out activations and prompts; prints the report's file."""
    from clt.attribution.run import EvaluateConfig, evaluate

    def work() -> object:
        job = load_config(EvaluateConfig, config, overrides or ())
        if dry_run:
            return config_to_yaml(job).rstrip()
        evaluate(job)
        return job.output

    _run(work)


@app.command()
def attribute(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Computes and checks the attribution graph of a prompt; prints the page to open."""
    from clt.attribution.run import AttributeConfig, explain

    def work() -> object:
        job = load_config(AttributeConfig, config, overrides or ())
        return config_to_yaml(job).rstrip() if dry_run else explain(job).page

    _run(work)


@app.command()
def view(
    graph: Annotated[Path, typer.Argument(help="Folder or page that `clt attribute` wrote.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 lets the system choose.")] = 0,
) -> None:
    """Serves the page of a graph to a browser on this machine until interrupted."""
    from clt.attribution.viewer.server import find_page, page_server

    def work() -> None:
        with page_server(find_page(graph), port) as server:
            host, bound = server.server_address[:2]
            print(f"http://{host!s}:{bound}/  (Ctrl-C ends)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return

    _run(work)


def main() -> None:
    """Entry point of the `clt` command."""
    app()


if __name__ == "__main__":
    main()
