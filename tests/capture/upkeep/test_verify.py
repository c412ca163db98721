"""Verification: every kind of damage is found in one run, and undamaged stores have no problems."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.moments import pack_moments
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.upkeep.verify_unit import Level
from clt.capture.writing import writer as writer_module
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import ConfigError, StoreError
from clt.records import Modality

from ..stores import LENGTHS, TWO_GROUPS, make_plan, make_spec, make_store, unit_data
from .damage import flip, put_all, rewrite, tree

LEVELS: tuple[Level, ...] = ("index", "chunk", "full")
FORMATS: dict[str, dict[str, Any]] = {
    "raw": {"store_dtype": "bfloat16"},
    "float32 zstd": {"compression": "zstd"},
    "int8": {"store_dtype": "int8"},
    "two groups": {"groups": TWO_GROUPS, "store_dtype": "int8", "compression": "zstd"},
}


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "store", LENGTHS)


def paths(location: str | Path, level: Level = "chunk") -> list[str]:
    return [problem.path for problem in verify_store(location, level).problems]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", list(FORMATS))
def test_whole_store_has_no_problems(tmp_path: Path, kind: str, level: Level) -> None:
    store = make_store(tmp_path / "store", LENGTHS, **FORMATS[kind])
    report = verify_store(tmp_path / "store", level, jobs=2)
    assert report.ok and report.problems == ()
    assert (report.store_id, report.complete) == (store.id, True)
    assert (report.units, report.committed, report.checked) == (3, 3, 3)
    total = sum(map(len, tree(tmp_path / "store").values()))
    if level != "index":
        assert report.bytes == total - (tmp_path / "store/manifest.json").stat().st_size
    else:
        assert 0 < report.bytes < total


def test_store_in_an_object_store_is_verified_too(store: ActivationStore) -> None:
    pytest.importorskip("obstore")
    remote = open_storage("memory://test_verify")
    for key, contents in tree(store.location).items():
        assert remote.put(key, contents)
    report = verify_store(remote, "full")
    assert report.ok and report.store_id == store.id
    remote.delete("data.zarr/norms/lm/c/1/0")
    assert [problem.path for problem in verify_store(remote, "index").problems] == ["data.zarr/norms/lm/c/1/0"]


def test_all_problems_are_found_in_one_run_with_their_remedies(store: ActivationStore) -> None:
    root = Path(store.location)
    flip(root / "data.zarr/acts/lm/c/0/0/0", 100)
    (root / "data.zarr/tokens/modality/c/1").unlink()
    (root / "data.zarr/acts/lm/zarr.json").write_text("{}")
    flip(root / "units/stats/000002.safetensors", -1)
    (root / "notes.txt").write_text("mine")
    report = verify_store(root)
    assert not report.ok
    assert {(problem.path, problem.unit) for problem in report.problems} == {
        ("data.zarr/acts/lm/zarr.json", None),
        ("notes.txt", None),
        ("data.zarr/acts/lm/c/0/0/0", 0),
        ("data.zarr/tokens/modality/c/1", 1),
        ("units/stats/000002.safetensors", 2),
    }
    for problem in report.problems:
        assert str(root / problem.path) in problem.message and "\n" not in problem.message
        assert "clt store" in problem.message
    assert any("chunk 0 does not match its checksum" in problem.message for problem in report.problems)
    text = json.loads(report.to_json())
    assert text["ok"] is False and len(text["problems"]) == 5


#: Damage by level: the file, its damage, and the lowest level that detects it.
DAMAGE: dict[str, tuple[str, Callable[[Path], object], Level]] = {
    "missing shard": ("data.zarr/acts/lm/c/1/0/0", Path.unlink, "index"),
    "truncated shard": ("data.zarr/acts/lm/c/1/0/0", lambda f: f.write_bytes(f.read_bytes()[:-1]), "index"),
    "longer shard": ("data.zarr/norms/lm/c/1/0", lambda f: f.write_bytes(f.read_bytes() + b"x"), "index"),
    "flipped index": ("data.zarr/acts/lm/c/1/0/0", lambda f: flip(f, -20), "index"),
    "flipped payload": ("data.zarr/acts/lm/c/1/0/0", lambda f: flip(f, 7), "chunk"),
    "flipped chunk checksum": ("data.zarr/tokens/sample/c/1", lambda f: flip(f, 16 * 8 + 1), "chunk"),
    "another unit's shard": ("data.zarr/tokens/token_id/c/1", lambda f: swap(f, f.parent / "0"), "chunk"),
    "exchanged chunks": ("data.zarr/acts/lm/c/1/0/0", lambda f: exchange(f, 16 * 4 * 4 + 4), "chunk"),
    "metadata": ("data.zarr/tokens/zarr.json", lambda f: flip(f, 5), "index"),
    "statistics of a unit": ("units/stats/000001.safetensors", lambda f: flip(f, -3), "index"),
    "merged statistics": ("data.zarr/stats/lm/mean/c/0/0/0", lambda f: flip(f, 3), "index"),
    "commit record": (
        "units/commits/000001.json",
        lambda f: rewrite(f, lambda t: t.replace("sample-3", "sample-4")),
        "index",
    ),
    "store.json": ("store.json", lambda f: rewrite(f, lambda t: t.replace('"seed": 0', '"seed": 1')), "index"),
    "plan.json": ("plan.json", lambda f: rewrite(f, lambda t: t.replace("63", "62")), "index"),
    "manifest": ("manifest.json", lambda f: rewrite(f, lambda t: t.replace('"n_tokens":63', '"n_tokens":62')), "index"),
}


def exchange(shard: Path, size: int) -> None:
    """Swaps the first two chunks of a shard."""
    contents = shard.read_bytes()
    shard.write_bytes(contents[size : 2 * size] + contents[:size] + contents[2 * size :])


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_found_from_its_level_on(tmp_path: Path, store: ActivationStore, name: str) -> None:
    key, harm, lowest = DAMAGE[name]
    harm(Path(store.location) / key)
    for level in LEVELS:
        detected = LEVELS.index(level) >= LEVELS.index(lowest)
        assert (key in paths(store.location, level)) == detected, level


@pytest.mark.parametrize("level", LEVELS)
def test_unrecorded_files_are_problems(store: ActivationStore, level: Level) -> None:
    root = Path(store.location)
    foreign = ["notes.txt", "data.zarr/acts/lm/c/3/0/0", "units/commits/000003.json", "data.zarr/tokens/.zattrs"]
    allowed = ["units/leases/000001.0001.json", "quarantine/000001/manifest.json", "data.zarr/.x.ab12.partial"]
    for key in (*foreign, *allowed):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_text("{}")
    assert sorted(paths(root, level)) == sorted(foreign)


def test_unfinished_store_is_verified_as_far_as_it_is_committed(tmp_path: Path) -> None:
    spec, plan, root = make_spec(), make_plan(LENGTHS), tmp_path / "store"
    writer = StoreWriter(root, spec, plan)
    assert verify_store(root).ok
    for unit in (0, 2):
        writer.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    (root / "units/commits/000002.json").unlink()
    report = verify_store(root, "full")
    assert report.ok and not report.complete and report.store_id is None
    assert (report.units, report.committed) == (3, 1)
    flip(root / "data.zarr/norms/lm/c/0/0", 3)
    flip(root / "data.zarr/acts/lm/c/2/0/0", 3)
    (root / "data.zarr/tokens/zarr.json").write_text("{}")
    (root / "notes.txt").write_text("mine")
    assert paths(root) == [
        *("data.zarr/tokens/zarr.json", "notes.txt"),
        *("data.zarr/norms/lm/c/0/0", "data.zarr/acts/lm/c/2/0/0"),
    ]


def test_records_that_all_name_another_store_speak_against_its_description(tmp_path: Path) -> None:
    spec, plan, root = make_spec(), make_plan(LENGTHS), tmp_path / "store"
    writer = StoreWriter(root, spec, plan)
    for unit in (0, 1):
        writer.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    before = tree(root)
    rewrite(root / "store.json", lambda text: text.replace('"seed": 0', '"seed": 4'))
    assert paths(root) == ["store.json"]
    put_all(root, before)
    rewrite(root / "units/commits/000001.json", lambda text: text.replace(writer.digest, "0" * 64))
    assert paths(root) == ["units/commits/000001.json"]


@pytest.mark.parametrize(
    ("answers", "fit"),
    [((), True), ((1, 0, 12), True), ((1, 0), False), ((1, -1, 0), False), ((1, 30, 0), True), ((1, 31, 0), False)],
)
def test_answers_must_fit_their_samples(tmp_path: Path, answers: tuple[int, ...], fit: bool) -> None:
    spec, plan, root = make_spec(), make_plan(LENGTHS), tmp_path / "store"
    data = unit_data(LENGTHS, plan.samples(0), spec)
    assert data.sample_tokens == (20, 30, 13)
    StoreWriter(root, spec, plan).commit(0, replace(data, answer_tokens=answers))
    report = verify_store(root)
    assert report.ok == fit
    assert fit or "answer lengths do not match its samples" in str(report.problems)


@pytest.mark.parametrize("version", ["1.0", "3.0"])
def test_store_of_another_major_version_is_no_damage_but_an_error(store: ActivationStore, version: str) -> None:
    root = Path(store.location)
    rewrite(root / "store.json", lambda text: text.replace('"2.1"', f'"{version}"'))
    assert paths(root) == ["store.json"], "one file of another version is damage"
    rewrite(root / "manifest.json", lambda text: text.replace('"2.1"', f'"{version}"'))
    with pytest.raises(StoreError, match=f"manifest.json: store schema '{version}', this program reads 2.1"):
        verify_store(root)


def test_sample_of_the_units_is_a_share_and_follows_the_seed(tmp_path: Path) -> None:
    lengths = [16] * 10
    root = tmp_path / "store"
    make_store(root, lengths, rows_per_unit=16)
    report = verify_store(root, sample=0.3)
    assert report.ok and report.checked == 3
    for unit in range(10):
        flip(root / f"data.zarr/acts/lm/c/{unit}/0/0", 1)
    found = {seed: paths_of(root, sample=0.3, seed=seed) for seed in range(8)}
    assert all(len(units) == 3 for units in found.values())
    assert paths_of(root, sample=0.3, seed=5) == found[5]
    assert len({units for units in found.values()}) > 1
    assert len(paths_of(root, sample=1e-9, seed=0)) == 1
    (root / "data.zarr/acts/lm/c/7/0/0").unlink()
    for seed in range(8):
        assert 7 in paths_of(root, sample=0.1, seed=seed), "a missing file is found in any case"


def paths_of(root: Path, *, sample: float, seed: int) -> frozenset[int]:
    report = verify_store(root, sample=sample, seed=seed, jobs=3)
    return frozenset(problem.unit for problem in report.problems if problem.unit is not None)


def test_settings_that_make_no_sense_are_errors(store: ActivationStore, tmp_path: Path) -> None:
    for sample in (0.0, 1.5):
        with pytest.raises(ConfigError, match="must be a fraction of the units"):
            verify_store(store.location, sample=sample)
    with pytest.raises(ConfigError, match="level='bytes' is unknown; use one of index, chunk, full"):
        verify_store(store.location, "bytes")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no activation store here"):
        verify_store(tmp_path / "nothing")


def captured_wrong(root: Path, change: Callable[[UnitData], UnitData], **changes: Any) -> list[tuple[str, str]]:
    """Problems of a store whose unit 1 was captured by a faulty program: all checksums match."""
    spec, plan = make_spec(**changes), make_plan(LENGTHS)
    writer = StoreWriter(root, spec, plan)
    for unit in range(3):
        data = unit_data(LENGTHS, plan.samples(unit), spec)
        if not writer.calibrated:
            writer.calibrate(data.acts)
        writer.commit(unit, change(data) if unit == 1 else data)
    writer.finalize()
    assert verify_store(root, "chunk").ok
    problems = verify_store(root, "full").problems
    assert {problem.unit for problem in problems} <= {1}
    return [(problem.path, problem.message) for problem in problems]


def with_tokens(**columns: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[UnitData], UnitData]:
    def change(data: UnitData) -> UnitData:
        changed = {name: make(getattr(data.tokens, name).clone()) for name, make in columns.items()}
        return replace(data, tokens=replace(data.tokens, **changed))

    return change


def set_at(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(column: torch.Tensor) -> torch.Tensor:
        column[index] = value
        return column

    return change


WRONG_TOKENS = {
    "position": (with_tokens(position=set_at(9, 8)), "1 rows have a position that differs from the plan"),
    "sample": (with_tokens(sample=set_at(9, 0)), "1 rows have a sample that differs from the plan"),
    "modality": (with_tokens(modality=set_at(9, 4)), "1 rows have no valid token class"),
    "patch_row": (with_tokens(patch_row=set_at(9, 3)), "1 text tokens have a patch_row"),
    "image": (
        with_tokens(modality=set_at(9, Modality.IMAGE), patch_row=set_at(9, 0), patch_col=set_at(9, 0)),
        "1 image tokens have no image",
    ),
}


@pytest.mark.parametrize("column", list(WRONG_TOKENS))
def test_full_level_finds_tokens_that_are_not_the_plans(tmp_path: Path, column: str) -> None:
    change, message = WRONG_TOKENS[column]
    problems = captured_wrong(tmp_path / "store", change)
    assert problems[0][0] == f"data.zarr/tokens/{column}/c/1" and message in problems[0][1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_full_level_finds_values_that_are_not_finite(tmp_path: Path, value: float, store_dtype: str) -> None:
    def change(data: UnitData) -> UnitData:
        acts = data.acts["lm"].clone()
        acts[5, 2, 1] = value
        return replace(data, acts={"lm": acts})

    ((path, message),) = captured_wrong(tmp_path / "store", change, store_dtype=store_dtype)[:1]
    assert path == "data.zarr/acts/lm/c/1/0/0" and "1 values are NaN or infinite" in message


def test_full_level_finds_another_order_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "unit_permutation", lambda n, seed, unit: np.arange(n))
    make_store(tmp_path / "store", LENGTHS)
    found = paths(tmp_path / "store", "full")
    assert {f"data.zarr/tokens/natural_index/c/{unit}" for unit in range(3)} <= set(found)


@pytest.mark.parametrize("field", ["count", "mean", "m2", "absmax", "norm", "error"])
def test_full_level_finds_statistics_of_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    def tampered(moments: dict[str, Any]) -> bytes:
        values = getattr(moments["lm"], field).clone()
        values.view(-1)[3] = -1 if field == "error" else values.view(-1)[3] * 1.001 + 1
        return pack_moments({"lm": replace(moments["lm"], **{field: values})})

    monkeypatch.setattr(writer_module, "pack_moments", tampered)
    make_store(tmp_path / "store", LENGTHS)
    assert verify_store(tmp_path / "store").ok
    problems = verify_store(tmp_path / "store", "full").problems
    assert {problem.path for problem in problems} >= {f"units/stats/{unit:06d}.safetensors" for unit in range(3)}
    assert f"{field} of group 'lm' does not match the stored activations" in problems[-1].message


def test_full_level_finds_merged_statistics_of_other_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: ActivationStore
) -> None:
    from clt.capture.writing import build_manifest as finalize

    merged = finalize.merged_moments

    def without_last(storage: Any, units: Any, groups: Any) -> Any:
        return merged(storage, units[:-1], groups)

    monkeypatch.setattr(finalize, "merged_moments", without_last)
    make_store(tmp_path / "wrong", LENGTHS)
    monkeypatch.undo()
    (problem,) = verify_store(tmp_path / "wrong", "full").problems
    assert (
        problem.path.startswith("data.zarr/stats/lm/") and "does not match the moments of the units" in problem.message
    )
    assert open_store(tmp_path / "wrong").stats(store.sites).count == 127
