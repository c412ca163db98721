"""Which model a job runs: the keys that every job with a model shares."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.loading import DeviceMap, Quantization
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
    """Torch device the model runs on; "cuda" is the GPU of its own for each process that torchrun starts."""
    device_map: DeviceMap | None = None
    """Spreads a model over all GPUs, when one does not hold it; needs the package `accelerate`."""
    quantization: Quantization | None = None
    """Rounds the weights while they are loaded; needs the packages `bitsandbytes` and `accelerate`."""

    @model_validator(mode="after")
    def _has_one_place(self) -> ModelChoice:
        if self.device_map is not None and self.device != "cpu":
            raise ValueError(f"device_map chooses the devices itself; remove it, or device: {self.device}")
        return self

    def load(self) -> ModelAdapter:
        """The model; ModelError when it cannot be loaded."""
        device = self.device
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        return ModelAdapter.from_pretrained(
            self.model, self.revision, self.dtype, device, device_map=self.device_map, quantization=self.quantization
        )
