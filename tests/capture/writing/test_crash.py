"""Workers that are killed, paused and set against each other: no token is torn, lost or written twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.storage.local import LocalStorage
from clt.capture.store.committed_units import unit_moments
from clt.capture.store.moments import measure
from clt.capture.store.schema import SiteGroup, StoreDtype
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.writing.leases import LEASES, Leases

from ...worker_processes import Kill
from .crash_worker import (
    ANOTHER_COMMITTED,
    GROUPS,
    LENGTHS,
    POINTS,
    WORKERS,
    CaptureWorkers,
    activations,
    make_plan,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")

DTYPES: tuple[StoreDtype, ...] = ("bfloat16", "int8", "float32")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaptureWorkers]:
    server = CaptureWorkers(tmp_path_factory.mktemp("workers"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(workers: CaptureWorkers, tmp_path_factory: pytest.TempPathFactory) -> dict[StoreDtype, Path]:
    """Stores of a single worker that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for store_dtype in DTYPES:
        workers.start(folder / store_dtype, store_dtype)
        assert workers.wait_for()[1] == 0
    return {store_dtype: folder / store_dtype for store_dtype in DTYPES}


def draw_kills(named: Mapping[str, int], at_random: int, rng: random.Random) -> list[Kill]:
    """So many kills at each named point, and at random times, in random order."""
    often = {"mid-chunk": 40, "after-lease": 3, "mid-link": 4, "after-link": 4, "before-commit": 3, "after-commit": 3}
    kills = [Kill(point=p, arrival=rng.randint(1, often.get(p, 1))) for p, n in named.items() for _ in range(n)]
    kills += [Kill(point="random", delay=rng.uniform(0.0, 0.6)) for _ in range(at_random)]
    rng.shuffle(kills)
    return kills


@dataclass
class Outcome:
    """Outcome of the workers of a store.

    Attributes:
        kills: by point.
        steps: last steps of workers that were killed at random.
        missed: kills whose workers finished first.
        twice: workers that captured a unit that another had committed.
    """

    kills: Counter[str]
    steps: Counter[str]
    missed: list[Kill]
    twice: int = 0


def capture_killed(workers: CaptureWorkers, root: Path, store_dtype: StoreDtype, kills: list[Kill]) -> Outcome:
    """Captures a store with three workers at a time; when one is killed, another takes its place."""
    outcome = Outcome(Counter(), Counter(), [])
    waiting = list(kills)
    running: dict[int, tuple[int, Kill | None, Path, threading.Timer]] = {}
    complete = False
    while running or not complete:
        while len(running) < WORKERS and not complete:
            kill = waiting.pop() if waiting else None
            rank = min(set(range(WORKERS)) - {rank for rank, *_ in running.values()})
            named = {"point": kill.point, "arrival": kill.arrival} if kill and kill.point in POINTS else {}
            process, trace = workers.start(root, store_dtype, rank=rank, **named)
            timer = threading.Timer(kill.delay if kill else 0, workers.kill, (process,))
            if kill and not named:
                timer.start()
            running[process] = rank, kill, trace, timer
        process, code = workers.wait_for()
        _, kill, trace, timer = running.pop(process)
        timer.cancel()
        if code == -signal.SIGKILL:
            assert kill is not None
            outcome.kills[kill.point] += 1
            if kill.point == "random":
                step, _, key = trace.read_text().strip().partition(" ") if trace.exists() else ("start", "", "")
                outcome.steps[f"{step} {'/'.join(key.split('/')[:2])}".strip()] += 1
        else:
            complete = True
            outcome.twice += code == ANOTHER_COMMITTED
            outcome.missed += [kill] if kill else []
    outcome.missed += waiting
    return outcome


def tree(root: Path) -> dict[str, bytes]:
    """Contents of all files of a store but leases and partial files."""
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        key: path.read_bytes()
        for key, path in files.items()
        if not key.startswith(LEASES) and not key.endswith(".partial")
    }


