"""The loader: each token once per epoch, the same batches on any number of ranks, and resuming at any step."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.loader import ActivationLoader, iterate_store
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.store.schema import SiteGroup
from clt.errors import CheckpointError, ConfigError, StoreError
from clt.records import ActivationBatch, Modality

from ..stores import SITES, make_store

X, Y = ("lm.0.resid_mid", "lm.1.resid_mid"), ("lm.0.mlp_out", "lm.1.mlp_out")
LENGTHS = [int(n) for n in np.random.RandomState(0).randint(3, 40, size=40)]
TOTAL = sum(LENGTHS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("loader") / "store", LENGTHS, rows_per_unit=256)


def loader(store: ActivationStore, **changes: Any) -> ActivationLoader:
    arguments: dict[str, Any] = {"x_sites": X, "y_sites": Y, "batch_tokens": 32, "window_tokens": 200, "seed": 3}
    return ActivationLoader(store, **{**arguments, **changes})


def keys(batch: ActivationBatch) -> list[tuple[int, int]]:
    return list(zip(batch.tokens.sample.tolist(), batch.tokens.position.tolist(), strict=True))


def test_impossible_batches_and_worlds_are_errors(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match=f"batch_tokens=1024 exceeds the {TOTAL} tokens"):
        loader(store, batch_tokens=1024)
    with pytest.raises(ConfigError, match="3 data ranks cannot share"):
        loader(store, data_world=3)
    with pytest.raises(ConfigError, match="batch_tokens=6 is read as 2 streams, which 4 data ranks"):
        loader(store, batch_tokens=6, data_world=4)
    with pytest.raises(StoreError, match=r"lm\.9\.mlp_out"):
        loader(store, y_sites=["lm.9.mlp_out"])


def test_batches_hold_the_values_that_their_tokens_name(store: ActivationStore) -> None:
    for batch in islice(loader(store), 5):
        assert batch.x.shape == batch.y.shape == (2, 32, 4)
        assert batch.x.dtype == batch.y.dtype == torch.float32
        for sites, tensor in ((X, batch.x), (Y, batch.y)):
            for i, site in enumerate(sites):
                assert torch.equal(tensor[i, :, 0], batch.tokens.sample + 1.0)
                assert torch.equal(tensor[i, :, 1], batch.tokens.position.float())
                assert (tensor[i, :, 2] == store.sites.index(site)).all()
        assert torch.equal(batch.tokens.token_id, (batch.tokens.sample * 7 + batch.tokens.position).int())


def test_an_epoch_reads_each_token_once(store: ActivationStore) -> None:
    one = loader(store)
    assert one.steps_per_epoch == TOTAL // 32
    assert one.dropped_tokens == TOTAL % 32
    batches = [keys(batch) for batch in islice(one, 2 * one.steps_per_epoch)]
    for epoch in (batches[: one.steps_per_epoch], batches[one.steps_per_epoch :]):
        seen = [key for batch in epoch for key in batch]
        assert len(set(seen)) == len(seen) == 32 * one.steps_per_epoch
    assert batches[0] != batches[one.steps_per_epoch]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_ranks(store: ActivationStore, world: int) -> None:
    steps = TOTAL // 32 + 3
    single = list(islice(loader(store), steps))
    ranks = [list(islice(loader(store, data_rank=r, data_world=world), steps)) for r in range(world)]
    for step, whole in enumerate(single):
        assert torch.equal(torch.cat([rank[step].x for rank in ranks], dim=1), whole.x)
        assert torch.equal(torch.cat([rank[step].y for rank in ranks], dim=1), whole.y)
        assert [key for rank in ranks for key in keys(rank[step])] == keys(whole)


def test_drop_bos_drops_exactly_bos(store: ActivationStore) -> None:
    one = loader(store, where=TokenFilter(drop_bos=True), batch_tokens=8)
    seen = [key for batch in islice(one, one.steps_per_epoch) for key in keys(batch)]
    assert all(position > 0 for _, position in seen)
    assert len(set(seen)) == len(seen)
    assert len(seen) + one.dropped_tokens == TOTAL - len(LENGTHS)


@pytest.mark.parametrize("taken", [0, 1, 7, TOTAL // 32, TOTAL // 32 + 2])
def test_resumed_stream_continues_exactly(store: ActivationStore, taken: int) -> None:
    original = loader(store)
    stream = iter(original)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(original.state_dict()))
    assert all(isinstance(value, int | str) for value in state.values())
    expected = list(islice(stream, 4))
    resumed = loader(store)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for mine, theirs in zip(islice(resumed, 4), expected, strict=True):
        assert torch.equal(mine.x, theirs.x) and keys(mine) == keys(theirs)
    shared = loader(store, data_rank=1, data_world=2)
    shared.load_state_dict(state)
    assert keys(next(iter(shared))) == keys(expected[0])[16:]


def test_state_of_another_job_is_an_error(store: ActivationStore, tmp_path: Path) -> None:
    state = loader(store).state_dict()
    for change, key in (
        ({"seed": 4}, "seed"),
        ({"batch_tokens": 64}, "batch_tokens"),
        ({"where": TokenFilter(drop_bos=True)}, "where"),
    ):
        with pytest.raises(CheckpointError, match=f"loader state: {key} was"):
            loader(store, **change).load_state_dict(state)
    other = make_store(tmp_path / "other", LENGTHS, rows_per_unit=1024)
    with pytest.raises(CheckpointError, match="loader state: store was"):
        loader(other).load_state_dict(state)


def test_only_the_sites_asked_for_are_read(store: ActivationStore) -> None:
    batch = next(iter(loader(store, x_sites=[X[1]], y_sites=[])))
    assert (batch.x.shape, batch.y.shape) == ((1, 32, 4), (0, 32, 4))
    assert (batch.x[0, :, 2] == 1).all()


def acts_shard(store: ActivationStore, unit: int) -> Path:
    return Path(store.location) / f"data.zarr/acts/lm/c/{unit}/0/0"


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("activation-")]


@pytest.mark.parametrize("damage", ["missing", "flipped bit", "truncated"])
def test_damage_is_raised_where_batches_are_taken_and_never_skipped(tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path / "store", LENGTHS, rows_per_unit=256)
    one = loader(store)
    shard = acts_shard(store, 1)
    if damage == "missing":
        shard.unlink()
    else:
        contents = bytearray(shard.read_bytes())
        contents[100] ^= 1
        shard.write_bytes(contents[: 100 if damage == "truncated" else None])
    with pytest.raises(StoreError, match=str(shard)):
        list(one.epoch(0))
    assert not loader_threads()


def test_threads_end_with_the_iterator(store: ActivationStore) -> None:
    one = loader(store)
    assert not loader_threads(), "a loader that is not iterated has none"
    stream: Iterator[ActivationBatch] = iter(one)
    next(stream)
    assert loader_threads()
    stream.close()  # type: ignore[attr-defined]
    assert not loader_threads()


def test_iterators_of_one_loader_do_not_disturb_each_other(store: ActivationStore) -> None:
    one = loader(store)
    first, second = one.epoch(0), one.epoch(0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.x, b.x) and keys(a) == keys(b)


def test_a_single_epoch_has_the_same_batches_and_keeps_the_position(store: ActivationStore) -> None:
    one = loader(store)
    steps = one.steps_per_epoch
    endless = [keys(batch) for batch in islice(loader(store), 2 * steps)]
    assert [keys(batch) for batch in one.epoch(1)] == endless[steps:]
    assert [keys(batch) for batch in one.epoch(0, first_step=5)] == endless[5:steps]
    assert one.state_dict()["step"] == one.state_dict()["epoch"] == 0


class Batches(IterableDataset):  # type: ignore[type-arg]
    """A loader as a worker process of torch's DataLoader sees it."""

    def __init__(self, loader: ActivationLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in islice(self.loader, 10):
            yield batch.x, batch.tokens.sample


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_the_same_batches(
    store: ActivationStore, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))  # where a spawned process finds this module
    one = loader(store)
    expected = list(islice(one, 10))
    one = pickle.loads(pickle.dumps(loader(store)))
    next(iter(one))  # files are open, threads have run and ended
    one.load_state_dict(loader(store).state_dict())
    workers = DataLoader(Batches(one), batch_size=None, num_workers=1, multiprocessing_context=start)
    for (x, sample), batch in zip(workers, expected, strict=True):
        assert torch.equal(x, batch.x) and torch.equal(sample, batch.tokens.sample)


