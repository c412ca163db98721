"""Sizes of the training benchmark, and the variants of a job compared at each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clt.config import parse_config
from clt.planning.job import Job, MeshShape, numerics_of
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig

Dtype = Literal["float32", "bfloat16"]

#: Configured steps, so many that no schedule ends within a benchmark.
_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Training settings of a transcoder.

    Attributes:
        name: row of the tables.
        settings: keys of `TrainConfig` that differ from the defaults.
    """

    name: str
    settings: Mapping[str, Any]


#: The defaults of a job, and the same without the loss for dead features.
DEFAULT = Variant(name="Adam, float32", settings={})
PLAIN = Variant(name="Adam, float32, without AuxK", settings={"auxk": {"coefficient": 0}})


def _row_adam(name: str, **optimizer: Any) -> Variant:
    """The optimizer inside the backward pass, without stored gradients; those of AuxK are part of the same pass."""
    return Variant(name=name, settings={"optimizer": {"kind": "row_adam", "gradient_clip": 0} | optimizer})


ROW = _row_adam("row Adam, float32")
ROW_8BIT = _row_adam("row Adam, bfloat16, 8-bit moments", weights="bfloat16", moments="int8")
ROW_SMALL = _row_adam("row Adam without momentum, bfloat16", weights="bfloat16", moments="bfloat16", betas=(0, 0.999))
MASTER = Variant(
    name="Adam, bfloat16 and float32 copies",
    settings={"optimizer": {"weights": "bfloat16_master"}},
)
_ON_A_GPU = (DEFAULT, PLAIN, MASTER, ROW, ROW_8BIT, ROW_SMALL)


@dataclass(frozen=True)
class TrainSize:
    """A transcoder and a batch.

    Attributes:
        name: on the command line and in tables.
        n_layers: decoder layers of the model, L.
        d_model: width of the model, D.
        n_features: features per layer, F.
        k: active features per token and layer.
        n_targets: target layers of a source; default: all from its own on.
        batch_tokens: tokens per step.
        ranks: layer ranks that own the transcoder; one is measured, with given codes of the others.
        variants: first the defaults of a job, second the same without AuxK.
        dense: dtypes of the dense baseline, float32 first.
    """

    name: str
    n_layers: int
    d_model: int
    n_features: int
    k: int
    n_targets: int | None
    batch_tokens: int
    ranks: int = 1
    variants: tuple[Variant, ...] = (DEFAULT, PLAIN)
    dense: tuple[Dtype, ...] = ("float32",)

    def __str__(self) -> str:
        targets = f"{self.n_targets} targets" if self.n_targets else "all later targets"
        part = f", one of {self.ranks} layer ranks" if self.ranks > 1 else ""
        return (
            f"{self.name}: {self.n_layers} layers, D={self.d_model} F={self.n_features} k={self.k}, {targets}, "
            f"{self.batch_tokens:,} tokens a step{part}"
        )

    @property
    def architecture(self) -> CLTConfig:
        """Configuration of the transcoder."""
        return CLTConfig(
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_features=self.n_features,
            k=self.k,
            n_targets=self.n_targets,
        )


#: gpt2: configs/train/gpt2.yaml; llava-slice: the share of one GPU of eight of llava_7b.yaml; cpu: seconds per step on
#: two cores; toy: only checks that everything runs. Numbers: layers, D, F, k, target layers, tokens per step.
SIZES = {
    size.name: size
    for size in (
        TrainSize("gpt2", 12, 768, 16384, 32, None, 16384, variants=_ON_A_GPU, dense=("float32", "bfloat16")),
        TrainSize(
            "llava-slice", 32, 4096, 8192, 32, 16, 16384, ranks=8, variants=_ON_A_GPU, dense=("float32", "bfloat16")
        ),
        TrainSize("cpu", 4, 256, 4096, 16, None, 1024, variants=(DEFAULT, PLAIN, ROW)),
        TrainSize("toy", 4, 32, 128, 4, None, 64, variants=_ON_A_GPU),
        TrainSize("toy-slice", 4, 32, 128, 4, 2, 64, ranks=2),
    )
}


def train_config(
    size: TrainSize, variant: Variant, output: Path, layer: int = 1, column: int = 1, zero: int | None = None
) -> TrainConfig:
    """The job of a variant.

    Args:
        size: the size.
        variant: its settings.
        output: folder of the job.
        layer: ranks of the layer axis.
        column: ranks of the column axis.
        zero: ZeRO stage; default: that of a job.
    """
    tree: dict[str, Any] = {
        "store": "none",
        "output": str(output),
        "steps": _STEPS,
        "clt": {"n_features": size.n_features, "k": size.k, "n_targets": size.n_targets},
        # A feature unused in the previous step counts as dead, so that every step from the second on runs AuxK.
        "auxk": {"dead_after_tokens": 1},
        "data": {"batch_tokens": size.batch_tokens},
        "mesh": {"layer": layer, "column": column, "zero_stage": zero},
        "log_every": _STEPS,
        "checkpoint_every": _STEPS,
    }
    return parse_config(TrainConfig, tree | dict(variant.settings), f"{size.name}, {variant.name}")


def planned_job(
    size: TrainSize, variant: Variant, data: int = 1, layer: int | None = None, column: int = 1, zero: int | None = None
) -> Job:
    """The job of a variant for `clt.planning`.

    Args:
        size: the size.
        variant: its settings.
        data: data-parallel replicas.
        layer: ranks of the layer axis; default: those of the size.
        column: ranks of the column axis.
        zero: ZeRO stage; default: that of a job.
    """
    layer = layer or size.ranks
    config = train_config(size, variant, Path(), layer, column, zero)
    mesh = MeshShape(data=data, layer=layer, column=column, zero=config.zero_stage(data))
    return Job(config=config, architecture=size.architecture, mesh=mesh, numerics=numerics_of(config.optimizer))
