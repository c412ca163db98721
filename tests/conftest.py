"""Fixtures shared by all tests: a fixed seed and the committed toy model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from clt.capture.adapter import ModelAdapter

ROOT = Path(__file__).resolve().parent.parent
TOY_CHECKPOINT = ROOT / "examples" / "toy_vlm" / "checkpoints" / "base"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_adapter() -> ModelAdapter:
    """The committed toy vision-language model."""
    from clt.capture.adapter import ModelAdapter

    return ModelAdapter.from_pretrained(str(TOY_CHECKPOINT))
