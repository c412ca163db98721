"""Description of a training job for `clt.planning`: architecture, mesh, dtypes, shares of the ranks, parameters.

Shape letters of the plan: L source layers, M target layers, P (source, target) pairs, D width, F features, K active per
token and source layer, N tokens of a step, B = N / data tokens that a rank sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Literal

from clt.distributed.mesh import deal_layers
from clt.training.settings import OptimizerSettings, TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare, sources_of, target_layers, targets_of

#: A guess for rules other than topk: active features of the token and layer with most of them, in multiples of k. Codes
#: are padded to that; k features are decoded on average.
SLOTS_PER_K = 4


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Parts of a sum; `total` adds them up."""

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(astuple(self))


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Dtypes of weights and optimizer state.

    Attributes:
        name: description in the output of `clt plan`.
        weight: bytes of a weight as the kernels read it, and of activations and code values.
        gradient: bytes of a stored gradient; 0 where the optimizer is part of the backward pass.
        master: bytes of a float32 copy of a weight; 0 for none.
        moments: bytes of all moments of a weight.
        zero: supported ZeRO stages, the default first.
        replicas: whether data-parallel replicas are supported.
    """

    name: str
    weight: int
    gradient: int
    master: int
    moments: int
    zero: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    replicas: bool = True

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes in memory per parameter where ZeRO splits nothing."""
        return self.weight + self.gradient + self.master + self.moments

    @property
    def optimizer_traffic(self) -> int:
        """Bytes of memory that an optimizer step moves per parameter.

        Gradient read; weight (or master) and moments read and written; with a master, the weight written too. Float32
        Adam: 4 + 8 + 16 = 28.
        """
        return self.gradient + 2 * (self.master or self.weight) + 2 * self.moments + (self.weight if self.master else 0)


_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def numerics_of(settings: OptimizerSettings) -> Numerics:
    """Dtypes of a job's optimizer settings."""
    if settings.kind == "row_adam":
        weight, moment = _BYTES[settings.weights], _BYTES[settings.moments]
        # Without momentum there is one moment; no gradient of a matrix is stored.
        moments = moment if settings.betas[0] == 0 else 2 * moment
        name = f"row_adam, {settings.weights} weights, {settings.moments} moments"
        return Numerics(name=name, weight=weight, gradient=0, master=0, moments=moments, zero=(0,), replicas=False)
    if settings.weights == "bfloat16_master":
        return Numerics(name="adam, bfloat16_master weights", weight=2, gradient=2, master=4, moments=8, zero=(1, 2))
    return Numerics(name="adam, float32 weights", weight=4, gradient=4, master=0, moments=8)


_ROW_ADAM = OptimizerSettings(kind="row_adam", betas=(0.0, 0.999), gradient_clip=0)

