"""Configuration: frozen dataclasses validated by pydantic, read from YAML with dotted `key=value` overrides.

One file describes one job. Dataclasses live near their owner; this module holds the reader and the settings of the
transcoder and its training. An unknown key, a wrong type or a value out of range is a `ConfigError` that names the
dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from clt.errors import ConfigError

T = TypeVar("T")

#: Configuration of every settings class: an unknown key is an error, instances are values.
STRICT = ConfigDict(extra="forbid")

ReadSite = Literal["resid_mid", "mlp_in", "resid_pre", "resid_post"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsitySettings:
    """Which pre-activations become activations, and what they cost (`clt.sparsity`)."""

    kind: Literal["topk", "joint_topk", "batch_topk", "jumprelu", "relu"] = "topk"
    """topk: the k largest of a token and layer; joint_topk: the k*L largest of a token over its L source layers;
    batch_topk: the k*L*B largest of a batch of B tokens; jumprelu: above a learned threshold of the feature; relu: all
    positive ones. The last two take k as the number at the start of training."""
    decoder_norm: bool = False
    """topk and batch_topk rank by activation times the norm of the feature's decoder vectors, as joint_topk does."""
    threshold_decay: float = Field(default=0.99, ge=0, lt=1)
    """batch_topk: decay per step of the running mean of the threshold, by which features fire outside of training."""
    penalty: float = Field(default=1e-3, ge=0)
    """jumprelu and relu: weight of tanh(penalty_scale * activation * decoder norm), summed over features, mean over
    tokens and source layers."""
    penalty_warmup_steps: int = Field(default=1000, ge=0)
    """Steps in which the penalty's weight rises linearly from zero."""
    penalty_scale: float = Field(default=4.0, gt=0)
    """Steepness of the penalty's tanh."""
    threshold: float = Field(default=0.03, gt=0)
    """jumprelu: threshold of every feature at the start, in standardised units."""
    bandwidth: float = Field(default=1.0, gt=0)
    """jumprelu: activations up to so far above the threshold give it a gradient."""

    @model_validator(mode="after")
    def _ranks_by_norm(self) -> SparsitySettings:
        if self.decoder_norm and self.kind in ("jumprelu", "relu"):
            raise ValueError(f"decoder_norm has no meaning for kind={self.kind}, which ranks nothing; remove it")
        return self

    @property
    def uses_decoder_norm(self) -> bool:
        """Whether features are ranked by activation times decoder norm."""
        return self.decoder_norm or self.kind == "joint_topk"

    @property
    def has_penalty(self) -> bool:
        """Whether activations cost something."""
        return self.kind in ("jumprelu", "relu")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TranscoderSettings:
    """What a user chooses about a transcoder; the model's dimensions come from the store."""

    n_features: int = Field(gt=0)
    """Features per source layer, F."""
    k: int = Field(gt=0)
    """Active features per token and source layer, K."""
    n_targets: int | None = Field(default=None, gt=0)
    """Target layers a source writes to; absent: all from its first target to the last layer."""
    first_offset: Literal[0, 1] = 0
    """0: a source writes to its own layer first; 1: to the next (layer 0's MLP then has no source and is kept)."""
    skip: bool = False
    """Add W_skip x_t, a linear map of the target layer's own input."""
    read_site: ReadSite = "resid_mid"
    """What the encoders read: the residual stream entering the MLP's norm by default."""
    drop_bos: bool = False
    """Neither train on nor replace the MLPs at the beginning-of-sequence token."""
    layer_norm: bool = False
    """x_t is normalised by the token's own mean and deviation over channels, as in the seed documents' encoders, not by
    the site's; attribution graphs cannot be computed then."""
    sparsity: SparsitySettings = SparsitySettings()
    """Which pre-activations become activations."""
    tied_decoders: Literal["target", "source"] | None = None
    """target: one decoder matrix per target, which all its sources share; source: one per source, which all its targets
    share, with a learned scale per target and feature; absent: one per source and target (`clt.decoding`)."""
    independent: Literal["sum", "mean", "nearest"] | None = None
    """Trains each source alone against every whole target, and says how sources are combined afterwards: their sum,
    their mean, or the nearest one below the target or at it; absent: sources are trained jointly, as a sum."""
    source: int | None = Field(default=None, ge=0)
    """Trains this source layer only, with `independent`; `clt join` makes one transcoder of all layers' outputs."""

    @model_validator(mode="after")
    def _k_fits(self) -> TranscoderSettings:
        if self.k > self.n_features:
            raise ValueError(f"k={self.k} exceeds n_features={self.n_features}; lower k")
        return self

    @model_validator(mode="after")
    def _sources_are_independent(self) -> TranscoderSettings:
        if self.independent is None:
            if self.source is not None:
                raise ValueError(f"source={self.source} trains one layer alone; set independent, or remove source")
            return self
        if self.tied_decoders is not None:
            raise ValueError(f"tied_decoders={self.tied_decoders} does not go with independent; remove one of the two")
        if self.skip:
            raise ValueError("skip=true does not go with independent: every source would need its own; set skip=false")
        if self.sparsity.kind in ("joint_topk", "batch_topk"):
            raise ValueError(
                f"sparsity.kind={self.sparsity.kind} compares source layers, which does not go with independent; "
                "take topk, jumprelu or relu"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CLTConfig(TranscoderSettings):
    """A transcoder's full architecture, as saved in its checkpoint."""

    n_layers: int = Field(gt=0)
    """Decoder layers of the model, L = M."""
    d_model: int = Field(gt=0)
    """Width of the residual stream, D."""
    feature_offset: bool = False
    """An active feature writes to a target with its activation plus a constant that it has there, as in clt-training
    (`post_enc`); such transcoders are read from other projects, not trained."""

    @model_validator(mode="after")
    def _offsets_are_of_pairs(self) -> CLTConfig:
        if self.feature_offset and (self.tied_decoders or self.independent):
            raise ValueError("feature_offset goes with a decoder for every source and target only; untie them")
        return self

    @model_validator(mode="after")
    def _source_has_targets(self) -> CLTConfig:
        if self.source is not None and self.source + self.first_offset >= self.n_layers:
            raise ValueError(f"source={self.source} has no target among the {self.n_layers} layers; lower source")
        return self

    @classmethod
    def resolve(cls, settings: TranscoderSettings, n_layers: int, d_model: int) -> CLTConfig:
        """The settings completed by the model's dimensions."""
        return cls(**asdict(settings), n_layers=n_layers, d_model=d_model)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AuxKSettings:
    """Gradient for dead features: they reconstruct what the live ones miss, and rise until they fire (`clt.loss`)."""

    coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the auxiliary error; 0 turns both terms off."""
    revival: float = Field(default=1e-3, ge=0)
    """Weight of the push on the activations of the dead features that the auxiliary error uses."""
    k: int | None = Field(default=None, gt=0)
    """Dead features used per token and layer; absent: the transcoder's k."""
    token_fraction: float = Field(default=0.125, gt=0, le=1)
    """Share of a batch's tokens that the auxiliary loss looks at."""
    dead_after_tokens: int = Field(default=100_000, gt=0)
    """A feature is dead for training when it has not fired in this many tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSettings:
    """Adam, the types that weights and moments are kept in, and the schedules of its learning rate and of k."""

    kind: Literal["adam", "row_adam"] = "adam"
    """adam: DeepSpeed's, on any mesh; row_adam: inside the backward pass, on the rows of features that fired, without
    stored gradients (`clt.row_engine`), where the data axis is 1 and gradient_clip is 0."""
    weights: Literal["float32", "bfloat16", "bfloat16_master"] = "float32"
    """bfloat16: rounded stochastically, row_adam only; bfloat16_master: beside float32 copies, adam only."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How Adam's moments are kept; the last two with row_adam only."""
    ema_decay: float = Field(default=0, ge=0, lt=1)
    """Decay per step of a running mean of the weights, kept and saved beside them; 0: none."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of all steps, at the end, in which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates. With row_adam the first may be 0: then no first moment is kept and the update is Adam's."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    k_start: int | None = Field(default=None, gt=0)
    """K at step 0; absent: no annealing."""
    k_anneal_steps: int = Field(default=0, ge=0)
    """Steps in which K falls linearly from k_start to k."""

    @model_validator(mode="after")
    def _types_fit_the_kind(self) -> OptimizerSettings:
        allowed = {"adam": ("float32", "bfloat16_master"), "row_adam": ("float32", "bfloat16")}[self.kind]
        if self.weights not in allowed:
            raise ValueError(f"weights={self.weights} does not go with kind={self.kind}; set one of {list(allowed)}")
        if self.kind == "adam" and self.moments != "float32":
            raise ValueError(f"moments={self.moments} needs kind=row_adam; set moments=float32 or kind=row_adam")
        if self.kind == "row_adam" and self.gradient_clip:
            raise ValueError(
                f"gradient_clip={self.gradient_clip:g} does not go with kind=row_adam, which moves weights before the "
                "norm is known; set gradient_clip=0"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenWeights:
    """What a token counts in the loss, by modality; only ratios matter. Of weight 0 it is read, but does not train."""

    text: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of a text token."""
    image: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of a token that stands for a patch of an image."""
    image_special: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of a token around or between images' patches."""
    bos: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of a beginning-of-sequence token."""

    @model_validator(mode="after")
    def _some_token_counts(self) -> TokenWeights:
        if not any((self.text, self.image, self.image_special, self.bos)):
            raise ValueError("all weights are 0: nothing would train; give one of them a weight")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings:
    """How a store is read for training."""

    batch_tokens: int = Field(default=1024, gt=0)
    """Tokens of a step, over all ranks."""
    micro_batches: int = Field(default=1, gt=0)
    """Parts of a step's tokens that go forward and backward one after the other; their gradients are added up, so that
    memory for activations is that of a part. batch_topk and auxk take their tokens from each part."""
    window_tokens: int = Field(default=65_536, gt=0)
    """Tokens shuffled together in memory."""
    modalities: tuple[Literal["text", "image", "image_special", "bos"], ...] | None = None
    """Kinds of tokens to train on; absent: all. `clt.drop_bos` leaves out the last kind in any case."""
    norm_cap: float | None = Field(default=None, gt=0)
    """Leaves out tokens whose norm at any site exceeds so many times the site's mean; absent: none."""
    token_weights: TokenWeights = TokenWeights()
    """What tokens count in the loss, so that 576 image tokens need not drown 30 text tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamingSettings:
    """Training straight from the running model, without a store that holds all activations."""

    capture: Path
    """YAML file of the capture job; its `output` is not used."""
    ring: str
    """Where the activations in use lie: a folder that all ranks reach (/dev/shm/... is memory), or memory://NAME."""
    units: int = Field(default=8, gt=0)
    """Units of rows_per_unit tokens that are shuffled together; up to three times as many exist at a time."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshSettings:
    """How the processes are arranged."""

    layer: int = Field(default=1, gt=0)
    """Ranks over which layers are dealt; what is left after `column` are data-parallel replicas."""
    column: int = Field(default=1, gt=0)
    """Ranks over which the decoders of each target are split by output channels; divides the model's width."""
    zero_stage: Literal[0, 1, 2] | None = None
    """DeepSpeed ZeRO stage on the data axis; absent: 1 with replicas or float32 copies of bfloat16 weights, else 0."""
    timeout_seconds: float = Field(default=1800, gt=0, le=1800)
    """How long a rank may let the others wait, for a batch, a checkpoint or an evaluation, before the job ends."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReplacementSettings:
    """Compares the replacement model with the model while training; the first rank does it, the others wait."""

    capture: Path
    """YAML file of a capture job over held-out prompts with answers: its model and source; `output` is not used."""
    model: str | None = None
    """Folder or hub name of the model; absent: what `capture` names."""
    device: str = "cpu"
    """Where model and whole transcoder run; the first rank's memory holds the transcoder up to three times."""
    prompts: int = Field(default=64, gt=0)
    """Prompts, the first of the source."""
    batch_size: int = Field(default=8, gt=0)
    """Prompts per forward pass."""
    layer_ranges: int = Field(default=4, gt=0)
    """Ranges of target layers that are also replaced alone; 1: none."""
    graphs: int = Field(default=2, ge=0)
    """Prompts whose attribution graph is scored."""
    graph_features: int = Field(default=500, ge=0)
    """Features of a graph whose inputs are computed; the others count as error."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationSettings:
    """What is measured on held-out data while training; may change when a job is resumed."""

    every: int = Field(gt=0)
    """Steps between evaluations; the last step always has one."""
    store: str | None = None
    """Folder or URL of a store of held-out activations of the same model; absent: none."""
    tokens: int = Field(default=100_000, gt=0)
    """Tokens of that store, the first that pass the filter of `data`, without beginning-of-sequence tokens."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Stored tokens evaluated at once by a rank."""
    replacement: ReplacementSettings | None = None
    """Comparison of the replacement model with the model; absent: none."""

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluationSettings:
        if self.store is None and self.replacement is None:
            raise ValueError("give store or replacement, or both")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training job."""

    store: str | None = None
    """Folder or URL of the activation store to train on; absent if `streaming` is given."""
    streaming: StreamingSettings | None = None
    """Trains from the running model instead of a store."""
    output: Path
    """Folder for checkpoints, TensorBoard logs and metrics."""
    clt: TranscoderSettings
    """The transcoder."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    seed: int = 0
    """Seed of the weights and of the read order."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Adam and schedules."""
    auxk: AuxKSettings = AuxKSettings()
    """Auxiliary loss for dead features."""
    data: DataSettings = DataSettings()
    """Batching and shuffling."""
    evaluation: EvaluationSettings | None = None
    """Measures on held-out data; absent: none."""
    mesh: MeshSettings = MeshSettings()
    """Data, layer and column axis."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Implementation of encode and decode; a job that names one ends with an error where it cannot run."""
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
                f"evaluation.replacement needs all source layers and clt.source={self.clt.source} trains one; remove it"
            )
        return self

    def zero_stage(self, data_size: int) -> Literal[0, 1, 2]:
        """ZeRO stage of the job on so many replicas."""
        if self.mesh.zero_stage is not None:
            return self.mesh.zero_stage
        splits = data_size > 1 and self.optimizer.kind == "adam"
        return 1 if splits or self.optimizer.weights == "bfloat16_master" else 0


def load_config(cls: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into a settings class and applies dotted overrides.

    Args:
        cls: a pydantic dataclass.
        path: YAML file.
        overrides: strings `a.b=value`; the value is read as YAML.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is not valid; names the dotted key.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({_one_line(error)})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys at the top level, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(cls, tree, source=str(path))


def parse_config(cls: type[T], tree: Mapping[str, Any], source: str) -> T:
    """Validates a tree of plain values against a settings class.

    Args:
        cls: a pydantic dataclass.
        tree: nested mappings, as YAML or JSON give them.
        source: file name for the error message.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: a key is unknown or a value is not valid; names the dotted key.
    """
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"{source}: unknown key '{key}'; remove it or correct its spelling{more}") from None
        raise ConfigError(f"{source}: {key}: {first['msg']}, got {first['input']!r}{more}") from None


def config_to_tree(config: Any) -> dict[str, Any]:
    """A settings object as nested plain values, ready for YAML or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def config_to_yaml(config: Any) -> str:
    """A settings object as YAML text, every default written out."""
    return yaml.safe_dump(config_to_tree(config), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML ({_one_line(error)})") from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{parent}' holds a value, not keys")
        node = child
    node[leaf] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
