"""Facts about the machine and the versions that a measurement belongs to; every benchmark carries them."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_MIB = 2**20


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
class Machine:
    """Where and when something was measured.

    Attributes:
        date: day, UTC, ISO 8601.
        cpu: model name of the processor.
        cores: cores that this process may use.
        memory_mib: physical memory, MiB.
        gpu: name of the first GPU, None without one.
        kernel: operating system and kernel release.
        filesystem: kind of the file system under the benchmark's folder, "unknown" where the system does not tell.
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


def this_machine(packages: Sequence[str], folder: Path) -> Machine:
    """Looks at the machine now.

    Args:
        packages: names on the package index; those that are not installed are left out.
        folder: an existing folder, whose file system is named.

    Returns:
        The facts.
    """
    one, five, fifteen = os.getloadavg()
    return Machine(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        cpu=_cpu(),
        cores=_cores(),
        memory_mib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB,
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        filesystem=_filesystem(folder),
        load=(one, five, fifteen),
        python=platform.python_version(),
        packages=_installed(packages),
    )


def describe(machine: Machine) -> str:
    """The facts as lines of text, for the foot of a table."""
    packages = ", ".join(f"{package.name} {package.version}" for package in machine.packages)
    load = ", ".join(f"{value:.2f}" for value in machine.load)
    gpu = f", {machine.gpu}" if machine.gpu else ", no GPU"
    return (
        f"Machine: {machine.cpu}, {machine.cores} cores, {machine.memory_mib / 1024:.0f} GiB{gpu}; {machine.kernel}, "
        f"{machine.filesystem}; load before the run {load}.\n"
        f"Python {machine.python}, {packages}.\n"
        f"Date: {machine.date}."
    )


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    # Containers and batch systems give a process fewer cores than the machine has; macOS cannot be asked.
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
