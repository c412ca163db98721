"""Typer arguments of job commands: all words are passed on to `clt.launch.script.read_words`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

#: Arguments of `command()`: unknown options are words of the job too.
TAKES_WORDS: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True}}
Words = Annotated[list[str] | None, typer.Argument(metavar="CONFIG|KEY=VALUE", help="File of the job and its keys.")]
