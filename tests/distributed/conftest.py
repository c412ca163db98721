"""Real gloo ranks for tests: separate processes on a free port, one thread each, without a compiler in reach."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from launched import write_job, write_store

RankResults = list[dict[str, Tensor]]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that `launch/train.py` can train on."""
    folder = tmp_path_factory.mktemp("store") / "store"
    write_store(folder)
    return folder


@pytest.fixture
def job(store: Path, tmp_path: Path) -> Path:
    """Configuration file of a job on it that writes into the test's folder."""
    return write_job(store, tmp_path)


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[subprocess.Popen[str]]]:
    """Starts `world` processes that call a function of a test file with JSON arguments; see `rank_main.py`."""

    def start(function: Callable[..., Any], world: int, folder: Path, **arguments: Any) -> list[subprocess.Popen[str]]:
        script = Path(__file__).parent / "rank_main.py"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # No compiler, no ninja: nothing may be built at run time.
            "PATH": "",
        }
        return [
            subprocess.Popen(
                [
                    sys.executable,
                    str(script),
                    inspect.getfile(function),
                    function.__name__,
                    json.dumps(arguments),
                    str(folder / f"result_{rank}.safetensors"),
                ],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]

    return start


@pytest.fixture(scope="session")
def run_ranks(
    start_ranks: Callable[..., list[subprocess.Popen[str]]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RankResults]:
    """Runs ranks to their end and returns what each of them returned, in order of rank."""

    def run(function: Callable[..., Any], world: int, **arguments: Any) -> RankResults:
        folder = tmp_path_factory.mktemp("ranks")
        processes = start_ranks(function, world, folder, **arguments)
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            assert process.returncode == 0, f"rank {rank} of {function.__name__}:\n{outputs[rank]}"
        return [load_file(folder / f"result_{rank}.safetensors") for rank in range(world)]

    return run
