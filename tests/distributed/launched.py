"""`launch/train.py` as users start it: a small store, a job's file, and processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreSpec
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.checkpoint.weights import read_tensors
from clt.records import Modality, ModelIdentity, TokenTable

from .toy_job import global_batch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]
UNITS, ROWS, LAYERS, D_MODEL = 2, 2048, 4, 16


def write_store(folder: Path) -> None:
    """A store of 4,096 tokens of a teacher network, one token a sample."""
    sites = tuple(f"lm.{layer}.{site}" for layer in range(LAYERS) for site in ("resid_mid", "mlp_out"))
    spec = StoreSpec(
        schema_version=SCHEMA_VERSION,
        model=ModelIdentity(
            name="teacher", revision="local", architecture="T", n_layers=LAYERS, d_model=D_MODEL, fingerprint="ab"
        ),
        model_dtype="float32",
        created_by="tests",
        groups=(SiteGroup(name="lm", sites=sites, width=D_MODEL),),
        store_dtype="bfloat16",
        compression="none",
        rows_per_unit=ROWS,
        chunk_tokens=64,
        batch_size=1,
        seed=0,
        source="teacher",
    )
    plan = CapturePlan(sample_starts=tuple(range(0, ROWS * UNITS + 1, ROWS)), unit_tokens=(ROWS,) * UNITS)
    writer = StoreWriter(folder, spec, plan)
    for unit in range(UNITS):
        x, y = global_batch(unit, tokens=ROWS)
        acts = torch.stack([x, y], dim=1).flatten(0, 1).transpose(0, 1)
        writer.commit(unit, UnitData(acts={"lm": acts}, tokens=_tokens(unit), **_samples(unit)))
    writer.finalize()


def _samples(unit: int) -> dict[str, tuple]:
    return {"sample_ids": tuple(f"{unit}-{row}" for row in range(ROWS)), "sample_tokens": (1,) * ROWS}


def _tokens(unit: int) -> TokenTable:
    zeros = torch.zeros(ROWS, dtype=torch.int16)
    return TokenTable(
        sample=torch.arange(unit * ROWS, (unit + 1) * ROWS),
        position=torch.arange(ROWS, dtype=torch.int32),
        token_id=torch.ones(ROWS, dtype=torch.int32),
        modality=torch.full((ROWS,), Modality.IMAGE, dtype=torch.uint8),
        patch_row=zeros - 1,
        patch_col=zeros - 1,
        image=zeros - 1,
    )


def write_job(store: Path, folder: Path) -> Path:
    """Configuration file of a job of 60 steps that writes into a folder."""
    tree = {
        "store": str(store),
        "output": str(folder / "out"),
        "steps": 60,
        "clt": {"n_features": 64, "k": 4},
        "optimizer": {"learning_rate": 0.01},
        "auxk": {"dead_after_tokens": 512},
        "data": {"batch_tokens": 128, "window_tokens": 1024},
        "log_every": 10,
        "checkpoint_every": 5,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(arguments: Sequence[str | Path], *, new_session: bool = False, **environment: str) -> subprocess.Popen[str]:
    """A Python process with one thread and no GPU."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
    )


def same_bits(left: Path, right: Path) -> None:
    """The tensors of a checkpoint are those of another."""
    for path in sorted(left.glob("*.safetensors")):
        expected, found = read_tensors(path), read_tensors(right / path.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), path.name


def wait_for(path: Path, process: subprocess.Popen[str], size: int = 0) -> None:
    """Waits until a process has made a file or folder, of more than so many bytes."""
    deadline = time.monotonic() + 240
    while not path.exists() or path.stat().st_size <= size:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear, or has no more than {size} bytes"
        time.sleep(0.002)


def free_port() -> str:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def errors(stderr: str) -> list[str]:
    """Error lines; none is a traceback."""
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]
