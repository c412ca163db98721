"""Compiles every Triton kernel for an H200 (sm_90), without a GPU, and counts what its machine code holds.

The kernels' own wrappers run on tensors without memory (the meta device); where they would launch, the kernel is
compiled with exactly those arguments and its machine code counted. Runs as a program, because a process in which Triton
interprets cannot compile:

    python -m tests.kernels.machine_code [CASE ...] > facts.json
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .launches import CASES, DTYPES, SIZES, Layer
from .sass import Code, Counts, read_sass

ARCHITECTURE = 90


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One compiled launch.

    Attributes:
        case: name of the case that launched it.
        size: name of the size.
        dtype: for example "bfloat16".
        kernel: name of the kernel.
        warps: per program.
        block_d: its BLOCK_D, 0 where it has none.
        registers: per thread.
        stack: bytes of stack reserved per thread.
        shared: bytes of shared memory per program.
        whole: counts of all its code.
        loops: counts of each outermost loop.
    """

    case: str
    size: str
    dtype: str
    kernel: str
    warps: int
    block_d: int
    registers: int
    stack: int
    shared: int
    whole: Counts
    loops: list[Counts]


def read_facts(text: str) -> list[Facts]:
    """Parses the output of the program."""
    return [
        Facts(**raw | {"whole": Counts(**raw["whole"]), "loops": [Counts(**loop) for loop in raw["loops"]]})
        for raw in json.loads(text)
    ]


class _Target:
    """The part of a driver that Triton needs to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


@dataclass(frozen=True)
class Launch:
    """A kernel compiled for one set of arguments."""

    kernel: str
    warps: int
    block_d: int
    shared: int
    cubin: bytes


@functools.cache
def compile_launches() -> list[Launch]:
    """From now on every launch in this process compiles for `ARCHITECTURE`, joins this list and runs nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launch = Launch(
            kernel=self.fn.__name__,
            warps=compiled.metadata.num_warps,
            block_d=options.get("BLOCK_D", 0),
            shared=compiled.metadata.shared,
            cubin=compiled.asm["cubin"],
        )
        if launch not in launches:
            launches.append(launch)
        return compiled

    driver.set_active(_Target())
    JITFunction.run = compile_only
    return launches


@functools.cache
def disassemble(cubin: bytes) -> tuple[str, Code]:
    """Resource usage and instruction counts of a compiled kernel; sizes share many kernels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), read_sass(_tool("nvdisasm", "-c", "-ndf", file.name))


def examine(case: str, layer: Layer, launch: Launch) -> Facts:
    """Registers, stack and instruction counts of a compiled kernel."""
    usage, code = disassemble(launch.cubin)
    return Facts(
        case=case,
        size=layer.size.name,
        dtype=str(layer.dtype).removeprefix("torch."),
        kernel=launch.kernel,
        warps=launch.warps,
        block_d=launch.block_d,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared=launch.shared,
        whole=code.whole,
        loops=code.loops,
    )


def tools() -> Path:
    """Folder of the assembler and disassembler that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([tools() / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_sizes(dtype: torch.dtype, names: list[str]) -> list[Facts]:
    """Facts of every launch of the named cases at all sizes."""
    launches, facts = compile_launches(), []
    for size, name in itertools.product(SIZES, names):
        layer = Layer(size=size, dtype=dtype)
        CASES[name](layer)
        facts += [examine(name, layer, launch) for launch in launches]
        launches.clear()
    return facts


def main(names: list[str]) -> None:
    """Compiles the named cases, or all, at all sizes and dtypes; prints a list of `Facts`."""
    with ProcessPoolExecutor(len(DTYPES), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(compile_sizes, DTYPES, [names or list(CASES)] * len(DTYPES)))
    json.dump([asdict(facts) for of_dtype in found for facts in of_dtype], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
