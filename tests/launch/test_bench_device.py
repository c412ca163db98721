"""GPU check: its smoke section runs on a CPU in Triton's interpreter, and a failing case does not end a section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clt.launch.bench.device.check_report import CheckReport

ROOT = Path(__file__).resolve().parents[2]


def test_dry_smoke_finds_every_operation_close_to_float64(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.9")
    command = [sys.executable, "-m", "clt.launch.bench.device.gpu_check", "--dry", "smoke"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    cases = json.loads((tmp_path / "gpu_smoke.json").read_text())
    assert len(cases) == 3
    for name, values in cases.items():
        assert values.pop("same_bits", True) and values.pop("same_threshold", True)
        limit = 0.02 if "bfloat16" in name else 1e-5
        assert values and all(value <= limit for value in values.values()), (name, values)


def test_a_failing_case_is_reported_in_one_line_and_the_next_one_runs(tmp_path: Path) -> None:
    report = CheckReport(section="smoke", file=tmp_path / "gpu_smoke.json")
    with report.case("first"):
        raise ValueError("too few rows\nand more")
    with report.case("second"):
        report.add("second", ms=1.5)
    cases = json.loads(report.file.read_text())
    assert report.failed and cases["second"] == {"ms": 1.5}
    assert cases["first"]["error"].startswith("ValueError: too few rows at test_bench_device.py:")
