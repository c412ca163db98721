"""Captures the activations of a model into a store.

    python launch/capture.py configs/capture/toy.yaml [key=value ...] [--dry-run]

A capture that was stopped goes on where it was. `--dry-run` loads the model, prints the resolved configuration and
what would be written, and ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clt.capture.run import CaptureConfig, capture, plan_capture
from clt.config import config_to_yaml, load_config
from clt.errors import CLTError
from clt.launch.logs import set_up_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the job")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, dotted keys")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and end")
    options = parser.parse_args(arguments)
    set_up_logging()
    try:
        config = load_config(CaptureConfig, options.config, options.overrides)
        if options.dry_run:
            print(f"{config_to_yaml(config)}# {plan_capture(config).summary()}")
            return 0
        print(capture(config, progress=sys.stderr.isatty()))
    except CLTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
