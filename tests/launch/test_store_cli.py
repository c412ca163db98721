"""The `clt store` commands: their output, their files, and one-line errors for invalid input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from clt.capture.capacity import capacity
from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.reading.open_store import open_store
from clt.capture.writing.writer import StoreWriter
from clt.config import load_config
from clt.launch.commands.main import app
from clt.launch.commands.store_text import capacity_text

from ..capture.stores import make_plan, make_spec, make_store, unit_data
from ..hub_stand_in import Blob, environment, hub_stand_in

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTHS = (20, 30, 40, 10, 25)


def clt_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, words)])


def refused(result: Result, *parts: str) -> None:
    """One line on standard error that names the parts, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and result.stderr.strip() == lines[0], result.stderr
    for part in parts:
        assert part in lines[0]


def unfinished(path: Path) -> StoreWriter:
    """A store of three units, the first of which is captured."""
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(path, spec, plan)
    writer.commit(0, unit_data(LENGTHS, plan.samples(0), spec))
    return writer


def complete(writer: StoreWriter) -> str:
    for unit in writer.pending():
        writer.commit(unit, unit_data(LENGTHS, writer.plan.samples(unit), writer.spec))
    return writer.finalize()


def damage(path: Path) -> None:
    """Flips a byte in the middle of a file."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def toy_plan(tmp_path: Path, *overrides: str) -> list[str]:
    pairs = [f"model={ROOT / 'examples' / 'toy_vlm' / 'checkpoints' / 'base'}", "source.toy.n=4"]
    pairs += [f"output={tmp_path / 'store'}", "batch_size=2", *overrides]
    config = ROOT / "configs" / "capture" / "toy.yaml"
    return ["plan", str(config), *pairs]


def test_plan_has_sizes_and_duration_and_writes_only_its_report(tmp_path: Path) -> None:
    result = clt_command(*toy_plan(tmp_path), "--json", tmp_path / "reports" / "plan.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "reports" / "plan.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]
    assert report["size"]["samples"] == 4 and report["size"]["bytes_per_token"] == 8 * 128 * 2
    assert report["capture_s"] > 0 and report["limited_by"] in result.stdout
    for words in ("bytes per token   2,048", "free space", "tokens/s with one worker", "LLaVA-1.5-7B", "524,288"):
        assert words in result.stdout


def test_plan_without_measuring_reads_no_example(tmp_path: Path) -> None:
    verb, config, *pairs = toy_plan(tmp_path)
    options = [word for pair in pairs for word in ("--set", pair)]
    result = clt_command(verb, "--config", config, *options, "--no-measure")
    assert result.exit_code == 0, result.output
    assert "total size" in result.stdout and "measured" not in result.stdout
    refused(clt_command(*toy_plan(tmp_path, "sedd=1")), "unknown key 'sedd'")


def test_plan_warns_when_the_disk_is_too_small(tmp_path: Path) -> None:
    words = toy_plan(tmp_path)
    job = load_config(CaptureConfig, words[1], words[2:])
    report = capacity(plan_capture(job), job.output, measure=False)
    assert "warning" not in capacity_text(report)
    text = capacity_text(replace(report, free_bytes=report.needed_bytes - 1024))
    assert "warning: 1.00 KiB too little disk space; free some, change output" in text


def test_status_tells_a_complete_store_from_an_unfinished_one(tmp_path: Path) -> None:
    writer = unfinished(tmp_path / "store")
    result = clt_command("status", tmp_path / "store", "--json", tmp_path / "status.json")
    assert result.exit_code == 0, result.output
    assert "unfinished" in result.stdout and "1 of 3 committed, 0 being captured, 2 pending" in result.stdout
    assert json.loads((tmp_path / "status.json").read_text())["tokens"] == 50
    store_id = complete(writer)
    assert f"complete, id {store_id}" in clt_command("status", tmp_path / "store").stdout


def test_verify_ends_with_code_2_and_names_each_damaged_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS)
    result = clt_command("verify", tmp_path / "store", "--level", "full")
    assert result.exit_code == 0 and f"store {store.id}" in result.stdout and "no problems" in result.stdout
    files = [tmp_path / "store" / "data.zarr" / name / "c" for name in ("acts/lm/", "tokens/position")]
    shards = [next(path for path in sorted(folder.rglob("*")) if path.is_file()) for folder in files]
    for shard in shards:
        damage(shard)
    result = clt_command("verify", tmp_path / "store", "--json", tmp_path / "verify.json", "--jobs", "1")
    assert all(str(shard) in result.stdout for shard in shards)
    refused(result, "store", "problems at level chunk")
    report = json.loads((tmp_path / "verify.json").read_text())
    assert not report["ok"] and {problem["unit"] for problem in report["problems"]} == {0}
    for level in ("deep", "Chunk"):
        assert clt_command("verify", tmp_path / "store", "--level", level).exit_code == 2


def test_quarantine_sets_a_damaged_unit_aside_and_the_capture_makes_it_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS)
    shard = next(
        path
        for path in sorted((tmp_path / "store" / "data.zarr" / "acts").rglob("*"))
        if "/c/1/" in str(path) and path.is_file()
    )
    damage(shard)
    result = clt_command("verify", tmp_path / "store", "--quarantine")
    assert result.exit_code == 2 and "units to capture again: 1; run the same capture" in result.stdout
    assert "2 of 3 committed" in clt_command("status", tmp_path / "store").stdout
    refused(clt_command("stats", tmp_path / "store"), "the capture has not finished")
    assert complete(StoreWriter(tmp_path / "store", make_spec(), make_plan(LENGTHS))) == store.id
    assert "damaged files moved by a repair" in clt_command("status", tmp_path / "store").stdout
    assert clt_command("gc", tmp_path / "store", "--quarantine").exit_code == 0
    assert clt_command("verify", tmp_path / "store", "--level", "full").exit_code == 0
    assert "nothing to repair" in clt_command("repair", tmp_path / "store").stdout


def test_gc_deletes_what_a_dry_run_names(tmp_path: Path) -> None:
    unfinished(tmp_path / "store")
    orphan = tmp_path / "store" / "data.zarr" / "tokens" / "position" / "c" / ".1.0.partial"
    orphan.write_bytes(b"half")
    dry = clt_command("gc", tmp_path / "store", "--dry-run")
    assert dry.exit_code == 0 and orphan.name in dry.stdout and "1 files, 4 bytes would be deleted" in dry.stdout
    assert orphan.exists()
    assert "1 files, 4 bytes deleted" in clt_command("gc", tmp_path / "store").stdout and not orphan.exists()
    assert "1 of 3 committed" in clt_command("status", tmp_path / "store").stdout


def test_stats_give_every_site_and_class_with_its_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, store_dtype="bfloat16")
    result = clt_command("stats", tmp_path / "store", "--json", tmp_path / "stats.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "stats.json").read_text())
    assert {(row["site"], row["token_class"]) for row in rows} == {
        (site, name) for site in store.sites for name in ("text", "bos", "all but bos")
    }
    for row in rows:
        if row["token_class"] == "all but bos":
            values = torch.cat(
                [view.acts[0, 1:].double() for u in store.units for view in store.samples(u.unit, [row["site"]])]
            )
            assert row["tokens"] == len(values) == sum(LENGTHS) - 5
            assert row["mean_norm"] == pytest.approx(float(values.norm(dim=1).mean()))
            assert row["rms"] == pytest.approx(float(values.var(0, correction=0).mean().sqrt()))
            assert row["absmax"] == float(values.abs().max())
            assert row["fvu"] == pytest.approx(store.manifest.quantisation[row["site"]].fvu)
    assert "lm.1.mlp_out" in result.stdout


def test_export_pt_writes_both_layouts_and_refuses_options_of_the_other(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS)
    result = clt_command("export-pt", store.location, tmp_path / "layers", "--batch-samples", "2", "--n-targets", "1")
    assert result.exit_code == 0, result.output
    assert "5 samples in 6 files (6 of them new)" in result.stdout
    y = torch.load(tmp_path / "layers" / "L0" / "batch_2_y.pt", weights_only=True)
    assert torch.equal(y["y"][0], store.sample(4, ["lm.1.mlp_out"]).acts[0])
    result = clt_command("export-pt", store.location, tmp_path / "samples", "--layout", "samples", "--dtype", "float16")
    assert "5 samples in 5 files" in result.stdout
    assert torch.load(tmp_path / "samples" / "sample_0004.pt", weights_only=True)["mean"][1].dtype == torch.float16
    words = ("export-pt", store.location, tmp_path / "never")
    refused(clt_command(*words, "--layout", "samples", "--n-targets", "2"), "--n-targets: needs --layout activations")
    refused(clt_command(*words, "--clt", "x"), "--clt: needs --layout samples")
    refused(clt_command(*words, "--layout", "samples", "--clt", tmp_path / "none"), str(tmp_path / "none"))
    assert not (tmp_path / "never").exists()


def test_push_and_pull_carry_a_store_over_the_hub(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS)
    (tmp_path / "store" / "units" / "leases").mkdir()
    (tmp_path / "store" / "units" / "leases" / "000000.0001.json").write_text("{}")
    with hub_stand_in() as hub:
        settings = environment(hub, tmp_path) | {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

        def run(*words: str | Path) -> str:
            command = [sys.executable, "-m", "clt.launch.commands.main", "store", *map(str, words)]
            result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr[-2000:]
            return result.stdout

        assert f"alice/acts: store {store.id} is commit" in run("push", store.location, "alice/acts")
        assert not any("leases" in name for name in hub.tree("alice/acts"))
        # A dataset card written on the hub is not part of the store.
        card = b"# Activations"
        hub.repositories["dataset:alice/acts"].add("main", {"README.md": Blob(size=len(card), data=card)})
        assert f"store {store.id}\nno problems at level chunk" in run("pull", "alice/acts", tmp_path / "copy")
        assert f"store {store.id} is commit" in run("push", store.location, "alice/acts")
    assert open_store(tmp_path / "copy").id == store.id
    assert not (tmp_path / "copy" / "README.md").exists()


def test_push_refuses_what_is_no_complete_folder(tmp_path: Path) -> None:
    unfinished(tmp_path / "begun")
    refused(clt_command("push", tmp_path / "begun", "alice/x"), str(tmp_path / "begun"), "the capture has not finished")
    refused(clt_command("push", "s3://bucket/store", "alice/x"), "s3://bucket/store: only a folder can be pushed")
    make_store(tmp_path / "store", LENGTHS)
    damage(tmp_path / "store" / "plan.json")
    refused(clt_command("push", tmp_path / "store", "alice/x"), "1 problem at level index", "plan.json")


COMMANDS: dict[str, Callable[[Path], list[Any]]] = {
    "status": lambda path: [path],
    "verify": lambda path: [path],
    "repair": lambda path: [path],
    "gc": lambda path: [path],
    "stats": lambda path: [path],
    "push": lambda path: [path, "alice/x"],
    "export-pt": lambda path: [path, path / "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_without_a_store_is_one_line(command: str, tmp_path: Path) -> None:
    words = COMMANDS[command](tmp_path / "none")
    refused(clt_command(command, *words), f"{tmp_path / 'none'}: no activation store here")
    assert not (tmp_path / "none").exists()


def test_a_url_serves_as_well_as_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    store = make_store("memory://store-cli", LENGTHS)
    assert f"complete, id {store.id}" in clt_command("status", "memory://store-cli").stdout
    assert "no problems at level full" in clt_command("verify", "memory://store-cli", "--level", "full").stdout
    assert "lm.1.mlp_out" in clt_command("stats", "memory://store-cli").stdout
    assert clt_command("export-pt", "memory://store-cli", tmp_path / "pt").exit_code == 0
    refused(clt_command("push", "memory://store-cli", "alice/x"), "only a folder can be pushed")


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    make_store(tmp_path / "store", LENGTHS)
    (tmp_path / "file").touch()
    refused(
        clt_command("stats", tmp_path / "store", "--json", tmp_path / "file" / "r.json"), "r.json: cannot be written"
    )


def test_bench_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(
        clt_command("bench", "--folder", tmp_path / "none", "--size", "1"), str(tmp_path / "none"), "no such folder"
    )
