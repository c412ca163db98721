"""Checkpoints of crosslayer-coding (decode-clt), read with their normalisation folded, written with untied decoders.

    cfg.json              num_layers, d_model, num_features, activation_fn, decoder_tying, skip_connection, ...
    norm_stats.json       {layer: {inputs: {mean, std}, targets: {mean, std}}}, for normalization_method mean_std
    model.safetensors, clt_checkpoint_latest.safetensors or the only file of its kind:
        encoder_module.encoders.{i}.weight [F,D], .bias_param [F]
        decoder_module.decoders.{s}->{t}.weight [D,F], .bias_param [D]     ({i} instead where decoders are tied)
        decoder_module.skip_weights.{s}->{t} [D,D]                         ({t} instead where decoders are tied)
        decoder_module.feature_offset.{t}, feature_scale.{t} [F]           where decoders are tied
        theta_manager.log_threshold [L,F]

Everything lives in normalised units, (x - mean) / (std + 1e-6) or x sqrt(D). A target is the sum over all sources up to
its own layer of W a + bias; its JumpReLU keeps what equals the threshold, ours what exceeds it. topk and batchtopk rank
by pre-activations standardised over the batch, so they are no function of a token and cannot be read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.checkpoint.manifest import new_folder
from clt.convert.circuit_tracer import check_pointwise, note_zeros, pair_or_zeros
from clt.convert.files import ForeignFile, empty_transcoder, read_json, refuse, whole_number, write_json
from clt.errors import CheckpointError, ConfigError
from clt.tensor_files import write_tensors
from clt.transcoder.architecture import CLTConfig, ReadSite, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder

SETTINGS_FILE, STATS_FILE, WEIGHTS_FILE = "cfg.json", "norm_stats.json", "model.safetensors"

_ENCODER, _DECODER = "encoder_module.encoders.{}", "decoder_module.decoders.{}"
_SKIP, _OFFSET, _SCALE = (f"decoder_module.{name}.{{}}" for name in ("skip_weights", "feature_offset", "feature_scale"))
_THRESHOLD = "theta_manager.log_threshold"

_EPSILON = 1e-6

#: Last parts of module names whose input is what our sites are.
_INPUTS: dict[str, ReadSite] = {
    "mlp": "mlp_in",
    "c_fc": "mlp_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "dense_h_to_4h": "mlp_in",
    "ln_2": "resid_mid",
    "post_attention_layernorm": "resid_mid",
    "pre_feedforward_layernorm": "resid_mid",
}


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """Standardisation of one layer: x is (x - mean_x) / std_x, outputs come as y std_y + mean_y; all [D]."""

    mean_x: Tensor
    std_x: Tensor
    mean_y: Tensor
    std_y: Tensor


def load_crosslayer_coding(folder: Path, *, read_site: ReadSite | None = None) -> CrossLayerTranscoder:
    """Reads a checkpoint whose activation is jumprelu or relu.

    Args:
        folder: with cfg.json, the weights in one file, and norm_stats.json where the settings need it.
        read_site: what the encoders read; absent: what mlp_input_template says, the MLPs' inputs if it says nothing.

    Returns:
        The transcoder, in raw units, with a decoder for every source and target; k says nothing.

    Raises:
        CheckpointError: a file is missing, damaged or of another shape, or says what no transcoder of ours can be.
    """
    path = folder / SETTINGS_FILE
    settings = read_json(path)
    activation, tying = settings.get("activation_fn", "jumprelu"), settings.get("decoder_tying", "none")
    if activation not in ("jumprelu", "relu"):
        why = "ranks within the batch; convert it with their convert_batchtopk_to_jumprelu.py first"
        refuse(path, "activation_fn", activation, why)
    if tying not in ("none", "per_source", "per_target"):
        refuse(path, "decoder_tying", tying, "none, per_source or per_target is wanted")
    F = whole_number(path, settings, "num_features")
    config = CLTConfig(
        n_layers=whole_number(path, settings, "num_layers"),
        d_model=whole_number(path, settings, "d_model"),
        n_features=F,
        k=F,
        skip=bool(settings.get("skip_connection", False)),
        read_site=read_site or _read_site(path, settings),
        sparsity=SparsitySettings(kind=activation),
    )
    file = ForeignFile.safetensors(_weights_file(folder))
    if tying != "none" and file.is_not_zero(re.escape(_OFFSET.format("")) + r"\d+"):
        config = replace(config, feature_offset=True)
    # Sizes are checked before there is memory of these sizes.
    last = file.take(f"{_ENCODER.format(config.n_layers - 1)}.weight", F, config.d_model)
    norms = _norms(folder, settings, config)
    transcoder = empty_transcoder(config, last.dtype)
    for layer in range(config.n_layers):
        _fill_source(transcoder, layer, file, norms[layer])
        _fill_target(transcoder, layer, file, norms[layer], tying)
    if activation == "jumprelu":
        for layer, log_F in enumerate(file.take(_THRESHOLD, config.n_layers, F)):
            transcoder.log_thresholds(layer).copy_(log_F)
    file.end()
    return transcoder


def save_crosslayer_coding(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Writes cfg.json and model.safetensors, in raw units, with a decoder for every source and target.

    Args:
        transcoder: a whole transcoder of the kind jumprelu or relu.
        folder: new or empty.

    Raises:
        ConfigError: the format has no place for what the transcoder is.
        CheckpointError: the folder is not empty or cannot be written.
    """
    check_pointwise(transcoder, "crosslayer-coding")
    config, plain = transcoder.config, transcoder.folded()
    if config.read_site not in _INPUTS.values():
        raise ConfigError(f"clt.read_site={config.read_site}: crosslayer-coding reads an MLP's or its norm's input")
    tensors: dict[str, Tensor] = {}
    for target in range(config.n_layers):
        tensors |= _source_tensors(plain, target) | _target_tensors(plain, target)
    if config.sparsity.kind == "jumprelu":
        # A layer that is no source has pre-activations of 0, below any threshold.
        none_F = torch.zeros(config.n_features, dtype=plain.dtype)
        tensors[_THRESHOLD] = torch.stack(
            [
                plain.log_thresholds(layer) if layer in plain.share.sources else none_F
                for layer in range(config.n_layers)
            ]
        )
    model = transcoder.provenance.model
    settings = {
        "num_features": config.n_features,
        "num_layers": config.n_layers,
        "d_model": config.d_model,
        "model_name": None if model is None else model.name,
        "normalization_method": "none",
        "activation_fn": config.sparsity.kind,
        "mlp_input_template": "layers.{}." + ("mlp" if config.read_site == "mlp_in" else "post_attention_layernorm"),
        "mlp_output_template": "layers.{}.mlp",
        "decoder_tying": "none",
        "skip_connection": config.skip,
    }
    with new_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors)
        write_json(temporary / SETTINGS_FILE, settings)
    note_zeros(plain, "crosslayer-coding")


