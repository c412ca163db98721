"""Corruption: every read method returns the right values or an error, and verification detects any changed byte."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.store.schema import MANIFEST
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.writing.writer import StoreWriter
from clt.errors import StoreError

from ..stores import LENGTHS, make_plan, make_spec, make_store, unit_data
from .damage import TINY, TINY_SPEC, everything, flip, rewrite, tree

COMMITTED = ["data.zarr/acts/lm/c/1/0/0", "data.zarr/tokens/modality/c/0", "units/stats/000002.safetensors"]


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "store", LENGTHS)


@dataclass
class Sweep:
    """Outcomes of single damaged bytes.

    Attributes:
        detected: verification named the file.
        harmless: it did not, and every reader gave the same as before.
        refused: the readers said so themselves.
    """

    detected: int = 0
    harmless: int = 0
    refused: int = 0

    def run(self, root: Path, spots: Iterable[tuple[str, int, int]], values: str, read_every: int = 1) -> Sweep:
        """Damages one byte at a time: the file, the byte, and the bits that change.

        The readers run whenever verification detects nothing, and at regular spots in any case.
        """
        for number, (key, position, bits) in enumerate(spots):
            contents = (root / key).read_bytes()
            damaged = bytearray(contents)
            damaged[position] ^= bits
            (root / key).write_bytes(damaged)
            try:
                self._look(root, key, values, number % read_every == 0)
            finally:
                (root / key).write_bytes(contents)
        return self

    def _look(self, root: Path, key: str, values: str, read: bool) -> None:
        problems = verify_store(root, "chunk").problems
        assert {problem.path for problem in problems} <= {key}
        self.detected += bool(problems)
        self.harmless += not problems
        if problems and not read:
            return
        try:
            store = open_store(root)
            same = everything(store) == values
            if key.endswith("zarr.json"):
                assert store.zarr is not None
        except StoreError as error:
            assert key in str(error) and "\n" not in str(error)
            assert problems, f"{key}: readers detect it, verification does not"
            self.refused += 1
        else:
            assert same, f"{key}: damage is read as data"


@pytest.fixture
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    store = make_store(tmp_path / "tiny", TINY, **TINY_SPEC, **request.param)
    assert [unit.n_tokens for unit in store.units] == [3, 2]
    assert verify_store(tmp_path / "tiny", "full").ok
    return tmp_path / "tiny", everything(store)


FORMATS = [{"store_dtype": "bfloat16"}, {"store_dtype": "int8", "compression": "zstd"}]


@pytest.mark.parametrize("tiny", FORMATS[:1], indirect=True)
def test_damage_to_some_bytes_of_every_file_is_detected(tiny: tuple[Path, str]) -> None:
    """Every byte of the manifest's head, every 23rd of the commit records, the ends and every 97th of all files."""
    root, values = tiny
    generator = random.Random(0)
    spots: set[tuple[str, int]] = set()
    for key, contents in tree(root).items():
        step = 23 if "commits" in key else 97
        spots |= {(key, position) for position in range(generator.randrange(step), len(contents), step)}
        spots |= {(key, 0), (key, len(contents) - 1)}
    spots |= {(MANIFEST, position) for position in range(90)}
    sweep = Sweep().run(root, ((*spot, generator.randrange(1, 256)) for spot in sorted(spots)), values)
    assert (sweep.detected, sweep.harmless) == (len(spots), 0)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", FORMATS, indirect=True, ids=["bfloat16", "int8 zstd"])
def test_damage_to_every_byte_of_every_file_is_detected(tiny: tuple[Path, str]) -> None:
    root, values = tiny
    generator = random.Random(0)
    spots = [(key, position) for key, contents in tree(root).items() for position in range(len(contents))]
    sweep = Sweep().run(root, ((*spot, generator.randrange(1, 256)) for spot in spots), values, 8)
    print(f"\n{len(spots)} bytes: {sweep}")
    assert (sweep.detected, sweep.harmless) == (len(spots), 0)


@pytest.mark.parametrize("path", [*COMMITTED, "data.zarr/acts/lm/zarr.json", "store.json", "plan.json"])
def test_missing_or_truncated_file_is_noticed_at_opening(store: ActivationStore, path: str) -> None:
    file = Path(store.location) / path
    contents = file.read_bytes()
    file.write_bytes(contents[:-1])
    with pytest.raises(StoreError, match=rf"{path}: has {len(contents) - 1} bytes, expected {len(contents)}"):
        open_store(store.location)
    file.unlink()
    with pytest.raises(StoreError, match=f"{path}: missing from the store"):
        open_store(store.location)


