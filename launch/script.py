"""What the scripts in this folder share: one configuration file, `key=value` overrides, `--dry-run`, exit codes.

A `CLTError` is printed as one line and ends with code 2; any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clt.config import load_config
from clt.errors import CLTError
from clt.launch.logs import job_rank, set_up_logging

T = TypeVar("T")


def run_script(
    description: str,
    kind: type[T],
    describe: Callable[[T], str],
    work: Callable[[T], Any],
    arguments: Sequence[str] | None,
    ranks_agree: bool = True,
) -> int:
    """Parses the arguments of a script and does its work.

    Args:
        description: first paragraph of the help text.
        kind: settings class of the configuration file.
        describe: what `--dry-run` prints of a configuration.
        work: the job; its result is printed by the first rank.
        arguments: the command line, `sys.argv` by default.
        ranks_agree: see `guarded`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="YAML file of the job")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, dotted keys")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and end")
    options = parser.parse_args(arguments)
    set_up_logging()

    def job() -> Any:
        config = load_config(kind, options.config, options.overrides)
        return describe(config) if options.dry_run else work(config)

    return guarded(job, ranks_agree)


def guarded(work: Callable[[], Any], ranks_agree: bool = True) -> int:
    """Does work, prints its result, and turns a `CLTError` into one line and exit code 2.

    Args:
        work: the job.
        ranks_agree: in a job of several ranks all of them raise the same error, so that the first one tells it; false
            where each works by itself and tells its own.

    Returns:
        The exit code.
    """
    try:
        result = work()
    except CLTError as error:
        if job_rank() == 0 or not ranks_agree:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if job_rank() == 0 and result is not None:
        print(result)
    return 0


def check_writable(file: Path | None) -> None:
    """Finds out before long work whether its report can be written where the user wants it, if anywhere.

    Raises:
        CLTError: it cannot.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise CLTError(f"{file}: cannot be written ({error.strerror}); choose another file") from None


def write_text(file: Path | None, text: str) -> None:
    """Writes a report where the user wants it, if anywhere.

    Raises:
        CLTError: it cannot be written there.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    except OSError as error:
        raise CLTError(f"{file}: cannot be written ({error.strerror}); choose another file") from None
