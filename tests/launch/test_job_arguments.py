"""The command line of jobs: CONFIG, key=value and their other forms; the help text; scripts and verbs alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clt.config_keys import keys_of
from clt.errors import ConfigError
from clt.launch.commands.jobs import COMMANDS
from clt.launch.commands.main import app
from clt.launch.script import JobCommand, read_words

ROOT = Path(__file__).resolve().parent.parent.parent
TOY = str(ROOT / "configs" / "train" / "toy.yaml")


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["job.yaml", "steps=7", "clt.k=3"], ["steps=7", "clt.k=3"]),
        (["steps=7", "job.yaml"], ["steps=7"]),
        (["--config", "job.yaml", "--set", "steps=7"], ["steps=7"]),
        (["--config=job.yaml", "--set=steps=7"], ["steps=7"]),
        (["--model", "a=b", "job.yaml", "--prompt=USER: <image> a=b?"], ["model=a=b", "prompt=USER: <image> a=b?"]),
        (["job.yaml", "--batch-size", "3", "--clt.n-features=4"], ["batch_size=3", "clt.n_features=4"]),
        (["job.yaml", "--out", "folder", "--seed", "-1"], ["output=folder", "seed=-1"]),
        (["job.yaml", "prompt=USER: <image> Which color?"], ["prompt=USER: <image> Which color?"]),
        (["job.yaml", "--prompt", ""], ["prompt="]),
    ],
)
def test_words_are_a_file_and_overrides_in_order(words: list[str], overrides: list[str]) -> None:
    assert read_words(words) == (Path("job.yaml"), overrides)


def test_a_file_with_an_equals_sign_in_its_name_is_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("k=3.yaml").touch()
    assert read_words(["k=3.yaml", "k=3"]) == (Path("k=3.yaml"), ["k=3"])
    assert read_words(["k=3"]) == (None, ["k=3"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a.yaml", "b.yaml"], "'b.yaml': expected key=value"),
        (["a.yaml", "--model"], "--model: exp"),
        (["-model", "m"], "'-model': unknown option; write key=value or --key value"),
    ],
)
def test_wrong_words_are_named(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        read_words(words)


@pytest.mark.parametrize(
    "words",
    [
        [TOY, "steps=7", "clt.k=3", "store=a=b c", "--dry-run"],
        ["--dry-run", "--config", TOY, "--set", "steps=7", "--set", "clt.k=3", "--set", "store=a=b c"],
        ["--steps", "7", "--clt.k=3", TOY, "--store", "a=b c", "--dry-run"],
    ],
)
def test_all_forms_of_a_command_mean_the_same(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 0, result.output
    assert "steps: 7\n" in result.stdout and "  k: 3\n" in result.stdout and "store: a=b c\n" in result.stdout


@pytest.mark.parametrize("script", ["train", "demo"])
def test_scripts_read_the_words_of_their_verb(script: str) -> None:
    words = [str(ROOT / "configs" / script / "toy.yaml"), "--output", "elsewhere", "seed=5", "--dry-run"]
    verb = CliRunner().invoke(app, [script, *words])
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == verb.exit_code == 0, result.stderr
    assert "output: elsewhere\n" in result.stdout and "seed: 5\n" in result.stdout
    assert result.stdout == verb.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_lists_every_key_with_type_default_and_meaning(command: JobCommand[object]) -> None:
    verb = command.name.removeprefix("clt ")
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and command.summary in result.stdout
    text = " ".join(result.stdout.split())
    for key in keys_of(command.settings):
        assert f" {key.name} (" in text and key.description in text, key.name
    assert verb in CliRunner().invoke(app, ["--help"]).stdout


def test_help_of_a_key() -> None:
    lines = CliRunner().invoke(app, ["train", "--help"]).stdout.splitlines()
    assert "  optimizer.learning_rate  (number > 0, default: 0.001)" in lines
    assert "  clt.n_targets  (integer > 0 or null, default: null)" in lines
    assert "  steps  (integer > 0, required)" in lines


def test_a_command_without_words_names_what_is_missing() -> None:
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 2 and result.stderr == "error: command line: missing steps, output, clt; set a value\n"
