"""Settings of a training job: optimizer, losses, data, mesh and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.config import STRICT
from clt.transcoder.architecture import TranscoderSettings


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AuxKSettings:
    """Losses that revive dead features: AuxK and the revival term (`clt.training.loss`)."""

    coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the auxiliary error; 0 turns both terms off."""
    revival: float = Field(default=1e-3, ge=0)
    """Weight of the revival term, which raises the activations of the dead features that AuxK selects."""
    k: int | None = Field(default=None, gt=0)
    """Dead features used per token and layer; default: the transcoder's k."""
    token_fraction: float = Field(default=0.125, gt=0, le=1)
    """Share of a batch's tokens that the auxiliary loss uses."""
    dead_after_tokens: int = Field(default=100_000, gt=0)
    """Tokens without an activation after which a feature counts as dead in training."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSettings:
    """Adam, dtypes of weights and moments, and the schedules of the learning rate and of k."""

    kind: Literal["adam", "row_adam"] = "adam"
    """adam: DeepSpeed's, on any mesh; row_adam: inside the backward pass, on the rows of features that fired, without
    stored gradients (`clt.training.row_adam_engine`); needs one data-parallel replica and gradient_clip 0."""
    weights: Literal["float32", "bfloat16", "bfloat16_master"] = "float32"
    """bfloat16: rounded stochastically, row_adam only; bfloat16_master: beside float32 copies, adam only."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """Dtype of Adam's moments; bfloat16 and int8 with row_adam only."""
    ema_decay: float = Field(default=0, ge=0, lt=1)
    """Decay per step of EMA weights, kept and saved beside the weights; 0: no EMA weights."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    bias_rate: float = Field(default=1.0, gt=0)
    """Learning rate of the encoder biases, as a multiple of that of the other parameters."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of all steps, at the end, in which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas. With row_adam the first may be 0: then no first moment is kept, and the update equals Adam's."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    k_start: int | None = Field(default=None, gt=0)
    """K at step 0; default: no annealing."""
    k_anneal_steps: int = Field(default=0, ge=0)
    """Steps in which K falls linearly from k_start to k."""

    @model_validator(mode="after")
    def _types_fit_the_kind(self) -> OptimizerSettings:
        allowed = {"adam": ("float32", "bfloat16_master"), "row_adam": ("float32", "bfloat16")}[self.kind]
        if self.weights not in allowed:
            raise ValueError(
                f"weights={self.weights} is not supported with kind={self.kind}; set {' or '.join(allowed)}"
            )
        if self.kind == "adam" and self.moments != "float32":
            raise ValueError(f"moments={self.moments} needs kind=row_adam; set moments=float32 or kind=row_adam")
        if self.kind == "row_adam" and self.gradient_clip:
            raise ValueError(
                f"gradient_clip={self.gradient_clip:g} is not supported with kind=row_adam, which updates weights "
                "before the norm is known; set gradient_clip=0"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenWeights:
    """Weight of a token in the loss, by modality; only ratios matter. Tokens of weight 0 are read but do not train."""

    text: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of a text token."""
    image: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of a token of an image patch."""
    image_special: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of a token around or between the patches of images."""
    bos: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of a beginning-of-sequence token."""

    @model_validator(mode="after")
    def _some_token_counts(self) -> TokenWeights:
        if not any((self.text, self.image, self.image_special, self.bos)):
            raise ValueError("all weights are 0, so that no token trains; set at least one above 0")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings:
    """Batching and shuffling of the training tokens."""

    batch_tokens: int = Field(default=1024, gt=0)
    """Tokens of a step, over all ranks."""
    micro_batches: int = Field(default=1, gt=0)
    """Micro-batches of a step, whose gradients are accumulated, so that memory for activations is that of one.
    batch_topk and auxk take their tokens from each micro-batch."""
    window_tokens: int = Field(default=65_536, gt=0)
    """Tokens shuffled together in memory."""
    modalities: tuple[Literal["text", "image", "image_special", "bos"], ...] | None = None
    """Modalities to train on; default: all. `clt.drop_bos` leaves out `bos` in any case."""
    norm_cap: float | None = Field(default=None, gt=0)
    """Leaves out tokens whose norm at any site exceeds this multiple of the site's mean norm; default: none."""
    token_weights: TokenWeights = TokenWeights()
    """Weights of tokens in the loss by modality, for instance to balance 576 image tokens against 30 text tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamingSettings:
    """Training from the running model, without a store of all activations."""

    capture: Path
    """YAML file of the capture job; its `output` is not used."""
    ring: str
    """Place of the activations in use: a folder that all ranks reach (/dev/shm/... is memory), or memory://NAME."""
    units: int = Field(default=8, gt=0)
    """Units of rows_per_unit tokens that are shuffled together; the ring holds up to three times as many."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshSettings:
    """Mesh of the processes: layer and column axis; the rest are data-parallel replicas."""

    layer: int = Field(default=1, gt=0)
    """Ranks over which layers are distributed; processes / (layer * column) are data-parallel replicas."""
    column: int = Field(default=1, gt=0)
    """Ranks over which the decoders of each target are split by output channels; must divide the model's width."""
    zero_stage: Literal[0, 1, 2] | None = None
    """DeepSpeed ZeRO stage on the data axis; default: 1 with replicas or float32 copies of bfloat16 weights, else 0."""
    timeout_seconds: float = Field(default=1800, gt=0, le=1800)
    """Longest wait for another rank (batch, checkpoint, evaluation), in seconds, before the job ends."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReplacementSettings:
    """Comparison of the replacement model with the model during training, on the first rank while the others wait."""

    capture: Path
    """YAML file of a capture job over held-out prompts with answers: its model and source; `output` is not used."""
    model: str | None = None
    """Folder or hub name of the model; default: the model of `capture`."""
    device: str = "cpu"
    """Device of the model and the whole transcoder; the first rank's memory holds the transcoder up to three times."""
    prompts: int = Field(default=64, gt=0)
    """Number of prompts, taken from the start of the source."""
    batch_size: int = Field(default=8, gt=0)
    """Prompts per forward pass."""
    layer_ranges: int = Field(default=4, gt=0)
    """Number of ranges of target layers that are also replaced alone; 1: none."""
    graphs: int = Field(default=2, ge=0)
    """Number of prompts whose attribution graph is scored."""
    graph_features: int = Field(default=500, ge=0)
    """Features per graph whose inputs are computed; the others count as error."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationSettings:
    """Evaluation on held-out data during training; may change when a job is resumed."""

    every: int = Field(gt=0)
    """Steps between evaluations; the last step is always evaluated."""
    store: str | None = None
    """Folder or URL of a store of held-out activations of the same model; default: none."""
    tokens: int = Field(default=100_000, gt=0)
    """Tokens evaluated: the first of the store that pass the filter of `data`, without beginning-of-sequence tokens."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Stored tokens per batch of a rank."""
    replacement: ReplacementSettings | None = None
    """Comparison of the replacement model with the model; default: none."""

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluationSettings:
        if self.store is None and self.replacement is None:
            raise ValueError("give store or replacement, or both")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training job."""

    store: str | None = None
    """Folder or URL of the activation store to train on; leave out with `streaming`."""
    streaming: StreamingSettings | None = None
    """Trains from the running model instead of a store."""
    output: Path
    """Folder for checkpoints, TensorBoard logs and metrics."""
    clt: TranscoderSettings
    """The transcoder."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    seed: int = 0
    """Random seed of the initial weights and of the read order."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Adam and schedules."""
    auxk: AuxKSettings = AuxKSettings()
    """Auxiliary loss for dead features."""
    data: DataSettings = DataSettings()
    """Batching and shuffling."""
    evaluation: EvaluationSettings | None = None
    """Evaluation on held-out data; default: none."""
    mesh: MeshSettings = MeshSettings()
    """Mesh of the processes."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Kernels of encode and decode; a kind that cannot run on the machine is an error."""
    log_every: int = Field(default=20, gt=0)
    """Steps between TensorBoard scalars."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints kept on disk."""

    @model_validator(mode="after")
    def _has_one_source(self) -> TrainConfig:
        if (self.store is None) == (self.streaming is None):
            raise ValueError("give either store or streaming")
        return self

    @model_validator(mode="after")
    def _replaces_all_layers(self) -> TrainConfig:
        if self.clt.source is not None and self.evaluation is not None and self.evaluation.replacement is not None:
            raise ValueError(
                f"evaluation.replacement needs all source layers; clt.source={self.clt.source} trains one; remove it"
            )
        return self

    def zero_stage(self, data_size: int) -> Literal[0, 1, 2]:
        """ZeRO stage of the job.

        Args:
            data_size: data-parallel replicas.
        """
        if self.mesh.zero_stage is not None:
            return self.mesh.zero_stage
        splits = data_size > 1 and self.optimizer.kind == "adam"
        return 1 if splits or self.optimizer.weights == "bfloat16_master" else 0
