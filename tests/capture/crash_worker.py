"""A capture of synthetic activations by workers that die, or stop, where they are told to.

As a script it is a server: it imports everything once and then forks a worker for each job that comes as a line of
JSON on its standard input, so that a worker starts in milliseconds. A worker is a process like any other, and what
kills it is a real SIGKILL. It runs the code of every capture, on a `LocalStorage` that notes each step and strikes at
the one it was given.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clt.capture.storage.local import LocalStorage, LocalUpload
from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreDtype, StoreSpec
from clt.capture.writing.workers import Schedule, assigned_units
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.records import Modality, ModelIdentity, TokenTable

if TYPE_CHECKING:
    from typing_extensions import Buffer

WORKERS = 3
ROWS, CHUNK = 64, 16
GROUPS = (
    SiteGroup(name="lm", sites=("lm.0.resid_mid", "lm.1.resid_mid", "lm.0.mlp_out", "lm.1.mlp_out"), width=8),
    SiteGroup(name="vision", sites=("vision.0.mlp_out",), width=4),
)
#: Tokens of the samples; packed in order, they make six units.
LENGTHS = tuple(5 + 7 * sample * sample % 27 for sample in range(20))

Step = Literal["create", "write", "link", "published"]
#: Where a worker can be struck: a step, and the files that it is taken with.
#: create: before the file exists. write: half of a buffer is in the partial file. link: it has both of its names.
#: published: it has its final name alone.
POINTS: dict[str, tuple[Step, str]] = {
    "mid-begin": ("published", "store.json"),
    "after-lease": ("published", "units/leases/"),
    "mid-chunk": ("write", r"data\.zarr/acts/\w+/c/"),
    "mid-link": ("link", r"data\.zarr/acts/\w+/c/"),
    "after-link": ("published", r"data\.zarr/acts/\w+/c/"),
    "before-commit": ("create", "units/commits/"),
    "mid-commit": ("write", "units/commits/"),
    "after-commit": ("published", "units/commits/"),
    "mid-merge": ("published", r"data\.zarr/stats/\w+/\w+/c/"),
    "mid-manifest": ("write", "manifest.json"),
    "after-manifest": ("published", "manifest.json"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker does.

    Attributes:
        store: folder of the store.
        trace: file in which the worker notes its last step.
        store_dtype: type of the stored values; int8 values go with zstd.
        rank: where the worker starts.
        point: one of `POINTS`, where the signal strikes; None: nowhere.
        arrival: when it comes there for the so-manieth time.
        signal: SIGKILL or SIGSTOP.
        ttl_seconds: of its leases.
        variant: workers of different variants see slightly different activations, as on different machines.
        unit: commits this unit, leased or not, and nothing else; None: captures the whole store.
        gate: file for which it waits before it commits, once it has made that file's name with `-variant` at its end.
    """

    store: str
    trace: str
    store_dtype: StoreDtype
    rank: int = 0
    point: str | None = None
    arrival: int = 1
    signal: int = signal.SIGKILL
    ttl_seconds: float = 60.0
    variant: int = 0
    unit: int | None = None
    gate: str = ""


@dataclass
class Doom:
    """The step at which a worker is struck."""

    job: Job
    trace: int = field(init=False)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.trace = os.open(self.job.trace, os.O_WRONLY | os.O_CREAT, 0o666)
        self.left = self.job.arrival

    def at(self, step: Step, key: str) -> bool:
        """Notes a step and says whether it is the one."""
        os.pwrite(self.trace, f"{step} {key}".ljust(120).encode(), 0)
        if self.job.point is None:
            return False
        doomed, files = POINTS[self.job.point]
        if step != doomed or not re.match(files, key):
            return False
        self.left -= 1
        return self.left == 0

    def strike(self) -> None:
        os.kill(os.getpid(), self.job.signal)


class DoomedStorage(LocalStorage):
    """A store in a folder that strikes its process at one step."""

    def __init__(self, root: Path, doom: Doom) -> None:
        super().__init__(root)
        self.doom = doom

    def create(self, key: str) -> LocalUpload:
        if self.doom.at("create", key):
            self.doom.strike()
        return DoomedUpload(self, key)


