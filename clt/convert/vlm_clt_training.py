"""The vlm-clt-training format (KOKOSde/vlm-clt-training, KokosDev/llava15-7b-clt).

    transcoder_L{l}.pt   layer, hidden_dim, feature_dim, training_metadata, mlp_to_clt_mapping [D,F], and state_dict:
                         enc.0.weight, enc.0.bias [D] (LayerNorm), enc.1.weight [F,D], enc.1.bias [F],
                         dec.weight [n D,F], dec.bias [n D]; with the prefix _orig_mod. after torch.compile
    mapping_L{l}.pt      layer, mlp_to_clt_mapping, decoder_weights = dec.weight, hidden_dim, feature_dim
    metrics_L{l}.json    layer, metrics, summary: share of active features in percent, dead features

Source l computes a = ReLU(enc.1(LayerNorm(x))) or its TopK (not recorded in the files); rows t D to (t + 1) D of its
decoder alone predict layer l + 1 + t: `independent`, `first_offset: 1`, `layer_norm`. docs/formats.md has the details.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clt.checkpoint.manifest import new_folder
from clt.convert import Combination
from clt.convert.files import ForeignFile, empty_transcoder, numbered, read_pickled, write_json
from clt.errors import CheckpointError, ConfigError, StoreError
from clt.records import ActivationBatch
from clt.transcoder.architecture import CLTConfig, ReadSite, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder

_COMPILED = "_orig_mod."
_DESCRIPTION = "mean absolute MLP output of the next layer, by channel, over tokens on which the feature is active"


def load_vlm_clt_training(
    folder: Path,
    *,
    read_site: ReadSite | None = None,
    k: int | None = None,
    combine: Combination | None = None,
) -> CrossLayerTranscoder:
    """Reads a folder of transcoder_L{l}.pt; files mapping_L{l}.pt repeat parts of them and are not read.

    LayerNorm's weight and bias are folded into the encoder. Decoder rows beyond the last layer, trained on zeros, are
    dropped.

    Args:
        folder: one file for each layer except the model's last.
        read_site: input of the encoders; default: the MLPs' inputs, as in the project's capture script.
        k: active features per token, for one trained with --use-topk; default: the value that `save_vlm_clt_training`
            stored, else all positive features.
        combine: combination of the sources of a target; default: the value that `save_vlm_clt_training` stored, else
            the sum, as in the project's README.

    Returns:
        The transcoder, with `layer_norm`, for a model with one layer more than there are files.

    Raises:
        CheckpointError: a file is missing, damaged, of another shape or holds objects; names file and key.
        ConfigError: k exceeds the number of features.
    """
    paths = numbered(folder, r"transcoder_L(\d+)\.pt")
    transcoder, n_targets = None, 0
    for layer, path in enumerate(paths):
        file, notes = _read(path, layer)
        if transcoder is None:
            F, D, dtype = file.matrix("enc.1.weight")
            n_targets = file.matrix("dec.weight")[0] // D
            if not n_targets:
                raise CheckpointError(f"{path}: key 'dec.weight' has fewer rows than the width {D}")
            k, combine = _choices(notes, F, k, combine)
            config = CLTConfig(
                n_layers=len(paths) + 1,
                d_model=D,
                n_features=F,
                k=k or F,
                n_targets=n_targets,
                first_offset=1,
                read_site=read_site or "mlp_in",
                layer_norm=True,
                independent=combine,
                sparsity=SparsitySettings(kind="topk" if k else "relu"),
            )
            transcoder = empty_transcoder(config, dtype)
        _fill(transcoder, layer, file, n_targets)
    assert transcoder is not None
    return transcoder


def _choices(
    notes: dict[str, Any], n_features: int, k: int | None, combine: Combination | None
) -> tuple[int | None, Combination]:
    """k and combination: the caller's, else those in training_metadata, else the project's defaults."""
    noted: Any = notes.get("combine")
    k = k or notes.get("k")
    if k is not None and not (isinstance(k, int) and 0 < k <= n_features):
        raise ConfigError(f"k={k!r}: the transcoder has {n_features} features; pass the k used in training")
    return k, combine or (noted if noted in get_args(Combination) else "sum")


def _read(path: Path, layer: int) -> tuple[ForeignFile, dict[str, Any]]:
    """The tensors of one layer's file and its training_metadata; checks the layer number."""
    tree = read_pickled(path)
    if tree.get("layer", layer) != layer:
        raise CheckpointError(
            f"{path}: key 'layer' is {tree['layer']!r}, expected {layer} as in the name; rename the file"
        )
    state, notes = tree.get("state_dict"), tree.get("training_metadata", {})
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: key 'state_dict' is missing; the checkpoint is incomplete")
    tensors: dict[str, Any] = {}
    for key, tensor in state.items():
        name = str(key).removeprefix(_COMPILED)
        if name in tensors:
            raise CheckpointError(f"{path}: key '{name}' occurs twice, with and without '{_COMPILED}'; remove one")
        tensors[name] = tensor
    return ForeignFile(path, tensors), notes if isinstance(notes, dict) else {}


