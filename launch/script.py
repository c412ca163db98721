"""Command line of jobs with a settings class, the same for `clt VERB` and for the scripts of this folder.

    clt train [CONFIG] [key=value ...] [--key value ...] [--dry-run] [--help]

A `CLTError` is printed as one line and ends with code 2; any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from clt.config import config_to_yaml, load_config
from clt.errors import CLTError, ConfigError
from clt.launch.logs import job_rank, set_up_logging
from clt.launch.settings_reference import keys_text

T = TypeVar("T")

_HELP = """\
usage: {command} [CONFIG] [key=value ...] [--dry-run]

{summary}

  CONFIG        YAML file of the job{default}
  key=value     sets a key, or replaces its value of the file; `--key value` and `--key=value` mean the same.
                Text and paths are taken as they are, lists are YAML or items separated by commas, other values YAML.
  --dry-run     prints the resolved configuration and exits
  --help        prints this text and exits

`--config FILE`, `--set KEY=VALUE` and `--out FOLDER` are other forms of CONFIG, key=value and output=FOLDER.

keys:
{keys}"""


def resolved(config: Any) -> str:
    """A configuration as YAML text with every default."""
    return config_to_yaml(config).rstrip()


@dataclass(frozen=True, kw_only=True)
class JobCommand(Generic[T]):
    """A command that runs one kind of job.

    Attributes:
        name: the command, for the help text.
        summary: one sentence.
        settings: settings class of its configuration.
        run: runs a job; rank 0 prints the result.
        describe: text of `--dry-run`.
        default_config: file that is read if the command line names none; None: no file.
        ranks_agree: see `guarded`.
    """

    name: str
    summary: str
    settings: type[T]
    run: Callable[[T], Any]
    describe: Callable[[T], str] = resolved
    default_config: Path | None = None
    ranks_agree: bool = True

    def help_text(self) -> str:
        """The text of `--help`: usage and all keys."""
        default = f"; default: {self.default_config}" if self.default_config else ""
        return _HELP.format(command=self.name, summary=self.summary, default=default, keys=keys_text(self.settings))


def run_job(command: JobCommand[Any], words: Sequence[str]) -> int:
    """Reads the command line of a job and runs it.

    Args:
        command: the kind of job.
        words: the command line after the command.

    Returns:
        The exit code.
    """
    if {"--help", "-h"} & set(words):
        print(command.help_text())
        return 0
    set_up_logging()

    def work() -> Any:
        path, overrides = read_words([word for word in words if word != "--dry-run"])
        config = load_config(command.settings, path or command.default_config, overrides)
        return command.describe(config) if "--dry-run" in words else command.run(config)

    return guarded(work, command.ranks_agree)


def read_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separates the words of a command line into the configuration file and its overrides.

    Args:
        words: `key=value`, `--key value`, `--key=value`, `--set key=value`, `--config FILE`; the first other word, or
            the first that is the name of a file, is the configuration file. Dashes in `--key` are read as underscores.

    Returns:
        The file, None if there is none, and strings `key=value`.

    Raises:
        ConfigError: an option has no value or a single dash, or there are two files.
    """
    files: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            if not equals:
                given = next(rest, None)
                if given is None:
                    raise ConfigError(f"{word}: expected a value after it")
                value = given
            key = option.replace("-", "_")
            if key == "config":
                files.append(value)
            else:
                overrides.append(value if key == "set" else f"{'output' if key == 'out' else key}={value}")
        elif word.startswith("-") and not Path(word).is_file():
            raise ConfigError(f"'{word}': unknown option; write key=value or --key value")
        elif "=" not in word or (not files and Path(word).is_file()):
            files.append(word)
        else:
            overrides.append(word)
    if len(files) > 1:
        raise ConfigError(f"'{files[1]}': expected key=value, since '{files[0]}' is the configuration file")
    return (Path(files[0]) if files else None), overrides


def guarded(work: Callable[[], Any], ranks_agree: bool = True) -> int:
    """Does work, prints its result, and turns a `CLTError` into one line and exit code 2.

    Args:
        work: the job.
        ranks_agree: all ranks of the job raise the same error, and the first one prints it; False: each works by
            itself and prints its own.

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


def run_and_exit(work: Callable[[], Any]) -> NoReturn:
    """Does the work of a command with the log on standard error, and exits with its code; see `guarded`."""
    set_up_logging()
    sys.exit(guarded(work))


class Report(Protocol):
    """Outcome of a command, as JSON and as text."""

    def to_json(self) -> str: ...

    def to_text(self) -> str: ...


def report_and_exit(file: Path | None, make: Callable[[], Report]) -> NoReturn:
    """Makes a report, writes it as JSON to a file unless that is None, prints it and exits; see `run_and_exit`."""

    def work() -> str:
        check_writable(file)
        report = make()
        write_text(file, report.to_json())
        return report.to_text()

    run_and_exit(work)


def check_writable(file: Path | None) -> None:
    """Checks before long work that its report can be written; None: nothing is to be written.

    Raises:
        CLTError: it cannot.
    """
    if file is not None:
        with _parent_made(file), file.open("a", encoding="utf-8"):
            pass


def write_text(file: Path | None, text: str) -> None:
    """Writes a report to a file; None: nowhere.

    Raises:
        CLTError: it cannot be written there.
    """
    if file is not None:
        with _parent_made(file):
            file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


@contextmanager
def _parent_made(file: Path) -> Iterator[None]:
    """Makes the folder of a file that is about to be written; OSErrors become CLTErrors."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CLTError(f"{file}: cannot be written ({error.strerror}); choose another file") from None
