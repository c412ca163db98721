"""Architecture of a transcoder: the settings that a user chooses, and the full configuration in its checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.config import STRICT

ReadSite = Literal["resid_mid", "mlp_in", "resid_pre", "resid_post"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsitySettings:
    """Selection rule from pre-activations to activations, and its penalty (`clt.transcoder.sparsity`)."""

    kind: Literal["topk", "joint_topk", "batch_topk", "jumprelu", "relu"] = "topk"
    """topk: the k largest of a token and layer; joint_topk: the k*L largest of a token over its L source layers;
    batch_topk: the k*L*B largest of a batch of B tokens; jumprelu: above a learned threshold per feature; relu: all
    positive ones. For the last two, k sets the number of active features at initialisation."""
    decoder_norm: bool = False
    """topk and batch_topk rank by activation times the norm of the feature's decoder vectors, as joint_topk does."""
    threshold_decay: float = Field(default=0.99, ge=0, lt=1)
    """batch_topk: decay per step of the running mean of the threshold, which is used outside of training."""
    penalty: float = Field(default=1e-3, ge=0)
    """jumprelu and relu: weight of tanh(penalty_scale * activation * decoder norm), summed over features, mean over
    tokens and source layers."""
    penalty_warmup_steps: int = Field(default=1000, ge=0)
    """Steps in which the penalty's weight rises linearly from zero."""
    penalty_scale: float = Field(default=4.0, gt=0)
    """Steepness of the penalty's tanh."""
    threshold: float = Field(default=0.03, gt=0)
    """jumprelu: initial threshold of every feature, in standardised units."""
    bandwidth: float = Field(default=1.0, gt=0)
    """jumprelu: width of the interval above the threshold in which activations give it a gradient."""

    @model_validator(mode="after")
    def _ranks_by_norm(self) -> SparsitySettings:
        if self.decoder_norm and self.kind in ("jumprelu", "relu"):
            raise ValueError(f"decoder_norm has no meaning for kind={self.kind}, which ranks nothing; remove it")
        return self

    @property
    def uses_decoder_norm(self) -> bool:
        """True if features are ranked by activation times decoder norm."""
        return self.decoder_norm or self.kind == "joint_topk"

    @property
    def has_penalty(self) -> bool:
        """True if the loss has a sparsity penalty."""
        return self.kind in ("jumprelu", "relu")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TranscoderSettings:
    """Settings of a transcoder; the model's dimensions come from the store."""

    n_features: int = Field(gt=0)
    """Features per source layer, F."""
    k: int = Field(gt=0)
    """Active features per token and source layer, K."""
    n_targets: int | None = Field(default=None, gt=0)
    """Target layers a source writes to; default: all from its first target to the last layer."""
    first_offset: Literal[0, 1] = 0
    """First target of a source: 0 its own layer, 1 the next (layer 0's MLP then has no source and is kept)."""
    skip: bool = False
    """Add W_skip x_t, a linear map of the target layer's own input."""
    read_site: ReadSite = "resid_mid"
    """Site that the encoders read; default: the residual stream before the MLP's norm."""
    drop_bos: bool = False
    """Exclude the beginning-of-sequence token from training and from replacement."""
    layer_norm: bool = False
    """Standardise x_t by the token's mean and deviation over channels (LayerNorm), as in the vlm-clt-training format,
    instead of by the site's statistics; attribution graphs are not supported then."""
    sparsity: SparsitySettings = SparsitySettings()
    """Selection rule and sparsity penalty."""
    tied_decoders: Literal["target", "source"] | None = None
    """target: one decoder matrix per target, shared by its sources; source: one per source, shared by its targets, with
    a learned scale per target and feature; default: one per source and target (`clt.transcoder.decoding`)."""
    independent: Literal["sum", "mean", "nearest"] | None = None
    """Train each source alone against every whole target, and combine their reconstructions afterwards: sum, mean, or
    nearest (the last source below the target or at it); default: sources are trained jointly, as a sum."""
    source: int | None = Field(default=None, ge=0)
    """Train this source layer only, with `independent`; `clt join` combines the outputs of all layers."""

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
            raise ValueError(f"tied_decoders={self.tied_decoders} is not supported with independent; remove one")
        if self.skip:
            raise ValueError("skip=true is not supported with independent; set skip=false")
        if self.sparsity.kind in ("joint_topk", "batch_topk"):
            raise ValueError(
                f"sparsity.kind={self.sparsity.kind} compares source layers and is not supported with independent; "
                "use topk, jumprelu or relu"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CLTConfig(TranscoderSettings):
    """Full architecture of a transcoder, as saved in its checkpoint."""

    n_layers: int = Field(gt=0)
    """Decoder layers of the model, L = M."""
    d_model: int = Field(gt=0)
    """Width of the residual stream, D."""
    feature_offset: bool = False
    """An active feature writes to a target with its activation plus a constant per feature and target, as in
    clt-training (`post_enc`); imported from other projects only, not trained."""

    @model_validator(mode="after")
    def _offsets_are_of_pairs(self) -> CLTConfig:
        if self.feature_offset and (self.tied_decoders or self.independent):
            raise ValueError("feature_offset needs a decoder for every source and target; untie them")
        return self

    @model_validator(mode="after")
    def _source_has_targets(self) -> CLTConfig:
        if self.source is not None and self.source + self.first_offset >= self.n_layers:
            raise ValueError(f"source={self.source} has no target among the {self.n_layers} layers; lower source")
        return self

    @classmethod
    def resolve(cls, settings: TranscoderSettings, n_layers: int, d_model: int) -> CLTConfig:
        """Adds the model's dimensions to the settings.

        Args:
            settings: the user's settings.
            n_layers: decoder layers of the model.
            d_model: width of its residual stream.
        """
        return cls(**asdict(settings), n_layers=n_layers, d_model=d_model)
