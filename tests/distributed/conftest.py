"""Real gloo ranks for tests: processes of one thread that meet at a free port, without a compiler in reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from ..worker_processes import WorkerServer
from .kill_worker import Ranks
from .launched import free_port, write_job, write_store

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
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerServer]:
    """Forks ranks that call a function of a test module; see `rank_main.py`."""
    # No compiler, no ninja: nothing may be built at run time.
    server = WorkerServer("tests.distributed.rank_main", tmp_path_factory.mktemp("rank_server"), PATH="")
    yield server
    server.close()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks of the toy training job that can be killed."""
    server = Ranks(tmp_path_factory.mktemp("killed_ranks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_ranks(rank_server: WorkerServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankResults]:
    """Runs a function on ranks to its end and returns what each of them returned, in order of rank."""

    def run(function: Callable[..., Any], world: int, **arguments: Any) -> RankResults:
        folder = tmp_path_factory.mktemp("ranks")
        address = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = {
            rank_server.fork(
                module=function.__module__,
                function=function.__name__,
                arguments=arguments,
                result=str(folder / f"result_{rank}.safetensors"),
                log=str(folder / f"rank_{rank}.log"),
                environment=address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            ): rank
            for rank in range(world)
        }
        try:
            for _ in range(world):
                process, code = rank_server.wait()
                log = (folder / f"rank_{ranks[process]}.log").read_text()
                assert code == 0, f"rank {ranks[process]} of {function.__name__}: exit code {code}\n{log}"
        finally:
            while rank_server.alive:
                rank_server.kill_all()
                rank_server.wait()
        return [load_file(folder / f"result_{rank}.safetensors") for rank in range(world)]

    return run
