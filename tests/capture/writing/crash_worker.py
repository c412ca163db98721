"""A capture of synthetic activations by workers that are killed, or stopped, at a point of their work.

A worker runs the code of every capture, on a `LocalStorage` that notes each step and sends the signal at a given one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clt.capture.storage.local import LocalStorage, LocalUpload
from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreDtype, StoreSpec
from clt.capture.writing.workers import Schedule, assigned_units
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.records import Modality, ModelIdentity, TokenTable

from ...worker_processes import KillPoint, WorkerServer, serve

if TYPE_CHECKING:
    from typing_extensions import Buffer

WORKERS = 3
#: Exit code of a worker that captured a unit which another had committed.
ANOTHER_COMMITTED = 3
ROWS, CHUNK = 64, 16
GROUPS = (
    SiteGroup(name="lm", sites=("lm.0.resid_mid", "lm.1.resid_mid", "lm.0.mlp_out", "lm.1.mlp_out"), width=8),
    SiteGroup(name="vision", sites=("vision.0.mlp_out",), width=4),
)
#: Tokens of the samples; packed in order, they make six units.
LENGTHS = tuple(5 + 7 * sample * sample % 27 for sample in range(20))

Step = Literal["create", "write", "link", "published"]
#: Where a worker can be killed: a step, and the files that it is taken with.
#: create: before the file exists. write: half of a buffer is in the partial file. link: it has both of its names.
#: published: it has its final name alone.
POINTS: dict[str, tuple[Step, str]] = {
    "mid-begin": ("published", "store.json"),
    "after-lease": ("published", "units/leases/.*"),
    "mid-chunk": ("write", r"data\.zarr/acts/\w+/c/.*"),
    "mid-link": ("link", r"data\.zarr/acts/\w+/c/.*"),
    "after-link": ("published", r"data\.zarr/acts/\w+/c/.*"),
    "before-commit": ("create", "units/commits/.*"),
    "mid-commit": ("write", "units/commits/.*"),
    "after-commit": ("published", "units/commits/.*"),
    "mid-merge": ("published", r"data\.zarr/stats/\w+/\w+/c/.*"),
    "mid-manifest": ("write", "manifest.json"),
    "after-manifest": ("published", "manifest.json"),
}


@dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """The job of a worker.

    Attributes:
        store: folder of the store.
        trace: file in which the worker notes its last step.
        store_dtype: type of the stored values; int8 values go with zstd.
        rank: rank, which decides the worker's first unit.
        point: one of `POINTS`, where the signal is sent; None: nowhere.
        arrival: send it at this arrival there, counted from 1.
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


class CaptureWorkers(WorkerServer):
    """Workers that capture a store."""

    def __init__(self, folder: Path) -> None:
        super().__init__(__name__, folder)
        self._folder, self.jobs = folder, 0

    def start(self, root: Path, store_dtype: StoreDtype, **job: Any) -> tuple[int, Path]:
        """Process id of a new worker, and the file that holds its last step."""
        self.jobs += 1
        trace = self._folder / f"trace-{self.jobs}"
        fields = asdict(CaptureJob(store=str(root), trace=str(trace), store_dtype=store_dtype, **job))
        return self.fork(**fields), trace

    def wait_for(self, process: int = -1) -> tuple[int, int]:
        """As `wait`, also for a worker that stops; fails if one ends in a way that is not part of the test."""
        found, code = self.wait(process, os.WUNTRACED)
        assert code in (0, ANOTHER_COMMITTED) or code < 0, self.log.read_text()[-4000:]
        return found, code


class KillingStorage(LocalStorage):
    """A store in a folder that sends its process a signal at one step."""

    def __init__(self, job: CaptureJob) -> None:
        super().__init__(Path(job.store))
        self._signal = job.signal
        self._point = KillPoint(Path(job.trace), POINTS[job.point] if job.point else None, job.arrival)

    def reached(self, step: Step, key: str) -> bool:
        return self._point.reached(step, key)

    def kill(self) -> None:
        os.kill(os.getpid(), self._signal)

    def create(self, key: str) -> LocalUpload:
        if self.reached("create", key):
            self.kill()
        return KillingUpload(self, key)


class KillingUpload(LocalUpload):
    """A file of it."""

    def __init__(self, storage: KillingStorage, key: str) -> None:
        super().__init__(storage, storage.name(key))
        self._owner, self._key = storage, key

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._owner.reached("write", self._key):
            data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
            super().write([data[: len(data) // 2]])
            self._owner.kill()
            buffers = [data[len(data) // 2 :]]
        super().write(buffers)

    def publish(self) -> bool:
        if self._owner.reached("link", self._key):
            assert self._handle is not None
            os.fsync(self._handle.descriptor)
            try:
                os.link(self._partial, self._path)
            except FileExistsError:
                return super().publish()
            self._owner.kill()
        won = super().publish()
        if self._owner.reached("published", self._key):
            self._owner.kill()
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
    """Activations of the unit."""
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


def work(**fields: Any) -> int:
    """Does a `CaptureJob`; `ANOTHER_COMMITTED` if a unit was committed by another owner."""
    job = CaptureJob(**fields)
    writer = StoreWriter(KillingStorage(job), make_spec(job.store_dtype), make_plan())
    if not writer.calibrated:
        writer.calibrate(unit_data(0, job.variant).acts)
    won = True
    if job.unit is not None:
        data = unit_data(job.unit, job.variant)
        Path(f"{job.gate}-{job.variant}").touch()
        while not os.path.exists(job.gate):
            pass
        return 0 if writer.commit(job.unit, data) else ANOTHER_COMMITTED
    schedule = Schedule(rank=job.rank, world=WORKERS, ttl_seconds=job.ttl_seconds)
    for unit in assigned_units(writer, schedule):
        won &= writer.commit(unit, unit_data(unit, job.variant))
    writer.finalize()
    return 0 if won else ANOTHER_COMMITTED


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work)
