"""Status, repair and garbage collection: no recorded file is lost, and the id is restored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.storage.local import LocalStorage
from clt.capture.storage.open_storage import open_storage
from clt.capture.upkeep.repair import collect_garbage, repair_store
from clt.capture.upkeep.store_status import store_status
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.writing.leases import Leases
from clt.capture.writing.writer import StoreWriter
from clt.errors import StoreError

from ..stores import LENGTHS, make_plan, make_spec, make_store, unit_data
from .damage import capture_rest, everything, flip, put_all, rewrite, tree

ACTS = "data.zarr/acts/lm/c/1/0/0"


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "store", LENGTHS)


def begun(root: Path, *units: int) -> StoreWriter:
    """A store with some committed units."""
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(root, spec, plan)
    for unit in units:
        writer.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    return writer


def present(root: Path | str) -> dict[str, bytes]:
    """Files of a store except those in quarantine."""
    return {key: contents for key, contents in tree(root).items() if not key.startswith("quarantine/")}


def test_status_of_a_complete_store(store: ActivationStore) -> None:
    status = store_status(store.location)
    assert (status.complete, status.store_id) == (True, store.id)
    assert (status.units, status.committed, status.pending, status.leases) == (3, 3, 0, ())
    assert status.tokens == status.planned_tokens == store.num_tokens
    assert status.bytes == sum(map(len, tree(store.location).values()))
    assert (status.garbage_files, status.garbage_bytes, status.quarantine_bytes) == (0, 0, 0)


def test_status_of_a_store_that_is_being_captured(tmp_path: Path) -> None:
    root = tmp_path / "store"
    writer = begun(root, 0, 1)
    (root / "units/commits/000001.json").unlink()
    partial = root / "data.zarr/acts/lm/c/2/0/.0.ab12.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"torn")
    with Leases(writer.storage) as leases:
        assert leases.take(2)
        status = store_status(root)
        ((unit, owner),) = [(lease.unit, lease.owner) for lease in status.leases]
    assert (unit, owner) == (2, leases.owner)
    assert not status.complete
    assert (status.committed, status.pending, status.tokens, status.planned_tokens) == (1, 1, 63, 132)
    # Ten shards and the statistics of unit 1, which has no record, and the partial file.
    assert status.garbage_files == 10 + 1 + 1
    assert store_status(root).leases == (), "given up"
    assert store_status(root).pending == 2


def test_status_of_an_unreadable_store_is_an_error(tmp_path: Path, store: ActivationStore) -> None:
    with pytest.raises(StoreError, match="no activation store here"):
        store_status(tmp_path / "nothing")
    flip(Path(store.location) / "manifest.json", 200)
    with pytest.raises(StoreError, match=r"manifest\.json: contents do not match their hash.*clt store repair"):
        store_status(store.location)


def test_damaged_unit_is_moved_aside_and_captured_again_to_the_same_id(store: ActivationStore) -> None:
    root, before, contents = Path(store.location), tree(store.location), everything(store)
    flip(root / ACTS, 100)
    with pytest.raises(StoreError, match=f"{ACTS}: chunk 0 does not match its checksum.*run 'clt store repair'"):
        open_store(root).read(1, 0, 64, store.sites)
    report = repair_store(root)
    assert [problem.path for problem in report.problems] == [ACTS]
    assert (report.recapture, report.previous_id, report.store_id) == ((1,), store.id, None)
    with pytest.raises(StoreError, match="has not finished"):
        open_store(root)
    status = store_status(root)
    assert (status.committed, status.pending) == (2, 1)
    assert status.quarantine_bytes == sum(len(before[key]) for key, _ in report.moved)
    assert "units/commits/000001.json" in dict(report.moved) and "manifest.json" in dict(report.moved)
    moved = {key: (root / to).read_bytes() for key, to in report.moved}
    assert {key: text for key, text in moved.items() if key != ACTS} == {
        key: before[key] for key in moved if key != ACTS
    }, "nothing is deleted"
    assert capture_rest(root, LENGTHS) == store.id
    assert present(root) == before
    assert everything(open_store(root)) == contents
    assert verify_store(root, "full").ok


def test_repair_of_a_whole_store_changes_nothing(store: ActivationStore, tmp_path: Path) -> None:
    before = tree(store.location)
    report = repair_store(store.location)
    assert (report.problems, report.moved, report.rebuilt, report.store_id) == ((), (), (), store.id)
    assert tree(store.location) == before
    begun(tmp_path / "unfinished", 0)
    before = tree(tmp_path / "unfinished")
    report = repair_store(tmp_path / "unfinished")
    assert (report.problems, report.moved, report.store_id) == ((), (), None)
    assert tree(tmp_path / "unfinished") == before


REBUILT = [
    "manifest.json",
    "store.json",
    "plan.json",
    "data.zarr/zarr.json",
    "data.zarr/acts/lm/zarr.json",
    "data.zarr/stats/lm/mean/zarr.json",
    "data.zarr/stats/lm/mean/c/0/0/0",
]


@pytest.mark.parametrize("harm", [lambda file: flip(file, 20), Path.unlink], ids=["flipped", "missing"])
@pytest.mark.parametrize("key", REBUILT)
def test_derived_files_are_rebuilt(store: ActivationStore, key: str, harm: Callable[[Path], object]) -> None:
    root, before = Path(store.location), tree(store.location)
    harm(root / key)
    report = repair_store(root)
    assert (report.recapture, report.store_id) == ((), store.id)
    assert key in report.rebuilt or (key == "manifest.json" and not report.problems)
    assert present(root) == before
    assert open_store(root).id == store.id


def test_everything_at_once_is_repaired(store: ActivationStore) -> None:
    root, before = Path(store.location), tree(store.location)
    for key in ("store.json", "plan.json", "data.zarr/tokens/zarr.json", "units/stats/000000.safetensors", ACTS):
        flip(root / key, 30)
    (root / "data.zarr/norms/lm/c/2/0").unlink()
    (root / "notes.txt").write_text("mine")
    report = repair_store(root, jobs=2)
    assert report.recapture == (0, 1, 2)
    assert (root / dict(report.moved)["notes.txt"]).read_text() == "mine"
    assert capture_rest(root, LENGTHS) == store.id
    assert present(root) == before
    flip(root / ACTS, 100)
    assert {to.split("/")[1] for _, to in repair_store(root).moved} == {"000002"}, "a second folder"


def test_repair_that_was_cut_short_is_finished_by_the_next(store: ActivationStore, tmp_path: Path) -> None:
    root, before = Path(store.location), tree(store.location)
    flip(root / ACTS, 100)
    flip(root / "store.json", 10)
    damaged = tree(root)
    moves = len(repair_store(root).moved)
    for done in range(0, moves, 4):
        put_all(root, damaged)
        with pytest.raises(InterruptedError):
            repair_store(StopsAfter(root, done))
        repair_store(root)
        assert capture_rest(root, LENGTHS) == store.id
        assert present(root) == before


class StopsAfter(LocalStorage):
    """A folder whose process is stopped at a move."""

    def __init__(self, root: Path, moves: int) -> None:
        super().__init__(root)
        self._left = moves

    def move(self, key: str, to: str) -> None:
        if self._left == 0:
            raise InterruptedError
        self._left -= 1
        super().move(key, to)


def test_irreplaceable_files_must_come_from_a_copy(tmp_path: Path, store: ActivationStore) -> None:
    root = Path(store.location)
    flip(root / "manifest.json", 100)
    flip(root / "store.json", 10)
    before = tree(root)
    with pytest.raises(StoreError, match=r"store\.json cannot be rebuilt from the rest; restore from a copy"):
        repair_store(root)
    assert tree(root) == before
    int8 = tmp_path / "int8"
    make_store(int8, LENGTHS, store_dtype="int8")
    flip(int8 / "quantisation.safetensors", -1)
    before = tree(int8)
    with pytest.raises(StoreError, match=r"quantisation\.safetensors cannot be rebuilt from the rest"):
        repair_store(int8)
    assert tree(int8) == before


def test_damaged_remains_of_a_killed_worker_do_not_stop_the_next(tmp_path: Path) -> None:
    expected, root = make_store(tmp_path / "expected", LENGTHS), tmp_path / "store"
    begun(root, 0, 1)
    (root / "units/commits/000001.json").unlink()
    flip(root / ACTS, 100)
    with pytest.raises(StoreError, match=r"chunk 0 does not match its checksum.*run 'clt store repair'"):
        capture_rest(root, LENGTHS)
    assert repair_store(root).recapture == (1,)
    assert capture_rest(root, LENGTHS) == expected.id


def test_full_repair_moves_damage_that_only_the_values_show(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clt.capture.writing import writer as module

    root = Path(store.location)
    shutil.rmtree(root)
    monkeypatch.setattr(module, "pack_moments", defective(module.pack_moments))
    make_store(root, LENGTHS)
    monkeypatch.undo()
    assert repair_store(root).problems == ()
    assert repair_store(root, level="full").recapture == (0, 1, 2)
    assert capture_rest(root, LENGTHS) == store.id


def defective(pack: Callable[[dict[str, object]], bytes]) -> Callable[[dict[str, object]], bytes]:
    def packed(moments: dict[str, object]) -> bytes:
        for part in moments.values():
            part.mean[1] += 1  # type: ignore[attr-defined]
        return pack(moments)

    return packed


def test_garbage_is_unrecorded_files(tmp_path: Path) -> None:
    root = tmp_path / "store"
    writer = begun(root, 0, 1)
    (root / "units/commits/000001.json").unlink()
    (root / "data.zarr/acts/lm/c/0/0/.0.ab12.partial").write_bytes(b"torn")
    (root / "units/leases").mkdir()
    (root / "units/leases/000002.0001.json").write_text("{}")
    (root / "notes.txt").write_text("mine")
    before = tree(root)
    kept = {key for key in before if key not in {key for key in before if is_garbage(key)}}
    report = collect_garbage(root, dry_run=True)
    assert tree(root) == before and report.dry_run
    assert {entry.key for entry in report.files} == before.keys() - kept
    assert report.bytes == sum(len(before[key]) for key in before.keys() - kept)
    collect_garbage(root)
    assert tree(root).keys() == kept
    assert writer.pending() == [1, 2]
    (root / "notes.txt").unlink()
    assert capture_rest(root, LENGTHS) == make_store(tmp_path / "expected", LENGTHS).id


def is_garbage(key: str) -> bool:
    unit_1 = key.startswith("units/stats/000001") or ("/c/1" in key and "data.zarr" in key)
    return unit_1 or key.endswith(".partial") or key.startswith("units/leases/")


def test_garbage_of_a_complete_store_leaves_the_store(store: ActivationStore) -> None:
    root, before = Path(store.location), tree(store.location)
    assert collect_garbage(root).files == ()
    (root / "units/.x.ab12.partial").write_bytes(b"torn")
    (root / "quarantine/000001").mkdir(parents=True)
    (root / "quarantine/000001/manifest.json").write_text("old")
    assert [entry.key for entry in collect_garbage(root).files] == ["units/.x.ab12.partial"]
    assert [entry.key for entry in collect_garbage(root, quarantine=True).files] == ["quarantine/000001/manifest.json"]
    assert tree(root) == before


def test_nothing_is_moved_or_deleted_during_a_capture(store: ActivationStore) -> None:
    root = Path(store.location)
    flip(root / ACTS, 100)
    (root / "units/.x.ab12.partial").write_bytes(b"torn")
    with Leases(open_storage(root)) as leases:
        assert leases.take(2)
        before = tree(root)
        for work in (repair_store, collect_garbage):
            with pytest.raises(StoreError, match=r"process .* is capturing unit 2; wait for it or stop it"):
                work(root)
        assert tree(root) == before
    assert repair_store(root).recapture == (1,)


class Watched(LocalStorage):
    """A folder that checks, before a file is moved or deleted, that its unit is leased."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.held: list[list[int]] = []

    def move(self, key: str, to: str) -> None:
        self.held.append([lease.unit for lease in Leases(LocalStorage(Path(self.url))).live()])
        super().move(key, to)

    def delete(self, key: str) -> None:
        if not key.startswith("units/leases/"):
            self.held.append([lease.unit for lease in Leases(LocalStorage(Path(self.url))).live()])
        super().delete(key)