class DoomedUpload(LocalUpload):
    """A file of it."""

    def __init__(self, storage: DoomedStorage, key: str) -> None:
        super().__init__(storage, storage.name(key))
        self._doom, self._key = storage.doom, key

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._doom.at("write", self._key):
            data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
            super().write([data[: len(data) // 2]])
            self._doom.strike()
            buffers = [data[len(data) // 2 :]]
        super().write(buffers)

    def publish(self) -> bool:
        if self._doom.at("link", self._key):
            assert self._handle is not None
            os.fsync(self._handle.descriptor)
            try:
                os.link(self._partial, self._path)
            except FileExistsError:
                return super().publish()
            self._doom.strike()
        won = super().publish()
        if self._doom.at("published", self._key):
            self._doom.strike()
        return won


def make_spec(store_dtype: StoreDtype) -> StoreSpec:
    """Two groups of different width, in units of 64 rows and chunks of 16."""
    identity = ModelIdentity(
        name="synthetic", revision="local", architecture="none", n_layers=2, d_model=8, fingerprint="0" * 64
    )
    return StoreSpec(
        schema_version=SCHEMA_VERSION,
        created_by="tests",
        model=identity,
        model_dtype="float32",
        groups=GROUPS,
        store_dtype=store_dtype,
        compression="zstd" if store_dtype == "int8" else "none",
        rows_per_unit=ROWS,
        chunk_tokens=CHUNK,
        batch_size=1,
        seed=5,
        source="synthetic",
    )


def make_plan() -> CapturePlan:
    """Samples packed into units in order."""
    starts, tokens = [0], [0]
    for sample, length in enumerate(LENGTHS):
        if tokens[-1] + length > ROWS:
            starts.append(sample)
            tokens.append(0)
        tokens[-1] += length
    return CapturePlan(sample_starts=(*starts, len(LENGTHS)), unit_tokens=tuple(tokens))


def activations(sample: Tensor, position: Tensor, group: SiteGroup, variant: int = 0) -> Tensor:
    """[n, S, D] float32: noise in [-1, 1) that depends on sample, position, site and channel alone."""
    row = sample.long() * 1_000_003 + position.long() * 8191
    column = torch.arange(len(group.sites))[:, None] * 131 + torch.arange(group.width) * 17 + len(group.name)
    mixed = (row[:, None, None] + column) * 2_654_435_761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 1_540_483_477 % 2**32
    return (mixed.double() / 2**31 - 1).float() * (1 + variant / 128)


def unit_data(unit: int, variant: int = 0) -> UnitData:
    """What a capture of the unit yields."""
    samples = make_plan().samples(unit)
    lengths = tuple(LENGTHS[sample] for sample in samples)
    sample = torch.arange(samples.start, samples.stop).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths]).int()
    absent = torch.full((len(sample),), -1, dtype=torch.int16)
    tokens = TokenTable(
        sample=sample,
        position=position,
        token_id=(sample * 7 + position).int(),
        modality=torch.where(position == 0, int(Modality.BOS), int(Modality.TEXT)).to(torch.uint8),
        patch_row=absent,
        patch_col=absent,
        image=absent,
    )
    return UnitData(
        acts={group.name: activations(sample, position, group, variant) for group in GROUPS},
        tokens=tokens,
        sample_ids=tuple(f"sample-{number}" for number in samples),
        sample_tokens=lengths,
    )


def work(job: Job) -> int:
    """Does a job; exit status 3 says that a unit was committed by another owner."""
    writer = StoreWriter(DoomedStorage(Path(job.store), Doom(job)), make_spec(job.store_dtype), make_plan())
    if not writer.calibrated:
        writer.calibrate(unit_data(0, job.variant).acts)
    won = True
    if job.unit is not None:
        data = unit_data(job.unit, job.variant)
        Path(f"{job.gate}-{job.variant}").touch()
        while not os.path.exists(job.gate):
            pass
        return 0 if writer.commit(job.unit, data) else 3
    schedule = Schedule(rank=job.rank, world=WORKERS, ttl_seconds=job.ttl_seconds)
    for unit in assigned_units(writer, schedule):
        won &= writer.commit(unit, unit_data(unit, job.variant))
    writer.finalize()
    return 0 if won else 3


def serve() -> None:
    """Answers `{"fork": job}` with a process id and `{"wait": process id or -1}` with process id and wait status."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = json.dumps(os.waitpid(request["wait"], os.WUNTRACED))
        else:
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    status = work(Job(**request["fork"]))
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(status)
            answer = json.dumps(process)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
