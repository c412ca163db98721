"""What the seed documents' training leaves behind, written from a transcoder: see `clt.convert.kokosdev` for the files.

    transcoder_L{l}.pt   the source's encoder and decoders, for their LLaVAReplacementModel
    mapping_L{l}.pt      decoder_weights, and mlp_to_clt_mapping [D,F]: the mean of |MLP output of layer l + 1|, channel
                         by channel, over the tokens on which the feature is active
    metrics_L{l}.json    share of active features in percent, dead features, error of the source alone

A source's decoders write to later layers only, and its encoder starts with LayerNorm: the transcoder needs
`first_offset: 1` and `layer_norm: true`. Sources trained jointly are written as parts of a sum: the bias of a target
stands with its nearest source. What no file of theirs says, k and how sources are combined, is noted in
training_metadata, where our reader finds it; theirs has to be told use_topk and topk_pct = k / F.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clt.checkpoint.manifest import new_folder
from clt.convert.files import write_json
from clt.errors import ConfigError, StoreError
from clt.records import ActivationBatch
from clt.transcoder.model import CrossLayerTranscoder

_DESCRIPTION = "mean absolute MLP output of the next layer, by channel, over tokens on which the feature is active"


@dataclass(frozen=True, kw_only=True)
class _Decoders:
    """A source's part of its targets, in raw units: W_TFD [T,F,D] and b_TD [T,D], zeros beyond the last layer."""

    W_TFD: Tensor
    b_TD: Tensor


@torch.no_grad()
def save_seed_files(transcoder: CrossLayerTranscoder, folder: Path, batches: Sequence[ActivationBatch]) -> None:
    """Writes the three files of every source layer.

    Args:
        transcoder: a whole transcoder of the kind topk or relu.
        folder: new or empty.
        batches: raw activations of all layers, x and y [n_layers,B,D], for the mapping and the metrics.

    Raises:
        ConfigError: the format has no place for what the transcoder is.
        StoreError: there are no tokens.
        CheckpointError: the folder is not empty or cannot be written.
    """
    _check(transcoder)
    if not sum(batch.x.shape[1] for batch in batches):
        raise StoreError("there are no tokens; the mapping and the metrics need some")
    plain = transcoder if transcoder.config.independent else transcoder.untied()
    with new_folder(folder) as temporary:
        for layer in transcoder.share.sources:
            _save_layer(plain, layer, temporary, batches)


def _check(transcoder: CrossLayerTranscoder) -> None:
    config = transcoder.config
    if config.source is not None:
        raise ConfigError(f"clt.source={config.source}: only one source is there; 'clt join' those of all layers first")
    if not config.layer_norm:
        raise ConfigError(
            "clt.layer_norm=false: the seed's encoders start with LayerNorm; train with clt.layer_norm=true"
        )
    if config.first_offset == 0:
        raise ConfigError("clt.first_offset=0: the seed's decoders write to later layers only; train with 1")
    if config.feature_offset:
        raise ConfigError("clt.feature_offset: the seed's active features write with their activations alone")
    if config.skip:
        raise ConfigError("clt.skip: the seed's transcoders have no skip connection; train without it")
    if config.sparsity.kind not in ("topk", "relu") or config.sparsity.decoder_norm:
        raise ConfigError(f"clt.sparsity.kind={config.sparsity.kind}: the seed knows topk and relu only")


