"""Fixtures shared by all tests: a fixed seed and the committed toy model; benchmarks/, not installed, is importable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from clt.launch.bench.checkout import load_benchmarks

if TYPE_CHECKING:
    from clt.capture.models.adapter import ModelAdapter

# Triton decides at its first import, by any library, whether its functions are interpreted. And library
# products on a GPU are deterministic only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

load_benchmarks()

ROOT = Path(__file__).resolve().parent.parent
TOY_CHECKPOINT = ROOT / "examples" / "toy_vlm" / "checkpoints" / "base"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_adapter() -> ModelAdapter:
    """The committed toy vision-language model."""
    from clt.capture.models.adapter import ModelAdapter

    return ModelAdapter.from_pretrained(str(TOY_CHECKPOINT))
