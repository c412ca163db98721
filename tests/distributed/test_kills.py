"""Training killed at random moments and at each point of a checkpoint: it resumes, and ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_nursery import Blow, Nursery, draw_blows
from kill_worker import POINTS

from clt.checkpoint.manifest import latest_folder, verify_folder
from clt.checkpoint.weights import read_tensors
from clt.distributed.watchdog import EXIT_LOST_RANK
from clt.training.checkpoints import STEP_PATTERN
from clt.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A mesh.

    Attributes:
        world: ranks.
        writers: ranks that write layer files.
        mesh: keys of `mesh`.
    """

    world: int
    writers: int = 1
    mesh: dict[str, Any]


SHAPES = {
    "one": Shape(world=1, mesh={}),
    "data_zero1": Shape(world=2, mesh={"layer": 1, "zero_stage": 1}),
    "data_zero2": Shape(world=2, mesh={"layer": 1, "zero_stage": 2}),
    "layer": Shape(world=2, writers=2, mesh={"layer": 2}),
}
#: What a rank does not wait longer for. A killed one is noticed at once: only a busy machine takes time.
TIMEOUT = 60


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    ranks = Nursery(tmp_path_factory.mktemp("nursery"))
    yield ranks
    ranks.close()


@dataclass
class Outcome:
    """What happened to jobs.

    Attributes:
        kills: by point.
        survivors: exit codes of ranks that were left to find out.
        jobs: how many were trained to their end.
    """

    kills: Counter[str] = field(default_factory=Counter)
    survivors: Counter[int] = field(default_factory=Counter)
    jobs: int = 0


def storm(nursery: Nursery, folder: Path, shape: Shape, blows: list[Blow], whole: Path) -> Outcome:
    """Trains jobs that are killed and started again until every blow has fallen; each must end like `whole`."""
    outcome, waiting = Outcome(), list(blows)
    mesh = {**shape.mesh, "timeout_seconds": TIMEOUT}
    while waiting:
        output, complete, late = folder / f"job-{outcome.jobs}", False, []
        while not complete:
            blow = waiting.pop() if waiting else None
            codes = nursery.run(output, mesh, shape.world, blow)
            complete = not any(codes)
            check_folder(output)
            if blow is not None and codes[blow.victim] != -signal.SIGKILL:
                assert complete, f"{codes}, {blow}; see {nursery.log}"
                late.append(blow.sooner())
            elif blow is not None:
                outcome.kills[blow.point] += 1
                if blow.alone:
                    outcome.survivors[codes[1 - blow.victim]] += 1
                # A rank that has nothing left to do after the other's death ends as if nothing had happened.
                complete = False
            else:
                assert complete, f"{codes}; see {nursery.log}"
        same_end(output, whole)
        outcome.jobs += 1
        waiting += late
    return outcome


def check_folder(output: Path) -> None:
    """Every folder with the name of a checkpoint is one, and the newest is named."""
    for folder in output.glob(STEP_PATTERN):
        verify_folder(folder)
    newest = latest_folder(output)
    assert newest is not None or len(list(output.glob(STEP_PATTERN))) <= 1


def same_end(output: Path, whole: Path) -> None:
    """The last checkpoint has the same bits, the reports the same steps, and nothing is left over."""
    assert not list(output.glob(".*"))
    found, expected = latest_folder(output), latest_folder(whole)
    assert found is not None and expected is not None and found.name == expected.name == "step_00000012"
    for path in sorted(expected.glob("*.safetensors")):
        left, right = read_tensors(path), read_tensors(found / path.name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), path.name
    assert (found / "progress.json").read_text() == (expected / "progress.json").read_text()
    assert [report["step"] for report in read_metrics(output / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]


def undisturbed(nursery: Nursery, folder: Path, shape: Shape) -> Path:
    """The output of a job that nothing happened to."""
    assert nursery.run(folder / "whole", shape.mesh, shape.world, None) == [0] * shape.world
    return folder / "whole"


def test_job_killed_three_times_ends_with_the_same_bits(nursery: Nursery, tmp_path: Path) -> None:
    rng = random.Random(7)
    blows = [
        Blow(point="mid-weights", victim=1, striker=1, arrival=3),
        Blow(point="after-rename", victim=0),
        Blow(point="random", victim=rng.randrange(2), delay=rng.uniform(0, 0.3), alone=True),
    ]
    shape = SHAPES["layer"]
    outcome = storm(nursery, tmp_path, shape, blows, undisturbed(nursery, tmp_path, shape))
    assert outcome.kills.total() == 3
    # The rank that was left names the lost one.
    assert set(outcome.survivors) == {EXIT_LOST_RANK}


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "name"), enumerate(SHAPES))
def test_job_killed_anywhere_ends_with_the_same_bits(seed: int, name: str, nursery: Nursery, tmp_path: Path) -> None:
    shape = SHAPES[name]
    blows = draw_blows(list(POINTS), 6, shape.world, shape.writers, random.Random(seed))
    outcome = storm(nursery, tmp_path, shape, blows, undisturbed(nursery, tmp_path, shape))
    print(f"\n{name}: {outcome.kills.total()} kills in {outcome.jobs} jobs; {dict(outcome.survivors)} ranks left alone")
    print("\n".join(f"{count:5} {point}" for point, count in sorted(outcome.kills.items())))
    assert set(outcome.kills) == {*POINTS, "random"}
    assert set(outcome.survivors) <= {EXIT_LOST_RANK}
