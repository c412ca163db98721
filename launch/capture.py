"""Captures the activations of a model into a store.

    python launch/capture.py configs/capture/toy.yaml [key=value ...] [--dry-run]

A capture that was stopped goes on where it was. `--dry-run` loads the model, prints the resolved configuration and
what would be written, and ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.run import capture
from clt.config import config_to_yaml
from clt.launch.script import run_script

LEFT_TO_OTHERS = "done; units are left to other workers, the last of which completes the store"


def describe(config: CaptureConfig) -> str:
    """The resolved configuration and what the job would write."""
    return f"{config_to_yaml(config)}# {plan_capture(config, longest_answers=True).summary()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns its exit code."""
    return run_script(
        "Captures the activations of a model into a store.",
        CaptureConfig,
        describe,
        lambda config: capture(config, progress=sys.stderr.isatty()) or LEFT_TO_OTHERS,
        arguments,
        ranks_agree=False,
    )


if __name__ == "__main__":
    sys.exit(main())
