"""Capacity report: predicted sizes equal those of the store, and measuring leaves nothing on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from clt.capture.capacity import NVME, PCIE, capacity, free_bytes, model_cost, store_size
from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.reading.open_store import open_store
from clt.capture.run import capture_store
from clt.capture.sources.examples import JsonlSource, SourceSettings
from clt.capture.writing.writer import StoreWriter
from clt.errors import StoreError

from .stores import unit_data

TEXTS = ("the cat sat", "what is this ?", "a red mat", "the cat sat on a mat", "blue")


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path) -> CaptureConfig:
    lines = [json.dumps({"id": f"t{i}", "prompt": TEXTS[i % len(TEXTS)]}) for i in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return CaptureConfig(
        model=str(llama_folder),
        output=str(tmp_path / "out" / "store"),
        source=SourceSettings(jsonl=JsonlSource(file=tmp_path / "texts.jsonl")),
        rows_per_unit=256,
        batch_size=8,
    )


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("store_dtype", ["bfloat16", "int8"])
def test_predicted_size_equals_that_of_a_capture(config: CaptureConfig, store_dtype: str) -> None:
    config = replace(config, store_dtype=store_dtype)
    job = plan_capture(config)
    predicted = store_size(job)
    capture_store(config, adapter=job.adapter)
    store = open_store(config.output)
    assert predicted.tokens == store.num_tokens and predicted.units == len(store.units) > 2
    # The prediction leaves out JSON and the headers of statistics files; all shards are exact.
    rest = size_of(Path(config.output)) - predicted.total_bytes
    json_bytes = sum(path.stat().st_size for path in Path(config.output).rglob("*.json"))
    assert 0 <= rest - json_bytes <= 4096 * (predicted.units + 1)


def test_measuring_leaves_no_files(config: CaptureConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = capacity(plan_capture(config), config.output)
    assert sorted(tmp_path.rglob("*")) == before
    speeds = report.speeds
    assert speeds is not None and report.capture_s is not None and report.limited_by is not None
    assert min(asdict(speeds).values()) > 0
    # One worker runs the model and commits by turns.
    rate = 1 / (1 / speeds.model + 1 / speeds.commit)
    assert report.capture_tokens_per_s == pytest.approx(rate)
    assert report.capture_s == pytest.approx(report.size.tokens / rate)


def test_measuring_beside_a_store_in_memory_leaves_no_files(config: CaptureConfig) -> None:
    pytest.importorskip("obstore")
    job = plan_capture(config)
    writer = StoreWriter("memory://capacity", job.spec, job.plan)
    before = [entry.key for entry in writer.storage.list("")]
    report = capacity(job, "memory://capacity")
    assert [entry.key for entry in writer.storage.list("")] == before
    assert report.free_bytes is None and report.fits


def test_committed_units_are_not_counted_again(config: CaptureConfig) -> None:
    job = plan_capture(config)
    fresh = capacity(job, config.output, measure=False)
    assert fresh.committed_tokens == 0 and fresh.needed_bytes == fresh.size.total_bytes
    assert fresh.speeds is None and fresh.capture_s is None
    writer = StoreWriter(config.output, job.spec, job.plan)
    lengths = job.lengths
    writer.commit(1, unit_data(lengths, job.plan.samples(1), job.spec))
    begun = capacity(job, config.output, measure=False)
    assert begun.committed_tokens == job.plan.unit_tokens[1]
    assert begun.needed_bytes == pytest.approx(
        fresh.needed_bytes * (1 - begun.committed_tokens / begun.size.tokens), rel=1e-3
    )


def test_insufficient_space_is_detected(config: CaptureConfig) -> None:
    report = capacity(plan_capture(config), config.output, measure=False)
    assert report.fits and report.free_bytes is not None
    assert not replace(report, free_bytes=report.needed_bytes - 1).fits


def test_an_output_that_cannot_be_written_is_named(config: CaptureConfig) -> None:
    with pytest.raises(StoreError, match=r"^/proc: cannot be written \(.*\); choose another output$"):
        capacity(plan_capture(config), "/proc/store")


def test_free_space_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert free_bytes(f"file://{tmp_path}/a") == pytest.approx(free_bytes(str(tmp_path)), rel=0.1)
    assert free_bytes("s3://bucket/store") is None


def test_model_table_agrees_with_the_research_note() -> None:
    # 2 sites x layers x width x 2 bytes; rates as printed in the note, three digits
    for name, layers, width, cost, nvme, pcie in (
        ("GPT-2", 12, 768, 36_864, 190e3, 678e3),
        ("LLaVA-1.5-7B", 32, 4096, 524_288, 13.4e3, 47.7e3),
    ):
        row = model_cost(name, layers, width)
        assert row.bytes_per_token == cost
        assert row.nvme_tokens_per_s == NVME / cost == pytest.approx(nvme, rel=5e-3)
        assert row.pcie_tokens_per_s == PCIE / cost == pytest.approx(pcie, rel=5e-3)
        assert row.terabytes == pytest.approx(cost * 1e8 / 1e12)
