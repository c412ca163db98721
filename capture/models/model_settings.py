"""Settings of the model that a job runs, shared by capture, attribution and evaluation."""

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
    """Settings of the model: its name, number type and devices."""

    model: str
    """Folder or hub name of the model."""
    revision: str | None = None
    """Hub revision of the model: branch, tag or commit; default: its main branch; not used for folders."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Floating-point type of the weights and of the forward pass."""
    device: str = "cpu"
    """Torch device of the model; under torchrun, "cuda" is the GPU of each process."""
    device_map: DeviceMap | None = None
    """Spreads the layers over all GPUs, instead of `device`; needs the package `accelerate`; default: one device."""
    quantization: Quantization | None = None
    """Quantises the weights of linear layers; needs `bitsandbytes` and `accelerate`; default: not quantised."""

    @model_validator(mode="after")
    def _has_one_placement(self) -> ModelChoice:
        if self.device_map is not None and self.device != "cpu":
            raise ValueError(f"device={self.device} and device_map={self.device_map} exclude each other; remove one")
        return self

    def load(self) -> ModelAdapter:
        """Loads the model; ModelError if that fails."""
        device = self.device
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        return ModelAdapter.from_pretrained(
            self.model, self.revision, self.dtype, device, device_map=self.device_map, quantization=self.quantization
        )