@pytest.mark.parametrize(
    ("position", "message"),
    [(100, "chunk 0 does not match its checksum"), (-3, "index does not match"), (-100, "index does not match")],
    ids=["payload", "index checksum", "index"],
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_flipped_bit_in_activations_is_noticed_when_read(
    tmp_path: Path, compression: str, position: int, message: str
) -> None:
    make_store(tmp_path / "store", LENGTHS, compression=compression)
    flip(tmp_path / "store" / COMMITTED[0], position)
    damaged = open_store(tmp_path / "store")
    damaged.read(0, 0, 63, damaged.sites)
    with pytest.raises(StoreError, match=f"{COMMITTED[0]}: {message}"):
        damaged.read(1, 0, 64, damaged.sites)


def test_flipped_bit_elsewhere_is_noticed(store: ActivationStore) -> None:
    root = Path(store.location)
    flip(root / "data.zarr/tokens/token_id/c/1", 10)
    flip(root / "data.zarr/norms/lm/c/1/0", 10)
    flip(root / "data.zarr/stats/lm/mean/c/0/0/0", 10)
    flip(root / "units/commits/000001.json", 200)
    flip(root / "data.zarr/acts/lm/zarr.json", 30)
    damaged = open_store(root)
    reads: list[tuple[Callable[[], object], str]] = [
        (lambda: damaged.tokens(1), "tokens/token_id/c/1: chunk 0 does not match its checksum"),
        (lambda: damaged.token_block(1, 0), "tokens/token_id/c/1: chunk 0 does not match its checksum"),
        (lambda: damaged.norms(1, "lm"), "norms/lm/c/1/0: chunk 0 does not match its checksum"),
        (lambda: damaged.stats(damaged.sites), "stats/lm/mean/c/0/0/0: chunk 0 does not match its checksum"),
        (lambda: damaged.commit(1), r"000001\.json: checksum does not match"),
        (lambda: damaged.zarr, r"acts/lm/zarr\.json: checksum does not match"),
    ]
    for read, message in reads:
        with pytest.raises(StoreError, match=message):
            read()
    assert damaged.tokens(0).sample[0] >= 0, "what is whole can be read"


def test_damaged_moments_of_an_int8_store_are_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, store_dtype="int8")
    flip(tmp_path / "store/quantisation.safetensors", -2)
    with pytest.raises(StoreError, match=r"quantisation\.safetensors: checksum does not match"):
        open_store(tmp_path / "store").read(0, 0, 1, store.sites)


def test_shard_deleted_after_opening_is_never_read_as_zeros(store: ActivationStore) -> None:
    (Path(store.location) / "data.zarr/acts/lm/c/0/0/0").unlink()
    with pytest.raises(StoreError, match="acts/lm/c/0/0/0: missing"):
        store.read(0, 0, 10, store.sites)


def test_damaged_manifest_is_an_error(store: ActivationStore) -> None:
    file = Path(store.location) / MANIFEST
    text = file.read_text()
    for changed in (text[:-20], "[]", "", text + " ", text.replace('"n_tokens":63', '"n_tokens":62')):
        file.write_text(changed)
        with pytest.raises(StoreError, match=r"manifest\.json: contents do not match their hash") as error:
            open_store(store.location)
        assert "\n" not in str(error.value)
    file.write_text(text)
    assert open_store(store.location).id == store.id


@pytest.mark.parametrize("version", ["1.0", "3.0"])
def test_store_of_another_major_version_is_refused(store: ActivationStore, tmp_path: Path, version: str) -> None:
    root = Path(store.location)
    message = rf"store schema '{version}', this program reads 2\.1; capture again"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/store.json").write_text(json.dumps({"schema_version": version, "kind": "unknown"}))
    with pytest.raises(StoreError, match=rf"store\.json: {message}"):
        StoreWriter(tmp_path / "other", make_spec(), make_plan(LENGTHS))
    rewrite(root / MANIFEST, lambda text: text.replace('"schema_version":"2.1"', f'"schema_version":"{version}"'))
    with pytest.raises(StoreError, match=rf"manifest\.json: {message}"):
        open_store(root)
    rewrite(root / MANIFEST, lambda text: json.dumps({"schema_version": version, "id": "?"}))
    with pytest.raises(StoreError, match=rf"manifest\.json: {message}"):
        open_store(root)


def test_later_minor_version_with_unknown_keys_is_read(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, schema_version="2.9")
    spec = tmp_path / "store/store.json"
    assert open_store(tmp_path / "store").id == store.id
    begun = tmp_path / "begun"
    StoreWriter(begun, make_spec(), make_plan(LENGTHS))
    rewrite(begun / "store.json", lambda text: text.replace("{", '{"from_the_future": 1,', 1).replace('"2.1"', '"2.0"'))
    assert StoreWriter(begun, make_spec(), make_plan(LENGTHS)).pending() == [0, 1, 2]
    assert spec.is_file()


@pytest.mark.parametrize("key", ["data.zarr/acts/lm/c/1/0/0", "units/stats/000001.safetensors"])
def test_missing_file_of_a_committed_unit_stops_the_end_of_a_capture(tmp_path: Path, key: str) -> None:
    spec, plan, root = make_spec(), make_plan(LENGTHS), tmp_path / "store"
    writer = StoreWriter(root, spec, plan)
    for unit in writer.pending():
        writer.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    (root / key).unlink()
    with pytest.raises(StoreError, match=f"{key}: missing from the store; restore it or run 'clt store repair'"):
        writer.finalize()
    assert not (root / MANIFEST).exists()