def assert_same(root: Path, expected: Path) -> None:
    found, wanted = tree(root), tree(expected)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key] != wanted[key]] == []
    assert Leases(LocalStorage(root)).live() == []
    report = verify_store(root, level="full")
    assert report.ok and report.complete, report.problems


def rounded(group: SiteGroup, sample: Tensor, position: Tensor, store: ActivationStore, variant: int) -> Tensor:
    """Expected contents of a store of bfloat16 or float32."""
    return activations(sample, position, group, variant).to(store.stored_dtype)


def read_scales(store: ActivationStore, unit: int, group: SiteGroup) -> Tensor:
    """[n, S] scales of an int8 store."""
    scales = torch.empty(store.spec.rows_per_unit, len(group.sites))
    for block, part in enumerate(scales.split(store.spec.chunk_tokens)):
        store.read_scales_into(unit, block, group.name, part.numpy())
    return scales[: store.units[unit].n_tokens]


@pytest.mark.parametrize("store_dtype", DTYPES)
def test_undisturbed_store_holds_every_token_once_and_exactly(
    undisturbed: dict[StoreDtype, Path], store_dtype: StoreDtype
) -> None:
    store = open_store(undisturbed[store_dtype])
    seen: list[tuple[int, int]] = []
    for unit in store.units:
        tokens = store.tokens(unit.unit)
        seen += zip(tokens.sample.tolist(), tokens.position.tolist(), strict=True)
        for group in GROUPS:
            values = store.read(unit.unit, 0, unit.n_tokens, group.sites)
            if store_dtype == "int8":
                step = read_scales(store, unit.unit, group)[..., None] * store.standardiser(group.name).std
                error = values - activations(tokens.sample, tokens.position, group)
                # 1e-6: rounding of float32 on the way there and back.
                assert (error.abs() <= step / 2 + 1e-6).all()
            else:
                assert torch.equal(values, rounded(group, tokens.sample, tokens.position, store, 0))
    assert sorted(seen) == [(s, p) for s, length in enumerate(LENGTHS) for p in range(length)]
    assert verify_store(undisturbed[store_dtype], level="full").ok


def capture_all(
    workers: CaptureWorkers, undisturbed: dict[StoreDtype, Path], folder: Path, kills: list[Kill], per_store: int
) -> Outcome:
    """Captures new stores, each of which must end like the undisturbed one, until every kill has been done."""
    total = Outcome(Counter(), Counter(), kills)
    stores = 0
    while total.missed:
        store_dtype = DTYPES[stores % len(DTYPES)]
        root = folder / f"store-{stores}"
        outcome = capture_killed(workers, root, store_dtype, total.missed[:per_store])
        assert_same(root, undisturbed[store_dtype])
        total.kills += outcome.kills
        total.steps += outcome.steps
        total.twice += outcome.twice
        # Those that came too late come first in the next store, and sooner.
        total.missed = [kill.sooner() for kill in outcome.missed] + total.missed[per_store:]
        stores += 1
    print(f"\n{total.kills.total()} kills in {stores} stores, {total.twice} units captured twice")
    print("\n".join(f"{count:5} {point}" for point, count in sorted(total.kills.items())))
    print("last steps of workers killed at random:")
    print("\n".join(f"{count:5} {step}" for step, count in sorted(total.steps.items())))
    return total


def test_five_kills_leave_the_store_of_an_undisturbed_worker(
    workers: CaptureWorkers, undisturbed: dict[StoreDtype, Path], tmp_path: Path
) -> None:
    named = dict.fromkeys(("mid-chunk", "after-link", "before-commit", "mid-manifest"), 1)
    kills = draw_kills(named, 1, random.Random(0))
    assert capture_all(workers, undisturbed, tmp_path, kills, 5).kills.total() == 5


@pytest.mark.slow
def test_two_hundred_kills_leave_the_store_of_an_undisturbed_worker(
    workers: CaptureWorkers, undisturbed: dict[StoreDtype, Path], tmp_path: Path
) -> None:
    kills = draw_kills(dict.fromkeys(POINTS, 12), 88, random.Random(1))
    done = capture_all(workers, undisturbed, tmp_path, kills, 12).kills
    assert done.total() >= 200 and done["random"] == 88
    assert all(done[point] >= 10 for point in POINTS)


