"""Training killed at random moments and at each point of a checkpoint: it resumes, and ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from clt.checkpoint.manifest import latest_folder, verify_folder
from clt.checkpoint.weights import read_tensors
from clt.distributed.watchdog import EXIT_LOST_RANK
from clt.training.checkpoints import STEP_PATTERN
from clt.training.metrics import read_metrics

from ..kill_worker import POINTS, RankKill, Ranks, draw_kills

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
#: Timeout of a rank. A killed one is detected at once: only a busy machine takes time.
TIMEOUT = 60


@dataclass
class Outcome:
    """Outcome of jobs.

    Attributes:
        kills: by point.
        survivors: exit codes of ranks that were left alone.
        jobs: number of jobs trained to their end.
    """

    kills: Counter[str] = field(default_factory=Counter)
    survivors: Counter[int] = field(default_factory=Counter)
    jobs: int = 0


def train_killed(ranks: Ranks, folder: Path, shape: Shape, kills: list[RankKill], whole: Path) -> Outcome:
    """Trains jobs that are killed and started again until every kill has been done; each must end like `whole`."""
    outcome, waiting = Outcome(), list(kills)
    mesh = {**shape.mesh, "timeout_seconds": TIMEOUT}
    while waiting:
        output, complete, late = folder / f"job-{outcome.jobs}", False, []
        while not complete:
            kill = waiting.pop() if waiting else None
            codes = ranks.run(output, mesh, shape.world, kill)
            complete = not any(codes)
            check_folder(output)
            if kill is not None and codes[kill.victim] != -signal.SIGKILL:
                assert complete, f"{codes}, {kill}; see {ranks.log}"
                late.append(kill.sooner())
            elif kill is not None:
                outcome.kills[kill.point] += 1
                if kill.alone:
                    outcome.survivors[codes[1 - kill.victim]] += 1
                # A rank that is done when the other is killed ends normally.
                complete = False
            else:
                assert complete, f"{codes}; see {ranks.log}"
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


def undisturbed(ranks: Ranks, folder: Path, shape: Shape) -> Path:
    """The output of a job that nothing happened to."""
    assert ranks.run(folder / "whole", shape.mesh, shape.world, None) == [0] * shape.world
    return folder / "whole"


def test_job_killed_three_times_ends_with_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    rng = random.Random(7)
    kills = [
        RankKill(point="mid-weights", victim=1, killer=1, arrival=3),
        RankKill(point="after-rename", victim=0),
        RankKill(point="random", victim=rng.randrange(2), delay=rng.uniform(0, 0.3), alone=True),
    ]
    shape = SHAPES["layer"]
    outcome = train_killed(ranks, tmp_path, shape, kills, undisturbed(ranks, tmp_path, shape))
    assert outcome.kills.total() == 3
    # The rank that was left names the lost one.
    assert set(outcome.survivors) == {EXIT_LOST_RANK}


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "name"), enumerate(SHAPES))
def test_job_killed_anywhere_ends_with_the_same_bits(seed: int, name: str, ranks: Ranks, tmp_path: Path) -> None:
    shape = SHAPES[name]
    kills = draw_kills(list(POINTS), 6, shape.world, shape.writers, random.Random(seed))
    outcome = train_killed(ranks, tmp_path, shape, kills, undisturbed(ranks, tmp_path, shape))
    print(f"\n{name}: {outcome.kills.total()} kills in {outcome.jobs} jobs; {dict(outcome.survivors)} ranks left alone")
    print("\n".join(f"{count:5} {point}" for point, count in sorted(outcome.kills.items())))
    assert set(outcome.kills) == {*POINTS, "random"}
    assert set(outcome.survivors) <= {EXIT_LOST_RANK}