def test_batches_that_are_kept_are_never_written_again(store: ActivationStore) -> None:
    one = loader(store, batch_tokens=8)
    kept = [(batch, batch.x.clone(), batch.y.clone()) for batch in islice(one, 200)]
    for batch, x, y in kept:
        assert torch.equal(batch.x, x) and torch.equal(batch.y, y)
    assert len({batch.x.data_ptr() for batch, _, _ in kept}) == 200


def test_batches_that_are_let_go_lend_their_memory(store: ActivationStore) -> None:
    places = {batch.x.data_ptr() for batch in islice(loader(store, batch_tokens=8, read_ahead=2), 200)}
    assert len(places) <= 2 + 2


@pytest.mark.parametrize(
    "where",
    [
        TokenFilter(modalities=("text",)),
        TokenFilter(modalities=("bos",)),
        TokenFilter(modalities=("text", "bos"), drop_bos=True),
        TokenFilter(norm_cap=1.2),
        TokenFilter(drop_bos=True, norm_cap=0.9),
    ],
)
def test_a_filter_passes_exactly_the_tokens_of_its_definition(store: ActivationStore, where: TokenFilter) -> None:
    cap = None if where.norm_cap is None else where.norm_cap * store.mean_norms("lm")
    expected = set()
    for unit in store.units:
        norms, tokens = store.norms(unit.unit, "lm"), store.tokens(unit.unit)
        for row, (sample, position) in enumerate(zip(tokens.sample.tolist(), tokens.position.tolist(), strict=True)):
            of_class = "bos" if position == 0 else "text"
            if of_class not in (where.modalities or ("text", "bos")) or (where.drop_bos and of_class == "bos"):
                continue
            if cap is None or not (norms[row] > cap).any():
                expected.add((sample, position))
    assert 0 < len(expected) < TOTAL
    one = loader(store, where=where, batch_tokens=8)
    seen = [key for batch in one.epoch(0) for key in keys(batch)]
    assert len(set(seen)) == len(seen) == len(expected) - one.dropped_tokens
    assert set(seen) <= expected
    assert {key for batch in iterate_store(store, X, Y, 100, where=where) for key in keys(batch)} == expected