def _read_site(path: Path, settings: dict[str, Any]) -> ReadSite:
    template = settings.get("mlp_input_template")
    if not template:
        return "mlp_in"
    last = str(template).rpartition(".")[2]
    if last not in _INPUTS:
        refuse(path, "mlp_input_template", template, f"ends with none of {', '.join(_INPUTS)}; see --read-site")
    return _INPUTS[last]


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, "clt_checkpoint_latest.safetensors"):
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        sharded = ", only parts of ranks: merge them first" if any(folder.glob("rank_*_model.pt")) else ""
        raise CheckpointError(f"{folder}: {len(found)} safetensors files and no {WEIGHTS_FILE}{sharded}")
    return found[0]


def _norms(folder: Path, settings: dict[str, Any], config: CLTConfig) -> list[_Norm]:
    """The standardisation of every layer; old names of the methods are known too."""
    path, method = folder / SETTINGS_FILE, settings.get("normalization_method", "none")
    zeros, ones = torch.zeros(config.d_model, dtype=torch.float64), torch.ones(config.d_model, dtype=torch.float64)
    if method == "none":
        return [_Norm(mean_x=zeros, std_x=ones, mean_y=zeros, std_y=ones)] * config.n_layers
    if method in ("sqrt_d_model", "auto_sqrt_d_model", "estimated_mean_std_sqrt_d_model"):
        std = ones / config.d_model**0.5
        return [_Norm(mean_x=zeros, std_x=std, mean_y=zeros, std_y=std)] * config.n_layers
    if method not in ("mean_std", "auto", "estimated_mean_std"):
        refuse(path, "normalization_method", method, "none, mean_std or sqrt_d_model is wanted")
    stats_path = folder / STATS_FILE
    stats = read_json(stats_path)
    return [_norm_of(stats_path, stats, layer, config.d_model) for layer in range(config.n_layers)]


