"""The `clt` command: each subcommand calls a function that scripts can import.

    clt demo --out runs/demo
    clt capture configs/capture/toy.yaml source.toy.n=100
    clt plan configs/train/llava_7b.yaml --model layers=32,width=4096 --gpus 8
    clt train configs/train/toy.yaml --dry-run
    clt convert runs/toy/clt runs/toy/circuit_tracer --to circuit_tracer --calibrate runs/toy/store
    clt evaluate configs/evaluate/toy.yaml
    clt attribute configs/attribute/toy.yaml index=3

Jobs (capture, train, evaluate, attribute, demo) are `clt VERB [CONFIG] [key=value ...]`; `clt VERB --help` lists their
keys. User errors are one line on standard error and exit code 2. Several processes: `torchrun launch/train.py CONFIG`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from clt.convert import Combination, Format
from clt.launch.commands.bench import bench_app
from clt.launch.commands.store import store_app
from clt.launch.commands.words import TAKES_WORDS, Words
from clt.launch.script import read_words, report_and_exit, run_and_exit, run_job
from clt.transcoder.architecture import ReadSite

# Without rich, whose markup takes square brackets out of help texts.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__.replace("    clt demo", "\b\n    clt demo"),
)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")


@app.command(**TAKES_WORDS, add_help_option=False)
def demo(words: Words = None) -> None:
    """Runs all stages on the toy model and prints the measures."""
    from clt.launch.demo import COMMAND

    raise typer.Exit(run_job(COMMAND, words or ()))


@app.command(**TAKES_WORDS, add_help_option=False)
def capture(words: Words = None) -> None:
    """Captures activations of a model into a store."""
    from clt.launch.capture import COMMAND

    raise typer.Exit(run_job(COMMAND, words or ()))


@app.command(**TAKES_WORDS, add_help_option=False)
def train(words: Words = None) -> None:
    """Trains a transcoder in one process."""
    from clt.launch.train import COMMAND

    raise typer.Exit(run_job(COMMAND, words or ()))


@app.command(**TAKES_WORDS, add_help_option=False)
def evaluate(words: Words = None) -> None:
    """Measures a transcoder on held-out activations and prompts."""
    from clt.launch.commands.jobs import EVALUATE

    raise typer.Exit(run_job(EVALUATE, words or ()))


@app.command(**TAKES_WORDS, add_help_option=False)
def attribute(words: Words = None) -> None:
    """Computes and checks the attribution graph of a prompt."""
    from clt.launch.commands.jobs import ATTRIBUTE

    raise typer.Exit(run_job(ATTRIBUTE, words or ()))


@app.command(**TAKES_WORDS)
def plan(
    words: Words = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="layers=L,width=D", help="Size of the model. [default: that of the job's store]"),
    ] = None,
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, or cpu as measured in benchmarks/kernels.md.")] = "h200",
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices. [default: mesh.layer x mesh.column]")] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens to train on. [default: those of all steps]")
    ] = None,
    numerics: Annotated[
        str | None, typer.Option(help="Other types of weights and moments: a name in the last table of the report.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Computes memory, traffic and speed of a training job.

    Also lists the meshes on which the job fits. CONFIG and its keys are those of `clt train`.
    """
    from clt.launch.commands.plan import PlanReport, make_plan

    def make() -> PlanReport:
        config, overrides = read_words(words or ())
        return make_plan(config, overrides, model=model, gpu=gpu, gpus=gpus, tokens=tokens, numerics=numerics)

    report_and_exit(file, make)


@app.command()
def settings() -> None:
    """Prints the keys of all jobs as Markdown, docs/settings.md."""
    from clt.launch.commands.jobs import settings_page

    run_and_exit(settings_page)


@app.command()
def join(
    out: Annotated[Path, typer.Argument(help="New folder for the whole transcoder.")],
    folders: Annotated[
        list[Path], typer.Argument(help="Output folders of jobs with `clt.source`, one per source layer.")
    ],
) -> None:
    """Joins independently trained source layers into a transcoder.

    Each layer is the output of its own training job. Prints the new folder.
    """
    from clt.checkpoint.join import join_folders

    run_and_exit(lambda: join_folders(folders, out))


@app.command("convert")
def convert_format(
    source: Annotated[Path, typer.Argument(help="Folder of the transcoder.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
    read_as: Annotated[Format, typer.Option("--from", help="Format of the source.")] = "native",
    write_as: Annotated[Format, typer.Option("--to", help="Format of the target.")] = "native",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Activations on which the thresholds of features, or the mappings of vlm_clt_training, are measured.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of that store; all are held in memory.")] = 100_000,
    read_site: Annotated[
        ReadSite | None, typer.Option(help="Site that encoders read, if the files do not record it.")
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="vlm_clt_training: active features of a TopK transcoder.")
    ] = None,
    combine: Annotated[
        Combination | None, typer.Option(help="vlm_clt_training: combination of a target's sources. [default: sum]")
    ] = None,
) -> None:
    """Converts a transcoder from or to another project's format.

    docs/formats.md describes the formats. Prints the new folder.
    """
    from clt.convert.formats import convert
    from clt.launch.commands.convert import calibration_tokens

    calibration = None if calibrate is None else partial(calibration_tokens, calibrate, tokens)
    choices = {"read_site": read_site, "k": k, "combine": combine}
    run_and_exit(lambda: convert(source, target, read_as, write_as, calibration, **choices))


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Transcoder, or output folder of a training job, whose newest checkpoint is taken.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Model repository on the hub, OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch. [default: main]")] = None,
    message: Annotated[str | None, typer.Option(help="Summary of the commits.")] = None,
) -> None:
    """Uploads a transcoder with its model card to the hub."""
    from clt.hub.pretrained import push_pretrained

    def work() -> str:
        commit = push_pretrained(folder, name, private=private, revision=revision, message=message)
        return f"{name}: commit {commit}"

    run_and_exit(work)


@app.command()
def view(
    graph: Annotated[Path, typer.Argument(help="Folder or page that `clt attribute` wrote.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: a free one.")] = 0,
) -> None:
    """Serves the page of a graph to a browser on this machine."""
    from clt.attribution.viewer.server import find_page, page_server

    def work() -> None:
        with page_server(find_page(graph), port) as server:
            host, bound = server.server_address[:2]
            print(f"http://{host!s}:{bound}/  (press Ctrl-C to stop)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return

    run_and_exit(work)


def main() -> None:
    """Entry point of the `clt` command."""
    app()


if __name__ == "__main__":
    main()
