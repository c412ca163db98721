"""Streaming: batches equal those of a complete store, whichever units exist."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from clt.capture.planning import CaptureConfig, CaptureJob, plan_capture
from clt.capture.reading.loader import ActivationLoader
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.run import capture_store
from clt.capture.sources.examples import JsonlSource, SourceSettings
from clt.capture.storage.object_store import forget_memory
from clt.capture.streaming import CaptureRing, StreamingLoader
from clt.capture.writing.workers import Schedule
from clt.errors import CheckpointError, ConfigError, InputError
from clt.records import ActivationBatch
from clt.transcoder.model import CrossLayerTranscoder

X = [f"lm.{layer}.resid_mid" for layer in range(3)]
Y = [f"lm.{layer}.mlp_out" for layer in range(3)]
TEXTS = ("the cat sat", "what is this ?", "a red mat", "the cat sat on a mat", "blue", "is this the cat ?")
BATCH, ROWS, RING_UNITS = 16, 64, 3


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path) -> CaptureConfig:
    file = tmp_path / "texts.jsonl"
    records = [{"id": f"t{i}", "prompt": TEXTS[i % len(TEXTS)], "answer": "red"} for i in range(120)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return CaptureConfig(
        model=str(llama_folder),
        output=str(tmp_path / "store"),
        source=SourceSettings(jsonl=JsonlSource(file=file)),
        store_dtype="float32",
        rows_per_unit=ROWS,
        chunk_tokens=32,
        batch_size=4,
    )


@pytest.fixture
def job(config: CaptureConfig) -> CaptureJob:
    return plan_capture(config)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://test-ring"
    forget_memory("test-ring")


def loader(ring: CaptureRing, **changes: object) -> StreamingLoader:
    settings: dict = {"x_sites": X, "y_sites": Y, "batch_tokens": BATCH, "window_tokens": 64, "seed": 3}
    return StreamingLoader(ring, **{**settings, **changes})


def make_ring(job: CaptureJob, location: str | Path) -> CaptureRing:
    return CaptureRing(job, str(location), RING_UNITS, 3, Schedule())


def keys(batch: ActivationBatch) -> list[tuple[int, int]]:
    return list(zip(batch.tokens.sample.tolist(), batch.tokens.position.tolist(), strict=True))


def steps_of_an_epoch(job: CaptureJob, ring: CaptureRing) -> int:
    return sum(sum(job.plan.unit_tokens[u] for u in units) // BATCH for units in ring.generations(0))


def test_epoch_holds_each_token_once_with_the_values_of_a_store(
    config: CaptureConfig, job: CaptureJob, memory: str
) -> None:
    capture_store(config)
    store = open_store(config.output)
    expected = {}
    for unit in store.units:
        for view in store.samples(unit.unit, store.sites):
            for position in range(view.acts.shape[1]):
                expected[view.sample, position] = view.acts[:, position]
    ring = make_ring(job, memory)
    steps = steps_of_an_epoch(job, ring)
    seen = []
    for batch in islice(loader(ring), steps):
        for i, key in enumerate(keys(batch)):
            # The model ran in other batches: float32 sums in another order.
            both = torch.cat([batch.x[:, i], batch.y[:, i]])
            torch.testing.assert_close(both, expected[key], atol=1e-5, rtol=1e-5)
            seen.append(key)
    assert len(set(seen)) == len(seen) == steps * BATCH
    assert len(seen) > 0.9 * store.num_tokens
    assert set(seen) <= set(expected)


def test_ring_is_bounded_and_endless(job: CaptureJob, tmp_path: Path) -> None:
    ring = make_ring(job, tmp_path / "ring")
    most = max(len(units) for units in ring.generations(0))
    assert job.plan.n_units > 3 * most
    steps = steps_of_an_epoch(job, ring)
    held = 0
    for _ in islice(loader(ring), 2 * steps):
        held = max(held, len(list((tmp_path / "ring/units/commits").glob("0*.json"))))
    assert most <= held <= 3 * most
    shards = list((tmp_path / "ring/data.zarr/acts/lm/c").glob("*/0/0"))
    assert len(shards) <= 3 * most


def test_order_depends_on_seed_and_epoch_alone(job: CaptureJob, tmp_path: Path, memory: str) -> None:
    ring = make_ring(job, memory)
    steps = steps_of_an_epoch(job, ring)
    both = list(islice(loader(ring), steps + 3))
    again = [keys(batch) for batch in islice(loader(make_ring(job, tmp_path / "ring")), 5)]
    assert again == [keys(batch) for batch in both[:5]]
    assert keys(both[0]) != keys(both[steps])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one(job: CaptureJob, memory: str, world: int) -> None:
    ring = make_ring(job, memory)
    whole = list(islice(loader(ring, removes=False), 12))
    parts = [list(islice(loader(ring, data_rank=rank, data_world=world, removes=False), 12)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [key for part in parts for key in keys(part[step])] == keys(batch)


@pytest.mark.parametrize("taken", [0, 1, 9, 30])
def test_resumed_stream_continues_exactly(job: CaptureJob, tmp_path: Path, taken: int) -> None:
    original = loader(make_ring(job, tmp_path / "ring"))
    stream = iter(original)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(original.state_dict()))
    expected = [keys(batch) for batch in islice(stream, 8)]
    stream.close()  # type: ignore[attr-defined]
    resumed = loader(make_ring(job, tmp_path / "another"))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [keys(batch) for batch in islice(resumed, 8)] == expected
    with pytest.raises(CheckpointError, match="loader state: batch_tokens was 16 and is now 32"):
        loader(make_ring(job, tmp_path / "another"), batch_tokens=32).load_state_dict(state)


def test_statistics_are_those_of_the_first_generation_and_stay(job: CaptureJob, tmp_path: Path) -> None:
    ring = make_ring(job, tmp_path / "ring")
    where = TokenFilter(drop_bos=True)
    stats = ring.stats(X, where)
    first = ring.generations(0)[0]
    store = ring.open(first)
    rows = torch.cat([store.read(u, 0, store.n_tokens(u), X)[store.modality(u) != 3] for u in first]).double()
    assert stats.count == len(rows)
    modality = torch.cat([store.modality(unit) for unit in first])
    assert ring.token_counts(where).tolist() == [int((modality == number).sum()) for number in range(3)] + [0]
    torch.testing.assert_close(stats.mean, rows.mean(0), atol=1e-12, rtol=1e-12)  # float64, two orders of summation
    ring.remove(first)
    assert torch.equal(make_ring(job, tmp_path / "ring").stats(X, where).mean, stats.mean)


def test_filter_applies_and_norm_cap_is_refused(job: CaptureJob, memory: str) -> None:
    ring = make_ring(job, memory)
    for batch in islice(loader(ring, where=TokenFilter(drop_bos=True)), 10):
        assert all(position > 0 for _, position in keys(batch))
    with pytest.raises(ConfigError, match=r"data\.norm_cap"):
        loader(ring, where=TokenFilter(norm_cap=10.0))


def test_generation_streams_as_a_store_of_its_units_would(job: CaptureJob, tmp_path: Path) -> None:
    ring = make_ring(job, tmp_path / "ring")
    units = ring.generations(0)[0]
    ring.fill(units)
    plain = ActivationLoader(
        ring.open(units), x_sites=X, y_sites=Y, batch_tokens=BATCH, window_tokens=64, seed=3, data_rank=0
    )
    for mine, theirs in zip(islice(loader(ring), 6), plain.epoch(0), strict=False):
        assert torch.equal(mine.x, theirs.x) and keys(mine) == keys(theirs)


def test_error_of_the_capture_is_raised_where_batches_are_taken(tmp_path: Path, llava_folder: Path) -> None:
    file = tmp_path / "texts.jsonl"
    records = [{"prompt": "the cat sat on a mat"} for _ in range(60)] + [{"prompt": "a <image>", "image": "none.png"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = plan_capture(
        CaptureConfig(
            model=str(llava_folder),
            output="unused",
            source=SourceSettings(jsonl=JsonlSource(file=file)),
            store_dtype="float32",
            rows_per_unit=ROWS,
            chunk_tokens=32,
        )
    )
    with pytest.raises(InputError, match=r"none\.png"):
        for _ in islice(loader(CaptureRing(job, str(tmp_path / "ring"), 2, 0, Schedule()), batch_tokens=8), 200):
            pass


@pytest.mark.slow
def test_training_job_streams_and_resumes(config: CaptureConfig, tmp_path: Path) -> None:
    """Two ranks on a shared ring, killed in the middle and started again, end with the weights of one rank."""
    capture_file = tmp_path / "capture.yaml"
    capture_file.write_text(
        f"model: {config.model}\noutput: unused\nstore_dtype: float32\nrows_per_unit: {ROWS}\nchunk_tokens: 32\n"
        f"batch_size: 4\nsource: {{jsonl: {{file: {tmp_path / 'texts.jsonl'}}}}}\n"
    )

    def start(name: str, ranks: int) -> subprocess.Popen[bytes]:
        train_file = tmp_path / f"{name}.yaml"
        train_file.write_text(
            f"streaming: {{capture: {capture_file}, ring: {tmp_path / name}-ring, units: {RING_UNITS}}}\n"
            f"output: {tmp_path / name}\nsteps: 60\nclt: {{n_features: 32, k: 4}}\ncheckpoint_every: 20\n"
            f"data: {{batch_tokens: {BATCH}, window_tokens: 64}}\n"
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        script = str(Path(__file__).parents[2] / "launch" / "train.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*launcher, script, str(train_file)], env=environment, start_new_session=True)

    assert start("one", 1).wait(timeout=300) == 0
    killed = start("two", 2)
    deadline = time.monotonic() + 300
    while not (tmp_path / "two" / "latest").is_file():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "two" / "step_00000060").exists(), "killed midway"
    assert start("two", 2).wait(timeout=300) == 0
    one, two = (CrossLayerTranscoder.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, mine), (_, theirs) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        # float32 sums over two ranks instead of one
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3, msg=name)