def _save_layer(transcoder: CrossLayerTranscoder, layer: int, folder: Path, batches: Sequence[ActivationBatch]) -> None:
    config, decoders = transcoder.config, _decoders(transcoder, layer)
    mapping_DF, summary, error = _measure(transcoder, layer, decoders, batches)
    W_FD, b_F = transcoder.encoder(layer)
    sizes = {"layer": layer, "hidden_dim": config.d_model, "feature_dim": config.n_features}
    weights = decoders.W_TFD.transpose(1, 2).flatten(0, 1).contiguous()
    notes = {"k": config.k if config.sparsity.kind == "topk" else None, "combine": config.independent or "sum"}
    contents = {
        **sizes,
        "state_dict": {
            "enc.0.weight": W_FD.new_ones(config.d_model),
            "enc.0.bias": W_FD.new_zeros(config.d_model),
            "enc.1.weight": W_FD.detach().clone(),
            "enc.1.bias": b_F.detach().clone(),
            "dec.weight": weights,
            "dec.bias": decoders.b_TD.flatten(),
        },
        "training_metadata": {"steps": None, **summary, "final_rec_loss": error, **notes},
        "mlp_to_clt_mapping": mapping_DF,
    }
    mapping = {"mlp_to_clt_mapping": mapping_DF, "decoder_weights": weights, "description": _DESCRIPTION}
    torch.save(contents, folder / f"transcoder_L{layer}.pt")
    torch.save({**sizes, **mapping}, folder / f"mapping_L{layer}.pt")
    write_json(folder / f"metrics_L{layer}.json", {"layer": layer, "metrics": [], "summary": summary})


def _decoders(transcoder: CrossLayerTranscoder, layer: int) -> _Decoders:
    """All sources have as many targets in these files; the last ones' have no layer to write to."""
    config, scaling, like = transcoder.config, transcoder.scaling, next(transcoder.parameters())
    T, F, D = min(config.n_targets or config.n_layers, config.n_layers - 1), config.n_features, config.d_model
    decoders = _Decoders(W_TFD=like.new_zeros(T, F, D), b_TD=like.new_zeros(T, D))
    for place, target in enumerate(transcoder.targets_of(layer)):
        sources = transcoder.sources_of(target)
        row = sources.index(layer)
        nearest, rms, mean_D = layer == sources[-1], scaling.rms_y[target], scaling.mean_y[target].to(like)
        decoders.W_TFD[place] = transcoder.decoder_matrix(target)[row] * rms
        if config.independent is not None:
            decoders.b_TD[place] = transcoder.decoder_bias(target)[row] * rms
        elif nearest:
            decoders.b_TD[place] = transcoder.decoder_bias(target) * rms
        # A sum has the mean of the outputs once; a mean, or the nearest source alone, has it in every part.
        if nearest or config.independent in ("mean", "nearest"):
            decoders.b_TD[place] += mean_D
    return decoders


def _measure(
    transcoder: CrossLayerTranscoder, layer: int, decoders: _Decoders, batches: Sequence[ActivationBatch]
) -> tuple[Tensor, dict[str, float], float]:
    """The mapping [D,F], what training_metadata says of features, and the mean squared error of the source alone."""
    config, like, targets = transcoder.config, next(transcoder.parameters()), transcoder.targets_of(layer)
    sum_DF, count_F = like.new_zeros(config.d_model, config.n_features), like.new_zeros(config.n_features)
    squares, tokens = 0.0, 0
    for batch in batches:
        x_BD = transcoder.scaling.standardise_x(batch.x[[layer]].to(like), (layer,))[0]
        values_BK, indices_BK = transcoder.encode_layer(layer, x_BD)
        z_BF = like.new_zeros(len(x_BD), config.n_features).scatter_add(1, indices_BK.long(), values_BK)
        active_BF = (z_BF > 0).to(like.dtype)
        sum_DF += batch.y[layer + 1].to(like).abs().T @ active_BF
        count_F += active_BF.sum(dim=0)
        for place, target in enumerate(targets):
            found_BD = z_BF @ decoders.W_TFD[place] + decoders.b_TD[place]
            squares += float((found_BD - batch.y[target].to(like)).square().sum())
        tokens += len(x_BD)
    dead = int((count_F == 0).sum())
    summary = {
        "dead_features": dead,
        "dead_pct": 100 * dead / config.n_features,
        "final_l0_pct": 100 * float(count_F.sum()) / (tokens * config.n_features),
    }
    return sum_DF / count_F.clamp(min=1), summary, squares / (tokens * len(targets) * config.d_model)