#: Choices of `clt plan --numerics`; 16, 16, 8, 6, 4 and 3 bytes per parameter.
NUMERICS = {
    "float32": numerics_of(OptimizerSettings()),
    "bf16-master": numerics_of(OptimizerSettings(weights="bfloat16_master")),
    "row-float32": numerics_of(_ROW_ADAM),
    "row-bf16-momentum": numerics_of(
        replace(_ROW_ADAM, weights="bfloat16", moments="bfloat16", betas=OptimizerSettings().betas)
    ),
    "row-bf16": numerics_of(replace(_ROW_ADAM, weights="bfloat16", moments="bfloat16")),
    "row-bf16-int8": numerics_of(replace(_ROW_ADAM, weights="bfloat16", moments="int8")),
}


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Sizes of the three axes and the ZeRO stage on the data axis."""

    data: int
    layer: int
    column: int
    zero: Literal[0, 1, 2]

    @property
    def world(self) -> int:
        """Processes."""
        return self.data * self.layer * self.column

    @property
    def model(self) -> int:
        """Ranks of a model group: they see the same tokens and exchange codes."""
        return self.layer * self.column


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job, with what its configuration leaves to the store and to torchrun.

    Attributes:
        config: the configuration.
        architecture: the architecture.
        mesh: the processes.
        numerics: dtypes of weights and optimizer.
    """

    config: TrainConfig
    architecture: CLTConfig
    mesh: MeshShape
    numerics: Numerics

    @property
    def batch(self) -> int:
        """B, tokens of a step that one rank sees."""
        return self.config.data.batch_tokens // self.mesh.data

    @property
    def part(self) -> int:
        """Tokens of a micro-batch of one rank."""
        return self.batch // self.config.data.micro_batches

    @property
    def auxk_part(self) -> int:
        """Tokens of a micro-batch that AuxK uses: every n-th, as in `clt.training.objective`; 0 without AuxK."""
        auxk = self.config.auxk
        return -(-self.part // round(1 / auxk.token_fraction)) if auxk.coefficient else 0

    @property
    def auxk_batch(self) -> int:
        """Tokens of a step that AuxK uses."""
        return self.auxk_part * self.config.data.micro_batches

    @property
    def slots(self) -> int:
        """Slots per token and source layer in which codes are stored and sent; beyond topk an estimate."""
        sparsity = self.architecture.sparsity.kind
        return (
            self.architecture.k
            if sparsity == "topk"
            else min(self.architecture.n_features, SLOTS_PER_K * self.architecture.k)
        )

    @property
    def auxk_slots(self) -> int:
        """Slots per token and source layer for the dead features of AuxK."""
        return self.config.auxk.k or self.architecture.k

    def shares(self) -> tuple[LayerShare, ...]:
        """Shares of the ranks of a model group, in the order of `Mesh.model_rank`."""
        return deal_layers(self.architecture, self.mesh.layer, self.mesh.column)


@dataclass(frozen=True, kw_only=True)
class Parameters(Sum):
    """Numbers of weights: encoders L F D, biases and JumpReLU's thresholds L F, decoders P F D and M D, skip M D^2.

    Tied decoders are M F D, or L F D with P F scales; independent ones have P D biases.
    """

    encoders: int
    encoder_biases: int
    thresholds: int
    decoders: int
    decoder_scales: int
    decoder_biases: int
    skip: int

    @property
    def total(self) -> int:
        """Their sum."""
        return int(super().total)


def pairs(architecture: CLTConfig, targets: Iterable[int] | None = None) -> int:
    """(source, target) decoders into some targets, by default all of them."""
    return sum(
        len(sources_of(architecture, target))
        for target in (target_layers(architecture) if targets is None else targets)
    )


def decoder_matrices(architecture: CLTConfig, share: LayerShare) -> int:
    """Matrices [F,D] of decoders that a share owns: a matrix that belongs to a target is split by columns."""
    match architecture.tied_decoders:
        case "source":
            return len(share.sources)
        case "target":
            return len(share.targets)
    return pairs(architecture, share.targets)


def width(architecture: CLTConfig, share: LayerShare) -> int:
    """Columns of D of a share's decoders."""
    return architecture.d_model if share.columns is None else len(share.columns)


def parameters(architecture: CLTConfig, share: LayerShare | None = None) -> Parameters:
    """Numbers of weights of a share, by default of the whole."""
    share = share or LayerShare.everything(architecture)
    n_sources, n_targets, columns = len(share.sources), len(share.targets), width(architecture, share)
    by_source = architecture.tied_decoders == "source"
    scales = sum(len(targets_of(architecture, layer)) for layer in share.sources) if by_source else 0
    biases = n_targets if architecture.independent is None else pairs(architecture, share.targets)
    return Parameters(
        encoders=n_sources * architecture.n_features * architecture.d_model,
        encoder_biases=n_sources * architecture.n_features,
        thresholds=n_sources * architecture.n_features if architecture.sparsity.kind == "jumprelu" else 0,
        decoders=decoder_matrices(architecture, share)
        * architecture.n_features
        * (architecture.d_model if by_source else columns),
        decoder_scales=scales * architecture.n_features,
        decoder_biases=biases * columns,
        skip=n_targets * columns * architecture.d_model if architecture.skip else 0,
    )
