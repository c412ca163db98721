"""Ranks of a test: each runs a function of a test module inside a distributed job and saves the tensors it returns."""

from __future__ import annotations

import gc
import importlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..worker_processes import serve
from .kill_worker import import_everything


def work(
    module: str, function: str, arguments: dict[str, Any], result: str, log: str, environment: dict[str, str]
) -> int:
    """Calls a function and saves its result; no thread of gloo may survive the job.

    Args:
        module: test module.
        function: its name there.
        arguments: keywords.
        result: safetensors file for what it returns.
        log: file for what the rank prints.
        environment: place of the rank in the job, as torchrun gives it.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    _run(module, function, arguments, result)
    check_that_groups_are_gone()
    return 0


def _run(module: str, function: str, arguments: dict[str, Any], result: str) -> None:
    from clt.training.deepspeed_engine import joined_job

    torch.manual_seed(0)
    with joined_job():
        tensors = getattr(importlib.import_module(module), function)(**arguments)
    save_file({key: torch.as_tensor(value).contiguous() for key, value in tensors.items()}, result)


def check_that_groups_are_gone() -> None:
    """Fails if a thread of gloo survives the job by 10 s: it may abort the process when the interpreter ends."""
    deadline = time.monotonic() + 10
    while any("gloo" in name for name in _threads()):
        assert time.monotonic() < deadline, _threads()
        gc.collect()
        time.sleep(0.05)


def _threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def _prepare() -> None:
    import pytest  # noqa: F401

    from . import sharded_steps  # noqa: F401

    import_everything()


if __name__ == "__main__":
    serve(work, _prepare)