def _norm_of(path: Path, stats: dict[str, Any], layer: int, d_model: int) -> _Norm:
    found = {}
    for name, part in (("x", "inputs"), ("y", "targets")):
        for key in ("mean", "std"):
            try:
                numbers_D = torch.tensor(stats[str(layer)][part][key], dtype=torch.float64)
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{path}: key '{layer}.{part}.{key}' is missing, or no list of numbers") from None
            if numbers_D.shape != (d_model,) or not bool(numbers_D.isfinite().all()):
                raise CheckpointError(f"{path}: key '{layer}.{part}.{key}' must be {d_model} finite numbers")
            found[f"{key}_{name}"] = numbers_D + (_EPSILON if key == "std" else 0)
    return _Norm(**found)


def _fill_source(transcoder: CrossLayerTranscoder, layer: int, file: ForeignFile, norm: _Norm) -> None:
    F, D, key = transcoder.config.n_features, transcoder.config.d_model, _ENCODER.format(layer)
    W_FD = file.take(f"{key}.weight", F, D).double() / norm.std_x
    transcoder.encoder_matrix(layer).copy_(W_FD)
    transcoder.encoder_bias(layer).copy_(file.take(f"{key}.bias_param", F) - W_FD @ norm.mean_x)


def _fill_target(transcoder: CrossLayerTranscoder, target: int, file: ForeignFile, norm: _Norm, tying: str) -> None:
    F, D = transcoder.config.n_features, transcoder.config.d_model
    scale_F = None
    if tying != "none":
        if file.has(_OFFSET.format(target)):
            offset_F = file.take(_OFFSET.format(target), F)
            if transcoder.config.feature_offset:
                # The same for all sources.
                transcoder.feature_offsets(target).copy_(offset_F)
        if file.has(_SCALE.format(target)):
            scale_F = file.take(_SCALE.format(target), F)
    bias_D = torch.zeros(D, dtype=torch.float64)
    for source in transcoder.sources_of(target):
        place = {"none": f"{source}->{target}", "per_source": str(source), "per_target": str(target)}[tying]
        key = _DECODER.format(place)
        W_FD = file.take(f"{key}.weight", D, F).T.double() * norm.std_y
        transcoder.decoder_matrix(target)[source].copy_(W_FD if scale_F is None else W_FD * scale_F[:, None])
        # One matrix per target is applied once, to the sum of its sources' activations.
        if tying != "per_target" or source == target:
            bias_D += file.take(f"{key}.bias_param", D)
    bias_D = bias_D * norm.std_y + norm.mean_y
    if transcoder.config.skip:
        W_DD = _skip(file, target, tying, D).double() * norm.std_y[:, None] / norm.std_x
        transcoder.skip_matrix(target).copy_(W_DD)
        bias_D -= W_DD @ norm.mean_x
    transcoder.decoder_bias(target).copy_(bias_D)


def _skip(file: ForeignFile, target: int, tying: str, d_model: int) -> Tensor:
    """[D,D] of the target's own input; those of other layers' inputs have no place here."""
    if tying != "none":
        return file.take(_SKIP.format(target), d_model, d_model)
    for source in range(target):
        why = "it maps a source's input; ours reads the target's own"
        file.take_zeros(_SKIP.format(f"{source}->{target}"), why, d_model, d_model)
    return file.take(_SKIP.format(f"{target}->{target}"), d_model, d_model)


def _source_tensors(transcoder: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    like, key = next(transcoder.parameters()), _ENCODER.format(layer)
    W_FD, b_F = (
        like.new_zeros(transcoder.config.n_features, transcoder.config.d_model),
        like.new_zeros(transcoder.config.n_features),
    )
    if layer in transcoder.share.sources:
        W_FD, b_F = transcoder.encoder(layer)
    return {f"{key}.weight": W_FD, f"{key}.bias_param": b_F}


def _target_tensors(transcoder: CrossLayerTranscoder, target: int) -> dict[str, Tensor]:
    """Decoders and skip connections of all pairs into a target; its bias stands with its own layer."""
    D, tensors = transcoder.config.d_model, {}
    for source in range(target + 1):
        key, own = _DECODER.format(f"{source}->{target}"), source == target and target in transcoder.share.targets
        zeros_DD = torch.zeros(D, D, dtype=transcoder.dtype)
        tensors[f"{key}.weight"] = pair_or_zeros(transcoder, source, target).T
        tensors[f"{key}.bias_param"] = transcoder.decoder_bias(target) if own else zeros_DD[0].clone()
        if transcoder.config.skip:
            tensors[_SKIP.format(f"{source}->{target}")] = transcoder.skip_matrix(target) if own else zeros_DD
    return tensors
