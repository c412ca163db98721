"""Machine code of the kernels for an H200: no spills, 16-byte loads and no barrier where rows are gathered, no atomics.

The compiler and disassembler come with Triton, so this needs no GPU. One process compiles everything for all tests.
"""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .launches import DTYPES, SIZES
from .machine_code import Facts, read_facts, tools
from .sass import Counts, read_sass

ROOT = Path(__file__).resolve().parent.parent.parent

#: Registers per thread that each kernel may use. A multiprocessor has 65536: with 64 each, 32 programs of one warp live
#: on it, as many as it takes; with 128 half of them; of the product with its 8 warps, one.
REGISTERS = {
    "_decode_kernel": 64,
    "feature_kernel": 128,
    "join_kernel": 128,
    "slot_grad_kernel": 64,
    "_row_adam_kernel": 128,
    "_group_max_kernel": 64,
    "_select_kernel": 64,
    "_gemm_group_max_kernel": 224,
    "_histogram_kernel": 96,
    "_count_equal_kernel": 64,
    "_select_above_kernel": 64,
}


@dataclass(frozen=True, kw_only=True)
class Gather:
    """A kernel that reads rows one after the other.

    Attributes:
        scalars: numbers it loads with each row: indices and coefficients.
        itemsize: bytes of an element of a row; None for that of the weights.
    """

    scalars: int
    itemsize: int | None = None


GATHERS = {
    "_decode_kernel": Gather(scalars=2),  # feature, value
    "feature_kernel": Gather(scalars=4),  # token, slot, coefficient, weight of the token
    "join_kernel": Gather(scalars=1, itemsize=4),  # part of the bias gradient
}

#: Rows that must be in flight at once in a kernel's main loop: the unrolling of the rules.
IN_FLIGHT = 8


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    """Every kernel at every size and dtype; compiled once, also where several workers share a session."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    for tool in ("ptxas", "nvdisasm", "cuobjdump"):
        if not (tools() / tool).exists():
            pytest.skip(f"needs {tool}, which this build of Triton does not bring")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    file = shared / "machine_code.json"
    with (shared / "machine_code.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            # In this process Triton may be interpreting.
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "tests.kernels.machine_code"]
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            file.write_text(result.stdout)
    return read_facts(file.read_text())


def _of(facts: list[Facts], kernel: str) -> list[Facts]:
    found = [fact for fact in facts if fact.kernel == kernel]
    assert {(fact.size, fact.dtype) for fact in found} == {
        (size.name, str(dtype).removeprefix("torch.")) for size in SIZES for dtype in DTYPES
    }
    return found


def _vectors_per_row(fact: Facts) -> int:
    """16-byte loads by which one lane takes its share of a row."""
    itemsize = GATHERS[fact.kernel].itemsize or (2 if fact.dtype == "bfloat16" else 4)
    assert fact.block_d * itemsize % (512 * fact.warps) == 0, fact
    return fact.block_d * itemsize // (512 * fact.warps)


def test_every_kernel_is_compiled_and_has_its_rule(facts: list[Facts]) -> None:
    written = {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert written == {fact.kernel for fact in facts} == set(REGISTERS)


@pytest.mark.parametrize("kernel", REGISTERS)
def test_kernel_spills_nothing_and_stays_within_its_registers(facts: list[Facts], kernel: str) -> None:
    for fact in _of(facts, kernel):
        # Not the size of the stack: ptxas may reserve 8 bytes there that no instruction touches.
        assert fact.whole.local == 0, fact
        assert fact.registers <= REGISTERS[kernel], fact


@pytest.mark.parametrize("kernel", REGISTERS)
def test_kernel_has_no_atomics(facts: list[Facts], kernel: str) -> None:
    assert not [fact for fact in _of(facts, kernel) if fact.whole.atomics]


@pytest.mark.parametrize("kernel", GATHERS)
def test_gather_loops_load_rows_by_16_bytes_and_wait_for_no_other_warp(facts: list[Facts], kernel: str) -> None:
    for fact in _of(facts, kernel):
        loops = [loop for loop in fact.loops if loop.wide or loop.medium or loop.narrow]
        assert loops, fact
        for loop in loops:
            rows, rest = divmod(loop.wide, _vectors_per_row(fact))
            assert rows > 0 and rest == 0, fact
            assert loop.medium == 0 and loop.narrow <= GATHERS[kernel].scalars * rows, fact
            assert loop.barriers == 0 and loop.local == 0, fact
        assert max(loop.wide for loop in loops) >= IN_FLIGHT * _vectors_per_row(fact), fact


@pytest.mark.parametrize("kernel", ["_group_max_kernel", "_row_adam_kernel"])
def test_streaming_kernels_load_by_16_bytes(facts: list[Facts], kernel: str) -> None:
    for fact in _of(facts, kernel):
        # A lane's 8 columns are 16 bytes of weights, but 8 bytes of codes, of which there are two moments.
        medium = 2 if fact.case == "row_adam_codes" else 0
        assert fact.whole.wide > 0 and fact.whole.medium <= medium, fact


@pytest.mark.parametrize("kernel", ["_histogram_kernel", "_count_equal_kernel"])
def test_counting_loops_load_by_16_bytes_alone(facts: list[Facts], kernel: str) -> None:
    for fact in _of(facts, kernel):
        assert any(loop.wide for loop in fact.loops), fact
        assert not any(loop.medium or loop.narrow for loop in fact.loops), fact


def test_encoder_product_runs_on_tensor_cores(facts: list[Facts]) -> None:
    products = [fact for fact in _of(facts, "_gemm_group_max_kernel") if fact.dtype == "bfloat16"]
    assert all(any(loop.tensor_cores for loop in fact.loops) for fact in products)


LISTING = """
        .text.some_kernel:
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   LDG.E.LTC128B.64 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   BRA.U UP0, `(.L_x_0) ;
        /*0080*/              @!P1 EXIT ;
        /*0090*/                   STL [R1], R2 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BAR.SYNC 0x0 ;
        /*00c0*/                   RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R3 ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0100*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0110*/                   BRA `(.L_x_6);
"""


def test_reading_machine_code_finds_loops_and_their_instructions() -> None:
    code = read_sass(LISTING)
    # The jump back to L_x_5 closes no loop; L_x_6 is padding.
    assert code.loops == [
        Counts(
            instructions=6,
            wide=1,
            medium=1,
            narrow=1,
            barriers=1,
            local=0,
            atomics=0,
            tensor_cores=0,
            shuffles=0,
        )
    ]
    assert (code.whole.instructions, code.whole.barriers, code.whole.local) == (18, 2, 1)
    assert (code.whole.atomics, code.whole.tensor_cores) == (1, 1)
