"""Which model a job runs: the keys that every job with a model shares."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from clt.capture.adapter import ModelAdapter
from clt.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelChoice:
    """A model by name, and how to run it."""

    model: str
    """Folder or hub name of the model."""
    revision: str | None = None
    """Hub revision of the model."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Floating-point type the model runs in."""
    device: str = "cpu"
    """Torch device the model runs on."""

    def load(self) -> ModelAdapter:
        """The model; ModelError when it cannot be loaded."""
        return ModelAdapter.from_pretrained(self.model, self.revision, self.dtype, self.device)
