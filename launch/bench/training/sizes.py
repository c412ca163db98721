"""What the training benchmark trains: sizes, and for each of them the variants of a job that are compared."""

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

#: Steps that a job believes it has: enough that no schedule ends within a benchmark.
_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train the same transcoder.

    Attributes:
        name: what the tables call it.
        settings: keys of `TrainConfig` that differ from the size's.
    """

    name: str
    settings: Mapping[str, Any]


#: Everything as a job has it by default, and the same without the loss for dead features.
DEFAULT = Variant(name="Adam, float32", settings={})
PLAIN = Variant(name="Adam, float32, without AuxK", settings={"auxk": {"coefficient": 0}})
#: The optimizer inside the backward pass: no gradients are stored, and AuxK's are part of the same pass.
ROW = Variant(
    name="row Adam, float32",
    settings={"optimizer": {"kind": "row_adam", "gradient_clip": 0}},
)
ROW_8BIT = Variant(
    name="row Adam, bfloat16, 8-bit moments",
    settings={"optimizer": {"kind": "row_adam", "gradient_clip": 0, "weights": "bfloat16", "moments": "int8"}},
)
ROW_SMALL = Variant(
    name="row Adam without momentum, bfloat16",
    settings={
        "optimizer": {
            "kind": "row_adam",
            "gradient_clip": 0,
            "weights": "bfloat16",
            "moments": "bfloat16",
            "betas": (0, 0.999),
        }
    },
)
MASTER = Variant(
    name="Adam, bfloat16 and float32 copies",
    settings={"optimizer": {"weights": "bfloat16_master"}},
)
_ON_A_GPU = (DEFAULT, PLAIN, MASTER, ROW, ROW_8BIT, ROW_SMALL)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A transcoder and a batch.

    Attributes:
        name: what the command line and the tables call it.
        n_layers: decoder layers of the model, L.
        d_model: width of the model, D.
        n_features: features per layer, F.
        k: active features per token and layer.
        n_targets: target layers of a source; None for all from its own on.
        batch_tokens: tokens of a step.
        ranks: layer ranks that own the transcoder, of which one is measured; the codes of the others are given.
        variants: ways to train it; the first is what a job is by default, the second the same without AuxK.
        dense: types in which the naive way is tried, float32 first.
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
        """The transcoder's."""
        return CLTConfig(
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_features=self.n_features,
            k=self.k,
            n_targets=self.n_targets,
        )


#: gpt2 and llava-slice: configs/train/gpt2.yaml, and what one GPU of eight has of llava_7b.yaml; cpu: what two cores
#: train in seconds a step; toy: shows that everything runs.
SIZES = {
    size.name: size
    for size in (
        Size(
            name="gpt2",
            n_layers=12,
            d_model=768,
            n_features=16384,
            k=32,
            n_targets=None,
            batch_tokens=16384,
            variants=_ON_A_GPU,
            dense=("float32", "bfloat16"),
        ),
        Size(
            name="llava-slice",
            n_layers=32,
            d_model=4096,
            n_features=8192,
            k=32,
            n_targets=16,
            batch_tokens=16384,
            ranks=8,
            variants=_ON_A_GPU,
            dense=("float32", "bfloat16"),
        ),
        Size(
            name="cpu",
            n_layers=4,
            d_model=256,
            n_features=4096,
            k=16,
            n_targets=None,
            batch_tokens=1024,
            variants=(DEFAULT, PLAIN, ROW),
        ),
        Size(
            name="toy",
            n_layers=4,
            d_model=32,
            n_features=128,
            k=4,
            n_targets=None,
            batch_tokens=64,
            variants=_ON_A_GPU,
        ),
        Size(name="toy-slice", n_layers=4, d_model=32, n_features=128, k=4, n_targets=2, batch_tokens=64, ranks=2),
    )
}


def train_config(
    size: Size, variant: Variant, output: Path, layer: int = 1, column: int = 1, zero: int | None = None
) -> TrainConfig:
    """The job of a variant.

    Args:
        size: what is trained.
        variant: how.
        output: folder of the job.
        layer: ranks of the layer axis.
        column: ranks of the column axis.
        zero: ZeRO stage; None: as a job has it by default.
    """
    tree: dict[str, Any] = {
        "store": "none",
        "output": str(output),
        "steps": _STEPS,
        "clt": {"n_features": size.n_features, "k": size.k, "n_targets": size.n_targets},
        # A feature that the step before did not use is dead, so that every step from the second on has all there is.
        "auxk": {"dead_after_tokens": 1},
        "data": {"batch_tokens": size.batch_tokens},
        "mesh": {"layer": layer, "column": column, "zero_stage": zero},
        "log_every": _STEPS,
        "checkpoint_every": _STEPS,
    }
    return parse_config(TrainConfig, tree | dict(variant.settings), f"{size.name}, {variant.name}")


def planned_job(
    size: Size, variant: Variant, data: int = 1, layer: int | None = None, column: int = 1, zero: int | None = None
) -> Job:
    """The same job as `clt.planning.plan` counts it.

    Args:
        size: what is trained.
        variant: how.
        data: replicas.
        layer: ranks of the layer axis; None: those of the size, of which one is measured by itself.
        column: ranks of the column axis.
        zero: ZeRO stage; None: as a job has it by default.
    """
    layer = layer or size.ranks
    config = train_config(size, variant, Path(), layer, column, zero)
    mesh = MeshShape(data=data, layer=layer, column=column, zero=config.zero_stage(data))
    return Job(config=config, architecture=size.architecture, mesh=mesh, numerics=numerics_of(config.optimizer))
