"""Captures the activations of a model into a store.

    python launch/capture.py configs/capture/toy.yaml [key=value ...] [--dry-run]

A capture that was stopped continues where it was. `--dry-run` loads the model, prints the resolved configuration and
the size of the store, and exits. The same job as `clt capture`.
"""

from __future__ import annotations

import sys
from functools import partial

from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.run import capture_store
from clt.config import config_to_yaml
from clt.launch.script import JobCommand, run_job

UNITS_LEFT = "this worker is done; other workers capture the remaining units, and the last one completes the store"


def describe(config: CaptureConfig) -> str:
    """The resolved configuration and the planned output."""
    return f"{config_to_yaml(config)}# {plan_capture(config, longest_answers=True).summary()}"


COMMAND = JobCommand(
    name="clt capture",
    summary="Captures the activations of a model into a store; prints the store's id.",
    settings=CaptureConfig,
    run=lambda config: capture_store(config, progress=sys.stderr.isatty()) or UNITS_LEFT,
    describe=describe,
    ranks_agree=False,
)

main = partial(run_job, COMMAND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