def test_units_are_leased_while_their_files_are_touched(store: ActivationStore) -> None:
    root = Path(store.location)
    flip(root / ACTS, 100)
    watched = Watched(root)
    moved = repair_store(watched).moved
    assert watched.held == [[1]] * len(moved)
    (root / "data.zarr/acts/lm/c/1/0/0").parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / dict(moved)["data.zarr/norms/lm/c/1/0"], root / "data.zarr/norms/lm/c/1/0")
    watched = Watched(root)
    assert [entry.key for entry in collect_garbage(watched).files] == ["data.zarr/norms/lm/c/1/0"]
    assert watched.held == [[1]]


def test_finished_units_are_never_garbage(store: ActivationStore) -> None:
    """A lost manifest leaves a store whose units are all committed."""
    root, before = Path(store.location), tree(store.location)
    (root / "manifest.json").unlink()
    assert collect_garbage(root).files == ()
    report = repair_store(root)
    assert (report.problems, report.store_id) == ((), store.id)
    assert tree(root) == before


def test_store_of_another_version_is_left_alone(store: ActivationStore) -> None:
    root = Path(store.location)
    for key in ("store.json", "manifest.json"):
        rewrite(root / key, lambda text: text.replace('"2.1"', '"3.0"'))
    before = tree(root)
    for work in (repair_store, collect_garbage, store_status):
        with pytest.raises(StoreError, match=r"store schema '3\.0', this program reads 2\.1"):
            work(root)
    assert tree(root) == before
