"""The circuit-tracer format: cross-layer transcoders (read and written), sets of single-layer ones (read only).

    config.yaml               model_kind, model_name, feature_input_hook, feature_output_hook
    W_enc_{i}.safetensors     W_enc_{i} [F,D], b_enc_{i} [F], b_dec_{i} [D], threshold_{i} [F] for JumpReLU
    W_dec_{i}.safetensors     W_dec_{i} [F,L-i,D]: decoders of source i into layers i, i + 1, ..., L - 1

    layer_{i}.safetensors     in a set: W_enc [F,D], W_dec [F,D], b_enc, b_dec, W_skip, activation_function.threshold

mlp_t = b_dec_t + sum over i <= t of a_i W_dec_i[:, t - i], with a = pre if pre > threshold else 0, or ReLU without
thresholds. Every layer is a source and a target: a horizon or first offset is written as zeros. Releases up to 0.5.0
ignore W_skip_{i} of cross-layer transcoders (x W_skip; in sets x W_skip^T): it is read, but not written.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import yaml
from torch import Tensor

from clt.checkpoint.manifest import new_folder
from clt.convert.files import ForeignFile, empty_transcoder, numbered, read_yaml, refuse
from clt.errors import CheckpointError, ConfigError
from clt.tensor_files import write_tensors
from clt.transcoder.architecture import CLTConfig, ReadSite, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

#: TransformerLens hook name -> our site.
HOOKS: dict[str, ReadSite] = {
    "hook_resid_mid": "resid_mid",
    "mlp.hook_in": "mlp_in",
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
}
OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")


def load_circuit_tracer(folder: Path, *, read_site: ReadSite | None = None) -> CrossLayerTranscoder:
    """Reads a cross-layer transcoder or a set of single-layer ones.

    Args:
        folder: checkpoint with config.yaml.
        read_site: input of the encoders; default: the site of feature_input_hook.

    Returns:
        The transcoder, in raw units, of kind relu or jumprelu; k is not meaningful.

    Raises:
        CheckpointError: a file is missing, damaged or of another shape; names file and key.
    """
    path = folder / CONFIG_FILE
    settings = read_yaml(path)
    kind, hook, written = (settings.get(key) for key in ("model_kind", "feature_input_hook", "feature_output_hook"))
    if read_site is None and str(hook) not in HOOKS:
        refuse(path, "feature_input_hook", hook, f"not one of {', '.join(HOOKS)}; set --read-site")
    if written not in OUTPUT_HOOKS:
        refuse(path, "feature_output_hook", written, "only MLP outputs (hook_mlp_out) are supported")
    site = read_site or HOOKS[str(hook)]
    match kind:
        case "cross_layer_transcoder":
            return _load_cross_layer(folder, site)
        case "transcoder_set":
            return _load_set(folder, site)
    refuse(path, "model_kind", kind, "expected cross_layer_transcoder or transcoder_set")


def save_circuit_tracer(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Writes a cross-layer transcoder for circuit-tracer, with scaling folded into the weights.

    Args:
        transcoder: a whole transcoder of kind jumprelu or relu.
        folder: new or empty.

    Raises:
        ConfigError: the format cannot represent the transcoder.
        CheckpointError: the folder is not empty or cannot be written.
    """
    check_pointwise(transcoder, "circuit-tracer")
    if transcoder.config.skip:
        raise ConfigError("clt.skip: circuit-tracer ignores W_skip of cross-layer transcoders; train without it")
    plain, config = transcoder.folded(), transcoder.config
    hook = next(name for name, site in HOOKS.items() if site == config.read_site)
    model = transcoder.provenance.model
    with new_folder(folder) as temporary:
        for layer in range(config.n_layers):
            write_tensors(temporary / f"W_enc_{layer}.safetensors", _encoder_tensors(plain, layer))
            decoders = [pair_or_zeros(plain, layer, target) for target in range(layer, config.n_layers)]
            write_tensors(temporary / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": torch.stack(decoders, dim=1)})
        settings = {
            "model_kind": "cross_layer_transcoder",
            "model_name": "unknown" if model is None else model.name,
            "feature_input_hook": hook,
            "feature_output_hook": OUTPUT_HOOKS[0],
        }
        (temporary / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    note_zeros(plain, "circuit-tracer")


def check_pointwise(transcoder: CrossLayerTranscoder, reader: str) -> None:
    """ConfigError unless features have thresholds or ReLU, linear encoders of raw inputs and linear decoders."""
    if transcoder.config.feature_offset:
        raise ConfigError(f"clt.feature_offset: {reader} does not support feature offsets")
    kind = transcoder.config.sparsity.kind
    if kind not in ("jumprelu", "relu"):
        raise ConfigError(
            f"clt.sparsity.kind={kind}: {reader} supports jumprelu and relu only; convert to thresholds first "
            "(--calibrate STORE --tokens N, or clt.convert.thresholds.to_jumprelu)"
        )
    if transcoder.config.layer_norm:
        raise ConfigError(f"clt.layer_norm: {reader} does not support LayerNorm before encoders; train without it")


def pair_or_zeros(transcoder: CrossLayerTranscoder, source: int, target: int) -> Tensor:
    """Decoder of a source into a target, zeros if the transcoder has none.

    Args:
        transcoder: a transcoder with untied decoders.
        source: layer of the features.
        target: layer of the MLP output.

    Returns:
        [F,D].
    """
    if target in transcoder.targets_of(source):
        return transcoder.decoder(source, target)
    return torch.zeros(transcoder.config.n_features, transcoder.config.d_model, dtype=transcoder.dtype)


def note_zeros(transcoder: CrossLayerTranscoder, reader: str) -> None:
    """Logs the share of zeros written for a format without horizon and first offset."""
    config = transcoder.config
    every = config.n_layers * (config.n_layers + 1) // 2
    zeros = every - sum(len(transcoder.targets_of(source)) for source in range(config.n_layers))
    if zeros:
        gib = config.n_features * config.d_model * transcoder.dtype.itemsize / 2**30
        log.warning(
            "zero decoders written: format=%s matrices=%d (of %d) gib=%.2f (of %.2f)",
            *(reader, zeros, every, zeros * gib, every * gib),
        )


def _encoder_tensors(transcoder: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    F, D, is_source = transcoder.config.n_features, transcoder.config.d_model, layer in transcoder.share.sources
    like = next(transcoder.parameters())
    # A layer that is not a source never fires: its pre-activations are 0.
    W_FD, b_F = transcoder.encoder(layer) if is_source else (like.new_zeros(F, D), like.new_zeros(F))
    tensors = {
        "W_enc": W_FD,
        "b_enc": b_F,
        "b_dec": transcoder.decoder_bias(layer) if layer in transcoder.share.targets else like.new_zeros(D),
    }
    if transcoder.config.sparsity.kind == "jumprelu":
        tensors["threshold"] = transcoder.log_thresholds(layer).exp() if is_source else like.new_zeros(F)
    return {f"{key}_{layer}": tensor for key, tensor in tensors.items()}


def _load_cross_layer(folder: Path, read_site: ReadSite) -> CrossLayerTranscoder:
    encoders, decoders = (numbered(folder, rf"{part}_(\d+)\.safetensors") for part in ("W_enc", "W_dec"))
    if len(encoders) != len(decoders):
        raise CheckpointError(f"{folder}: {len(encoders)} encoder files, {len(decoders)} decoder files; download all")
    L = len(encoders)
    transcoder, F, D = None, 0, 0
    for layer, (path_enc, path_dec) in enumerate(zip(encoders, decoders, strict=True)):
        file = ForeignFile.safetensors(path_enc)
        if transcoder is None:
            transcoder = _like(file, "W_enc_0", f"threshold_{layer}", "W_skip_0", L, None, read_site)
            F, D = transcoder.config.n_features, transcoder.config.d_model
        transcoder.encoder_matrix(layer).copy_(file.take(f"W_enc_{layer}", F, D))
        transcoder.encoder_bias(layer).copy_(file.take(f"b_enc_{layer}", F))
        transcoder.decoder_bias(layer).copy_(file.take(f"b_dec_{layer}", D))
        if transcoder.config.sparsity.kind == "jumprelu":
            transcoder.log_thresholds(layer).copy_(_log_threshold(file, f"threshold_{layer}", F))
        if transcoder.config.skip:
            transcoder.skip_matrix(layer).copy_(file.take(f"W_skip_{layer}", D, D).T)
        file.end()
        file = ForeignFile.safetensors(path_dec)
        W_FTD = file.take(f"W_dec_{layer}", F, L - layer, D)
        for place, target in enumerate(transcoder.targets_of(layer)):
            transcoder.decoder_matrix(target)[layer].copy_(W_FTD[:, place])
        file.end()
    assert transcoder is not None
    return transcoder


def _load_set(folder: Path, read_site: ReadSite) -> CrossLayerTranscoder:
    paths = numbered(folder, r"layer_(\d+)\.safetensors")
    threshold, transcoder = "activation_function.threshold", None
    for layer, path in enumerate(paths):
        file = ForeignFile.safetensors(path)
        transcoder = transcoder or _like(file, "W_enc", threshold, "W_skip", len(paths), 1, read_site)
        F, D = transcoder.config.n_features, transcoder.config.d_model
        transcoder.encoder_matrix(layer).copy_(file.take("W_enc", F, D))
        transcoder.encoder_bias(layer).copy_(file.take("b_enc", F))
        transcoder.decoder_bias(layer).copy_(file.take("b_dec", D))
        transcoder.decoder_matrix(layer)[0].copy_(file.take("W_dec", F, D))
        if transcoder.config.sparsity.kind == "jumprelu":
            transcoder.log_thresholds(layer).copy_(_log_threshold(file, threshold, F))
        if transcoder.config.skip:
            transcoder.skip_matrix(layer).copy_(file.take("W_skip", D, D))
        file.end()
    assert transcoder is not None
    return transcoder


def _like(
    file: ForeignFile, W_enc: str, threshold: str, W_skip: str, n_layers: int, n_targets: int | None, site: ReadSite
) -> CrossLayerTranscoder:
    """An uninitialised transcoder with the sizes and kind of the first layer's file."""
    F, D, dtype = file.matrix(W_enc)
    config = CLTConfig(
        n_layers=n_layers,
        d_model=D,
        n_features=F,
        k=F,
        n_targets=n_targets,
        skip=file.has(W_skip),
        read_site=site,
        sparsity=SparsitySettings(kind="jumprelu" if file.has(threshold) else "relu"),
    )
    return empty_transcoder(config, dtype)


def _log_threshold(file: ForeignFile, key: str, n_features: int) -> Tensor:
    threshold_F = file.take(key, n_features)
    if bool((threshold_F < 0).any()):
        raise CheckpointError(f"{file.path}: key '{key}' is negative; negative JumpReLU thresholds are not supported")
    return threshold_F.log()
