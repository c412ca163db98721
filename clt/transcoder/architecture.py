"""What a transcoder is: the settings that a user chooses, and all of its sizes and rules as checkpoints keep them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.config import STRICT

ReadSite = Literal["resid_mid", "mlp_in", "resid_pre", "resid_post"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsitySettings:
    """Which pre-activations become activations, and what they cost (`clt.transcoder.sparsity`)."""

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
    share, with a learned scale per target and feature; absent: one per source and target
    (`clt.transcoder.decoding`)."""
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
