"""Description of the machine and the package versions, which every benchmark report contains."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clt.errors import ConfigError

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package.

    Attributes:
        name: its name on the package index.
        version: installed version.
    """

    name: str
    version: str


@dataclass(frozen=True, kw_only=True)
class MachineInfo:
    """Hardware, software and date of a measurement.

    Attributes:
        date: day, UTC, ISO 8601.
        cpu: model name of the processor.
        cores: cores available to this process.
        memory_mib: physical memory, MiB.
        gpu: name of the first GPU, None without one.
        kernel: operating system and kernel release.
        filesystem: type of the file system under the benchmark's folder, or "unknown".
        load: load averages over 1, 5 and 15 minutes, before the first measurement.
        python: version.
        packages: versions of the packages that were measured or used.
    """

    date: str
    cpu: str
    cores: int
    memory_mib: int
    gpu: str | None
    kernel: str
    filesystem: str
    load: tuple[float, float, float]
    python: str
    packages: tuple[Package, ...]


def this_machine(packages: Sequence[str], folder: Path) -> MachineInfo:
    """Describes the machine.

    Args:
        packages: names on the package index; those that are not installed are left out.
        folder: existing folder whose file system is named.
    """
    one, five, fifteen = os.getloadavg()
    return MachineInfo(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        cpu=_cpu(),
        cores=_cores(),
        memory_mib=_physical_memory() // _MIB,
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        filesystem=_filesystem(folder),
        load=(one, five, fifteen),
        python=platform.python_version(),
        packages=_installed(packages),
    )


def describe(machine: MachineInfo) -> str:
    """The description as lines of text."""
    packages = ", ".join(f"{package.name} {package.version}" for package in machine.packages)
    load = ", ".join(f"{value:.2f}" for value in machine.load)
    gpu = f", {machine.gpu}" if machine.gpu else ", no GPU"
    return (
        f"Machine: {machine.cpu}, {machine.cores} cores, {machine.memory_mib / 1024:.0f} GiB{gpu}; {machine.kernel}, "
        f"{machine.filesystem}; load before the run {load}.\n"
        f"Python {machine.python}, {packages}.\n"
        f"Date: {machine.date}."
    )


def device_words(device: torch.device) -> str:
    """The device of a measurement: GPU and CUDA version, or number of CPU threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads"


def check_fits(name: str, needed: float, device: torch.device) -> None:
    """Refuses a benchmark size that exceeds the free GPU memory or, on a CPU, the physical memory.

    Args:
        name: of the size.
        needed: bytes.
        device: whose memory.

    Raises:
        ConfigError: it does not fit.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _physical_memory()
    if needed > free:
        raise ConfigError(
            f"--size {name}: needs about {needed / _GIB:.0f} GiB and {free / _GIB:.0f} GiB are available; choose a "
            "smaller size"
        )


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    # Containers and batch systems may give a process fewer cores than the machine has; macOS has no such call.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _filesystem(folder: Path) -> str:
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return "unknown"
    place, best, kind = folder.resolve(), -1, "unknown"
    for line in mounts.read_text(encoding="utf-8").splitlines():
        _, point, name, *_ = line.split()
        # Later lines are mounted over earlier ones, hence >=.
        if place.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), name
    return kind


def _installed(names: Sequence[str]) -> tuple[Package, ...]:
    found = []
    for name in names:
        try:
            found.append(Package(name=name, version=version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)