def _fill(transcoder: CrossLayerTranscoder, layer: int, file: ForeignFile, n_targets: int) -> None:
    F, D = transcoder.config.n_features, transcoder.config.d_model
    weight_D, bias_D = file.take("enc.0.weight", D), file.take("enc.0.bias", D)
    W_FD = file.take("enc.1.weight", F, D)
    transcoder.encoder_matrix(layer).copy_(W_FD * weight_D)
    transcoder.encoder_bias(layer).copy_(file.take("enc.1.bias", F) + W_FD @ bias_D)
    W_TDF = file.take("dec.weight", n_targets * D, F).view(n_targets, D, F)
    bias_TD = file.take("dec.bias", n_targets * D).view(n_targets, D)
    file.end()
    for place, target in enumerate(transcoder.targets_of(layer)):
        row = transcoder.sources_of(target).index(layer)
        transcoder.decoder_matrix(target)[row].copy_(W_TDF[place].T)
        transcoder.decoder_bias(target)[row].copy_(bias_TD[place])


@dataclass(frozen=True, kw_only=True)
class _Decoders:
    """One source's decoders in raw units: W_TFD [T,F,D] and b_TD [T,D], zeros beyond the last layer."""

    W_TFD: Tensor
    b_TD: Tensor


@torch.no_grad()
def save_vlm_clt_training(transcoder: CrossLayerTranscoder, folder: Path, batches: Sequence[ActivationBatch]) -> None:
    """Writes the three files of every source layer.

    k and the combination, which the format has no key for, are stored in training_metadata for our reader; the
    project's class needs use_topk and topk_pct = k / F. The bias of a target of joint sources is stored with its
    nearest source.

    Args:
        transcoder: a whole transcoder, kind topk or relu, with `first_offset: 1` and `layer_norm: true`.
        folder: new or empty.
        batches: raw activations of all layers, x and y [n_layers,B,D], for the mapping (mean |MLP output| of layer
            l + 1 by channel, over the tokens on which the feature is active) and the metrics.

    Raises:
        ConfigError: the format cannot represent the transcoder.
        StoreError: `batches` has no tokens.
        CheckpointError: the folder is not empty or cannot be written.
    """
    _check(transcoder)
    if not sum(batch.x.shape[1] for batch in batches):
        raise StoreError("no tokens to measure the mapping and the metrics on; use a store with tokens")
    plain = transcoder if transcoder.config.independent else transcoder.untied()
    with new_folder(folder) as temporary:
        for layer in transcoder.share.sources:
            _save_layer(plain, layer, temporary, batches)


def _check(transcoder: CrossLayerTranscoder) -> None:
    config = transcoder.config
    if config.source is not None:
        raise ConfigError(f"clt.source={config.source}: only one source layer; join all layers first with 'clt join'")
    if not config.layer_norm:
        raise ConfigError(
            "clt.layer_norm=false: encoders of the vlm-clt-training format start with LayerNorm; set it to true"
        )
    if config.first_offset == 0:
        raise ConfigError("clt.first_offset=0: the vlm-clt-training format needs first_offset: 1; train with it")
    if config.feature_offset:
        raise ConfigError("clt.feature_offset: not supported by the vlm-clt-training format; train without it")
    if config.skip:
        raise ConfigError("clt.skip: the vlm-clt-training format has no skip connection; train without it")
    if config.sparsity.kind not in ("topk", "relu") or config.sparsity.decoder_norm:
        raise ConfigError(f"clt.sparsity.kind={config.sparsity.kind}: the vlm-clt-training format needs topk or relu")


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
    """Decoders of one source; every source has T targets in these files, those beyond the last layer are zero."""
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
        # Under a sum only the nearest source includes the mean output; under mean and nearest every source does.
        if nearest or config.independent in ("mean", "nearest"):
            decoders.b_TD[place] += mean_D
    return decoders


def _measure(
    transcoder: CrossLayerTranscoder, layer: int, decoders: _Decoders, batches: Sequence[ActivationBatch]
) -> tuple[Tensor, dict[str, float], float]:
    """The mapping [D,F], the summary of features, and the mean squared error of the source alone."""
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