def winners(store: ActivationStore, unit: int) -> list[int]:
    """Variant of each group of a unit, all of it; its statistics must be those of its contents."""
    tokens, n = store.tokens(unit), store.units[unit].n_tokens
    recorded = unit_moments(store.storage, store.commit(unit), GROUPS)
    found = []
    for group in GROUPS:
        values = store.read(unit, 0, n, group.sites)
        if store.stored_dtype == torch.int8:
            scales = read_scales(store, unit, group)
            standardiser = store.standardiser(group.name)
            expected = [
                standardiser.restore(
                    standardiser.quantise(activations(tokens.sample, tokens.position, group, variant), scales), scales
                )
                for variant in (0, 1)
            ]
        else:
            expected = [rounded(group, tokens.sample, tokens.position, store, variant) for variant in (0, 1)]
        (variant,) = (variant for variant in (0, 1) if torch.equal(values, expected[variant]))
        found.append(variant)
        natural = torch.argsort(store.natural_index(unit))
        moments, norms = measure(
            values.shape, tokens.modality[natural], lambda site, rows, v=values, o=natural: (v[o[rows], site], None)
        )
        for name in ("count", "mean", "m2", "absmax", "norm"):
            assert torch.equal(getattr(moments, name), getattr(recorded[group.name], name)), name
        assert torch.equal(norms, store.norms(unit, group.name)[natural])
    return found


@pytest.mark.parametrize("store_dtype", ["bfloat16", "int8"])
def test_of_two_racing_owners_one_commits_and_the_other_is_refused(
    workers: CaptureWorkers, tmp_path: Path, store_dtype: StoreDtype
) -> None:
    root = tmp_path / "store"
    n_units = make_plan().n_units
    for unit in range(n_units):
        gate = tmp_path / f"gate-{unit}"
        for variant in (0, 1):
            workers.start(root, store_dtype, unit=unit, variant=variant, gate=str(gate))
        while len(list(tmp_path.glob(f"gate-{unit}-*"))) < 2:
            time.sleep(0.001)
        gate.touch()
        assert sorted(workers.wait_for()[1] for _ in range(2)) == [0, ANOTHER_COMMITTED]
    workers.start(root, store_dtype)
    assert workers.wait_for()[1] == 0
    assert verify_store(root, level="full").ok
    store = open_store(root)
    print(store_dtype, Counter(map(tuple, (winners(store, unit) for unit in range(n_units)))))


@pytest.mark.parametrize(
    ("point", "store_dtype"),
    [
        ("mid-chunk", "int8"),
        ("mid-link", "float32"),
        ("after-link", "int8"),
        ("before-commit", "float32"),
        ("mid-commit", "int8"),
        ("after-commit", "float32"),
    ],
)
def test_a_worker_resumed_after_its_unit_was_taken_over_changes_nothing(
    workers: CaptureWorkers, tmp_path: Path, point: str, store_dtype: StoreDtype
) -> None:
    root = tmp_path / "store"
    job = {"ttl_seconds": 0.3}
    paused, _ = workers.start(root, store_dtype, variant=1, point=point, signal=signal.SIGSTOP, **job)
    assert workers.wait_for(paused) == (paused, -signal.SIGSTOP)
    other, _ = workers.start(root, store_dtype, **job)
    assert workers.wait_for(other) == (other, 0)
    before = tree(root)
    os.kill(paused, signal.SIGCONT)
    expected = 0 if point == "after-commit" else ANOTHER_COMMITTED
    assert workers.wait_for(paused) == (paused, expected)
    assert tree(root) == before
    assert not any((root / LEASES).iterdir())
    assert verify_store(root, level="full").ok
    store = open_store(root)
    # Files that the paused worker had published are adopted; the rest is the other's.
    kept = {"mid-chunk": [0, 0], "mid-link": [1, 0], "after-link": [1, 0]}.get(point, [1, 1])
    assert [winners(store, unit.unit) for unit in store.units] == [kept] + [[0, 0]] * (len(store.units) - 1)
