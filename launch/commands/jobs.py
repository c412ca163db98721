"""All kinds of jobs that have a settings class, for `clt settings`; and those that have no script in launch/."""

from __future__ import annotations

from typing import Any

from clt.attribution.run import AttributeConfig, EvaluateConfig, evaluate, explain
from clt.launch import capture, demo, train
from clt.launch.script import JobCommand
from clt.launch.settings_reference import keys_markdown

_INTRODUCTION = """\
# Settings

All keys of the jobs. `clt settings > docs/settings.md` generates this page; `clt VERB --help` prints one job's. A job
is `clt VERB [CONFIG] [key=value ...]`, or the script of that name in `launch/` with the same arguments. CONFIG is a
YAML file; `key=value`, `--key value` and `--key=value` set a key or replace its value of the file. Without CONFIG all
keys come from the command line. Text and paths are literal (`null` is no value if the type allows it), lists are YAML
or items separated by commas, other values are YAML:

    clt attribute --model MODEL --clt FOLDER --output FOLDER "prompt=USER: <image> Which color?" images=board.png

A section is a group of keys: `optimizer.eps` is the key `eps` of the section `optimizer`. Setting a key of an optional
section turns the section on, `section=null` turns it off. `[]` is an item of a list, which can only be set in YAML.
"""


def _evaluate(config: EvaluateConfig) -> object:
    evaluate(config)
    return config.output


EVALUATE = JobCommand(
    name="clt evaluate",
    summary="Measures a transcoder on held-out activations and prompts; prints the report's file.",
    settings=EvaluateConfig,
    run=_evaluate,
)

ATTRIBUTE = JobCommand(
    name="clt attribute",
    summary="Computes and checks the attribution graph of a prompt; prints the page to open.",
    settings=AttributeConfig,
    run=lambda config: explain(config).page,
)

COMMANDS: tuple[JobCommand[Any], ...] = (capture.COMMAND, train.COMMAND, EVALUATE, ATTRIBUTE, demo.COMMAND)


def settings_page() -> str:
    """The reference of all settings as Markdown, docs/settings.md."""
    seen: dict[type[Any], str] = {}
    return "\n".join([_INTRODUCTION, *(keys_markdown(command.name, command.settings, seen) for command in COMMANDS)])
