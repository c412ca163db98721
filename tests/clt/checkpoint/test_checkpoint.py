"""Checkpoints: complete or absent, verified before use, and refused by other jobs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clt.checkpoint import manifest
from clt.checkpoint.manifest import latest_folder, verify_folder
from clt.distributed.mesh import Mesh
from clt.errors import CheckpointError
from clt.training.deepspeed_engine import joined_job
from clt.transcoder.model import CrossLayerTranscoder

from ...distributed.toy_job import MODEL, toy_config, toy_trainer


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


@pytest.fixture
def interrupted(mesh: Mesh, tmp_path: Path) -> Path:
    """The newest checkpoint of a job that stopped after step 3 of 6."""
    trainer = toy_trainer(toy_config(tmp_path), mesh, broken_step=4)
    with pytest.raises(Exception, match="truncated"):
        trainer.fit()
    folder = latest_folder(tmp_path)
    assert folder is not None and folder.name == "step_00000003"
    return folder


def _resume(mesh: Mesh, folder: Path, store_id: str = "toy-store", **job: Any) -> Path:
    return toy_trainer(toy_config(folder.parent, **job), mesh, store_id).fit()


def test_checkpoint_is_the_trained_transcoder(mesh: Mesh, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path), mesh)
    folder = trainer.fit()
    verify_folder(folder)
    loaded = CrossLayerTranscoder.from_pretrained(folder)
    x = torch.randn(4, 8, 16)
    torch.testing.assert_close(loaded(x), trainer.transcoder(x), rtol=0, atol=0)
    assert loaded.provenance.model == MODEL
    assert loaded.provenance.store_id == "toy-store"


def test_newest_checkpoints_are_kept(mesh: Mesh, tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path, checkpoint_every=1, keep_checkpoints=2), mesh).fit()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "metrics.jsonl", "step_00000005", "step_00000006", "tensorboard"]
    assert latest_folder(tmp_path) == tmp_path / "step_00000006"


@pytest.mark.parametrize("name", ["layer_02.safetensors", "optimizer_00.safetensors", "progress.json", "config.yaml"])
def test_damaged_file_is_named(name: str, mesh: Mesh, interrupted: Path) -> None:
    data = (interrupted / name).read_bytes()
    (interrupted / name).write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    with pytest.raises(CheckpointError, match=rf"step_00000003/{name}: damaged"):
        _resume(mesh, interrupted)


def test_truncated_file_is_named(mesh: Mesh, interrupted: Path) -> None:
    os.truncate(interrupted / "optimizer_01.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"optimizer_01\.safetensors: damaged"):
        _resume(mesh, interrupted)


@pytest.mark.parametrize("name", ["layer_02.safetensors", "manifest.json"])
def test_missing_file_is_named(name: str, mesh: Mesh, interrupted: Path) -> None:
    (interrupted / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step_00000003/{name}: file is missing"):
        _resume(mesh, interrupted)


def test_pointer_to_a_missing_checkpoint_is_an_error(mesh: Mesh, interrupted: Path) -> None:
    (interrupted.parent / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match="latest: names 'step_00000009', which does not exist"):
        _resume(mesh, interrupted)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"clt": {"n_features": 64, "k": 5}}, "key 'config.k' is 4 in the checkpoint and 5 in this job"),
        ({"steps": 7}, "key 'steps' is 6 in the checkpoint and 7 in this job"),
        ({"seed": 3}, "key 'seed' is 0 "),
        ({"optimizer": {"learning_rate": 0.5}}, "key 'optimizer.learning_rate' is 0.01 "),
        ({"store_id": "another"}, "key 'store' is 'toy-store' in the checkpoint and 'another' in this job"),
    ],
)
def test_checkpoint_of_another_job_is_refused(job: dict[str, Any], message: str, mesh: Mesh, interrupted: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        _resume(mesh, interrupted, **job)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_from_before_a_setting_existed_is_gone_on_with(mesh: Mesh, interrupted: Path) -> None:
    checksums = manifest.read_manifest(interrupted)
    card = json.loads((interrupted / "transcoder.json").read_text())
    job = yaml.safe_load((interrupted / "config.yaml").read_text())
    del card["config"]["feature_offset"], job["optimizer"]["bias_rate"]
    manifest.write_text(interrupted / "transcoder.json", json.dumps(card), checksums)
    manifest.write_text(interrupted / "config.yaml", yaml.safe_dump(job), checksums)
    manifest.write_manifest(interrupted, checksums)
    assert _resume(mesh, interrupted).name == "step_00000006"


def test_logging_and_checkpoint_intervals_may_change(mesh: Mesh, interrupted: Path) -> None:
    folder = _resume(mesh, interrupted, log_every=1, checkpoint_every=2, keep_checkpoints=5)
    assert sorted(p.name for p in folder.parent.glob("step_*")) == [f"step_{s:08d}" for s in (3, 4, 6)]


def test_failed_write_keeps_the_previous_checkpoint(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer(toy_config(tmp_path), mesh)
    write_tensors, written = manifest.write_tensors, []

    def full_disk(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        written.append(path)
        if len(written) > 12:
            raise OSError(28, "No space left on device", str(path))
        write_tensors(path, tensors)

    monkeypatch.setattr(manifest, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match=r"\.step_00000006\.tmp/.*cannot be written.*No space left"):
        trainer.fit()
    monkeypatch.undo()
    folder = latest_folder(tmp_path)
    assert folder is not None and folder.name == "step_00000003"
    verify_folder(folder)
    assert _resume(mesh, folder).name == "step_00000006"
    assert not list(tmp_path.glob(".*"))


def test_folder_that_a_killed_run_left_unnamed_is_replaced(mesh: Mesh, interrupted: Path) -> None:
    # Killed between the rename of step 6 and the pointer: the folder is complete, `latest` is not moved.
    orphan = interrupted.parent / "step_00000006"
    orphan.mkdir()
    (orphan / "manifest.json").write_text(json.dumps({}))
    folder = _resume(mesh, interrupted)
    assert folder == orphan
    verify_folder(folder)


def test_reports_after_the_last_checkpoint_of_a_killed_run_are_removed(mesh: Mesh, interrupted: Path) -> None:
    folder = _resume(mesh, interrupted)
    leftover = folder.with_name(".step_00000003.old.tmp")
    interrupted.rename(leftover)
    assert _resume(mesh, folder) == folder
    assert not leftover.exists()
