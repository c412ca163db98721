"""Logging of the entry points to standard error: rank 0 at level INFO, the other ranks at WARNING."""

from __future__ import annotations

import logging
import os


def job_rank() -> int:
    """Rank of this process in the job that torchrun started, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def job_world() -> int:
    """Number of ranks of the job that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_up_logging() -> None:
    """Sends the project's log to standard error, one line per record."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("clt")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if job_rank() == 0 else logging.WARNING)
