"""Store benchmark: all readers and writers are timed alike, wrong bytes are an error. Speed is not tested here.

Measured speeds are in benchmarks/store.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clt.errors import StoreError
from clt.launch.bench.common.machine import describe, this_machine
from clt.launch.bench.common.report import claim
from clt.launch.bench.common.timing import TimedRun, interleave
from clt.launch.bench.store.data import BenchStore, Bits, Layout, ReadBlock, random_bits
from clt.launch.bench.store.files import readers
from clt.launch.bench.store.peers import MEMMAP, PEERS, Peer
from clt.launch.bench.store.report import StoreBenchReport
from clt.launch.bench.store.run import StoreBenchSettings, bench_store

SMALL = Layout(tokens=128, sites=2, width=8, chunk_tokens=8, shard_tokens=32)


def _peer(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> StoreBenchReport:
    absent = replace(_peer(MEMMAP), name="nobody", module="clt_has_no_such_module")
    folder = tmp_path_factory.mktemp("bench")
    report = bench_store(StoreBenchSettings(folder=folder, size_mib=8, rounds=1), (*PEERS, absent))
    assert not list(folder.iterdir()), "the benchmark leaves nothing behind"
    return report


class _Clock:
    """A clock that is set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_runs_take_turns_and_keep_their_own_best_and_median() -> None:
    wall, cpu, log = _Clock(), _Clock(), []
    durations = {"a": iter([3.0, 1.0, 2.0]), "b": iter([10.0, 30.0, 50.0])}

    def run(name: str) -> None:
        log.append(name)
        seconds = next(durations[name])
        wall.now += seconds
        cpu.now += 2 * seconds

    def prepare() -> None:  # must not count
        log.append("before")
        wall.now += 100

    runs = [TimedRun(name="a", run=lambda: run("a")), TimedRun(name="b", run=lambda: run("b"), before=prepare)]
    timings = interleave(runs, 3, wall=wall, cpu=cpu)
    assert log == ["a", "before", "b", "before", "b", "a", "a", "before", "b"]
    assert timings["a"].wall_s == (3, 1, 2) and timings["b"].cpu_s == (20, 60, 100)
    assert (timings["a"].best_s, timings["a"].median_s) == (1, 2)
    assert (timings["b"].best_cpu_s, timings["b"].median_cpu_s) == (20, 60)


def test_machine_names_what_a_measurement_depends_on(tmp_path: Path) -> None:
    machine = this_machine(["numpy", "clt-has-no-such-package"], tmp_path)
    assert [package.name for package in machine.packages] == ["numpy"]
    assert machine.cpu and machine.cores >= 1 and machine.memory_mib > 0 and machine.kernel
    for part in (machine.cpu, machine.kernel, machine.date, machine.python, f"numpy {np.__version__}"):
        assert part in describe(machine)


@pytest.mark.parametrize(("ours", "theirs", "ok"), [(10.0, 2.0, True), (9.0, 2.0, False), (None, 2.0, None)])
def test_claim_is_judged_by_its_ratio(ours: float | None, theirs: float | None, ok: bool | None) -> None:
    assert claim("speed", ours, theirs, ">=", 5).ok is ok
    assert claim("cost", theirs, ours, "<=", 0.2).ok is ok


def test_every_peer_has_a_row_with_positive_numbers_in_every_table(report: StoreBenchReport) -> None:
    keys = {table.key for table in report.tables}
    kinds = ("write", "write+fsync", "read", "cold")
    assert keys == {f"{shape}/{kind}" for shape in ("blocks", "chunks") for kind in kinds} | {
        "delivery/bfloat16",
        "delivery/float32",
    }
    for table in report.tables:
        assert table.rows[0].name.startswith("clt") and table.rows[0].checksums
        for row in table.rows:
            if row.absent is None:
                assert len(row.wall_s) == len(row.cpu_s) == table.rounds
                assert row.gb_per_s is not None and row.gb_per_s > 0
                assert row.cpu_s_per_gb is not None and row.cpu_s_per_gb > 0
    for key in ("blocks/read", "chunks/write"):
        table = next(table for table in report.tables if table.key == key)
        names = [row.name for row in table.rows]
        assert [peer.name for peer in PEERS if peer.writes or key.endswith("read")] == [
            name for name in names if not name.startswith("clt") and name not in ("memcpy", "nobody")
        ]


def test_library_that_is_missing_is_reported_as_such(report: StoreBenchReport) -> None:
    row = next(table for table in report.tables if table.key == "blocks/read").row("nobody")
    assert row is not None and row.absent == "not installed" and row.gb_per_s is None
    assert "| nobody |  | not installed |" in report.to_text()


def test_report_is_json_and_lists_every_claim_with_its_ratio(report: StoreBenchReport) -> None:
    tree = json.loads(report.to_json())
    assert {entry["bound"] for entry in tree["claims"]} == {5, 0.5, 2, 0.6}
    for entry in tree["claims"]:
        holds = (
            entry["measured"] >= entry["bound"] if entry["relation"] == ">=" else entry["measured"] <= entry["bound"]
        )
        assert entry["ok"] is holds
        assert entry["text"] in report.to_text()


def test_cost_of_a_token_follows_from_layers_and_width(report: StoreBenchReport) -> None:
    costs = {entry.model: entry.bytes_per_token for entry in report.models}
    assert costs["toy"] == 4_096 and costs["Gemma-2-2B"] == 239_616 and costs["LLaVA-1.5-7B"] == 524_288
    toy, llava = report.models[0].tokens_per_s, report.models[-1].tokens_per_s
    assert toy.keys() == llava.keys() and all(toy[key] == pytest.approx(128 * llava[key]) for key in toy)


def test_store_of_the_benchmark_holds_the_random_bits_in_another_order(tmp_path: Path) -> None:
    store = BenchStore.make(tmp_path / "store", SMALL)
    written, stored = random_bits(SMALL), store.expected
    assert not np.array_equal(written, stored)
    for unit in (slice(0, 32), slice(96, 128)):
        assert sorted(map(bytes, written[unit])) == sorted(map(bytes, stored[unit]))


def test_peer_that_reads_one_wrong_bit_is_not_timed(tmp_path: Path) -> None:
    store = BenchStore.make(tmp_path / "store", SMALL)
    good = _peer(MEMMAP)

    @contextmanager
    def open_wrongly(path: Path, layout: Layout) -> Iterator[ReadBlock]:
        with good.open(path, layout) as read:

            def wrong(block: int, out: Bits) -> None:
                read(block, out)
                out[-1, -1, -1] ^= int(block == layout.blocks - 1)

            yield wrong

    liar = replace(good, name="liar", open=open_wrongly)
    with pytest.raises(AssertionError, match="liar: block 15 is read wrongly"), readers(store, (good, liar), tmp_path):
        raise NotImplementedError("timed")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_folder_that_is_missing_or_too_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="--folder"):
        bench_store(StoreBenchSettings(folder=tmp_path / "none"))
    with pytest.raises(StoreError, match="--size"):
        bench_store(StoreBenchSettings(folder=tmp_path, size_mib=2**40))