def test_filters_that_pass_nothing_are_errors(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match=r"no token passes the filter \(image\); loosen it"):
        loader(store, where=TokenFilter(modalities=("image",)))
    with pytest.raises(ConfigError, match="'images' is not a token class; use some of text, image"):
        TokenFilter(modalities=("images",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="norm_cap=0: no token passes"):
        TokenFilter(norm_cap=0)


@pytest.mark.parametrize("drop_bos", [False, True])
@pytest.mark.parametrize("batch_tokens", [7, 16, 100, 10_000])
def test_iterate_store_goes_through_everything_in_stored_order(
    store: ActivationStore, batch_tokens: int, drop_bos: bool
) -> None:
    expected = [
        (int(s), int(p))
        for unit in store.units
        for s, p in zip(store.tokens(unit.unit).sample, store.tokens(unit.unit).position, strict=True)
        if not (drop_bos and p == 0)
    ]
    batches = list(iterate_store(store, X, Y, batch_tokens, where=TokenFilter(drop_bos=drop_bos)))
    assert [key for batch in batches for key in keys(batch)] == expected
    assert all(len(keys(batch)) == batch_tokens for batch in batches[:-1])
    for batch in batches:
        assert torch.equal(batch.y[1, :, 0], batch.tokens.sample + 1.0)
        assert not (drop_bos and (batch.tokens.modality == Modality.BOS).any())
    some = list(iterate_store(store, X, Y, batch_tokens, where=TokenFilter(drop_bos=drop_bos), max_tokens=50))
    assert [key for batch in some for key in keys(batch)] == expected[:50]


@pytest.mark.parametrize("data_world", [2, 3, 60])
def test_iterate_store_deals_its_tokens_in_stretches(store: ActivationStore, data_world: int) -> None:
    where = TokenFilter(drop_bos=True)
    whole = [key for batch in iterate_store(store, X, Y, 16, where=where, max_tokens=50) for key in keys(batch)]
    dealt = [
        [
            key
            for batch in iterate_store(
                store, X, Y, 16, where=where, max_tokens=50, data_rank=rank, data_world=data_world
            )
            for key in keys(batch)
        ]
        for rank in range(data_world)
    ]
    assert [key for part in dealt for key in part] == whole
    assert {len(part) for part in dealt} <= {50 // data_world, 50 // data_world + 1}


def test_bfloat16_store_reads_as_the_rounded_values(tmp_path: Path) -> None:
    exact = next(iter(loader(make_store(tmp_path / "exact", LENGTHS, rows_per_unit=1024))))
    store = make_store(tmp_path / "rounded", LENGTHS, rows_per_unit=1024, store_dtype="bfloat16")
    rounded, stored = next(iter(loader(store))), next(iter(loader(store, as_stored=True)))
    assert torch.equal(rounded.x, exact.x.bfloat16().float())
    assert stored.x.dtype == torch.bfloat16 and torch.equal(stored.x, exact.x.bfloat16())


@pytest.mark.parametrize("changes", [{"store_dtype": "int8"}, {"store_dtype": "bfloat16", "compression": "zstd"}])
def test_capacity_stores_are_delivered_as_the_store_reads_them(tmp_path: Path, changes: dict[str, str]) -> None:
    store = make_store(tmp_path / "store", LENGTHS, rows_per_unit=256, **changes)
    known: dict[tuple[int, int], torch.Tensor] = {}
    for unit in store.units:
        values, tokens = store.read(unit.unit, 0, unit.n_tokens, X + Y).float(), store.tokens(unit.unit)
        known.update(zip(zip(tokens.sample.tolist(), tokens.position.tolist(), strict=True), values, strict=True))
    for batch in loader(store, where=TokenFilter(drop_bos=True)).epoch(0):
        expected = torch.stack([known[key] for key in keys(batch)], dim=1)
        assert torch.equal(torch.cat([batch.x, batch.y]), expected)


def test_sites_of_two_groups_are_read_together_if_their_widths_agree(tmp_path: Path) -> None:
    def store(name: str, width: int) -> ActivationStore:
        groups = (SiteGroup(name="in", sites=SITES[:2], width=4), SiteGroup(name="out", sites=SITES[2:], width=width))
        return make_store(tmp_path / name, LENGTHS, rows_per_unit=256, groups=groups)

    for batch in loader(store("equal", 4), y_sites=SITES[:1:-1]).epoch(0):
        for sites, tensor in (((0, 1), batch.x), ((1, 0), batch.y)):
            for row, site in enumerate(sites):
                assert torch.equal(tensor[row, :, 0], batch.tokens.sample + 1.0)
                assert (tensor[row, :, 2] == site).all()
    with pytest.raises(StoreError, match="sites of groups in and out have no common width"):
        loader(store("unequal", 6))


MEASURED = """
import sys
from clt.capture.reading.loader import ActivationLoader
from clt.capture.reading.open_store import open_store

def resident(peak):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM" if peak else "VmRSS"))

store = open_store(sys.argv[1])
loader = ActivationLoader(
    store, x_sites=store.sites[:2], y_sites=store.sites[2:], batch_tokens=1024, window_tokens=4096, seed=0
)
before = resident(peak=False)
for _ in loader.epoch(0):
    pass
print(resident(peak=True) - before, loader.memory_bytes)
"""


def test_an_iterator_stays_within_the_memory_that_it_states(tmp_path: Path) -> None:
    lengths = [100] * 600
    store = make_store(
        tmp_path / "store", lengths, rows_per_unit=6400, chunk_tokens=64, store_dtype="bfloat16",
        groups=(SiteGroup(name="lm", sites=SITES, width=256),),
    )  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(store.location)], capture_output=True, text=True, check=True
    )
    grown, stated = map(int, result.stdout.split())
    # Threads' stacks and the interpreter's own memory are not counted.
    assert grown <= stated + 16 * 2**20
    assert stated + 16 * 2**20 < sum(lengths) * store.spec.bytes_per_token, "the store would not have fitted"


@pytest.mark.gpu
@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("on_host", [False, True])
def test_batches_on_a_gpu_are_those_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_dtype: str, on_host: bool
) -> None:
    if on_host:
        monkeypatch.setattr("clt.capture.reading.cuda_batch_buffers._MEMORY_SHARE", 0.0)
    store = make_store(tmp_path / "store", LENGTHS, rows_per_unit=256, store_dtype=store_dtype)
    for as_stored in (False, True):
        settings = {"as_stored": as_stored, "where": TokenFilter(drop_bos=True)}
        pairs = zip(loader(store, **settings), loader(store, device="cuda", **settings), strict=True)
        for cpu, gpu in islice(pairs, 100):
            assert gpu.x.device.type == gpu.y.device.type == "cuda"
            assert torch.equal(gpu.x.cpu(), cpu.x) and torch.equal(gpu.y.cpu(), cpu.y)
            assert keys(gpu) == keys(cpu)
